#!/usr/bin/env bash
# From a fresh clone to a trained network: makes the environment, draws a data set, trains on 2 ranks, evaluates.
#
#   bash launch/quickstart.sh [FLAGS OF hvd-vgg train]
#
# DATA_DIR      TFRecords to use instead of drawn ones (give --num_classes=N too)
# HVD_VGG_VENV  where the environment is (default: .venv in the clone)
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help "$@"
run_dir="$clone/runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for flag in "$@"; do
  case "$flag" in
    --run_dir=*) run_dir="${flag#*=}" ;;
    --run_dir) refuse "$flag: expected $flag=DIR" ;;
  esac
done
bash "$launch/environment.sh"
use_environment
consent_to_root

data="${DATA_DIR:-$clone/demo_data}"
if [ -z "${DATA_DIR:-}" ] && [ ! -e "$data" ]; then
  echo "Drawing a data set of ten classes into $data"
  # Under another name until it is whole: a run that was interrupted here starts over.
  drawn="$(mktemp -d "$data.XXXXXX")"
  hvd-vgg launch --ranks=2 make-demo-data --data_dir="$drawn"
  chmod 755 "$drawn"
  mv "$drawn" "$data"
fi

echo "Training on 2 ranks in $run_dir"
hvd-vgg launch --ranks=2 train --flagfile="$clone/configs/quickstart.flags" --data_dir="$data" --run_dir="$run_dir" "$@"

if [ -f "$run_dir/flags.txt" ]; then # not when a --flagfile named another
  program="${HVD_VGG_VENV:-$clone/.venv}/bin/hvd-vgg"
  echo "Next, the same run on one rank, and whether it is the same in every bit:"
  printf '  %q' "$program"
  printf ' %q' train "--flagfile=$run_dir/flags.txt" "--run_dir=$run_dir-one-rank"
  printf '\n  %q' "$program"
  printf ' %q' verify-run "$run_dir" "--same_as=$run_dir-one-rank"
  printf '\n'
fi
