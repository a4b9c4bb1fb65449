#!/usr/bin/env bash
# Lint, types and tests, in the environment of launch/environment.sh with the test extras; prints the seconds of each stage.
#
#   bash launch/test.sh [--fast|--all]
#
# --fast  lint, types and the tests of one process: 4 to 6 minutes on 2 cores, for while you edit
# (none)  and real ranks: one case of each thing that may go wrong. 20 to 25 minutes; what every change must pass (.ci/run)
# --all   and tier 3: the full products of cases, other launchers, faults at random. An hour; writes tests/faults/README.md
#
# HVD_VGG_VENV  where the environment is (default: .venv in the clone)
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help "$@"
tier=1 table=() ranks=(3) folders=(tests/unit tests/faults) # 3 ranks have unequal parts
case "$*" in
  '') ;;
  --fast) ranks=() folders=(tests/unit) ;;
  --all) tier=3 table=(--fault_table=tests/faults/README.md) ranks=(2 3) ;;
  *) refuse "$*: expected --fast, --all or nothing" ;;
esac

# stage NAME COMMAND...: runs a command and prints how long it took; the script ends where it fails.
stage() {
  local name="$1" began=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - began)) s"
}

lint() {
  ruff check .
  ruff format --check .
  shellcheck -x -P SCRIPTDIR launch/*.sh launch/*.sbatch launch/container/*.sh launch/kubernetes/*.sh \
    launch/container/hvd-vgg-ssh .ci/run
  hadolint Dockerfile
}

stage environment bash "$launch/environment.sh" --test
use_environment
consent_to_root
cd "$clone"
export PYTHONDONTWRITEBYTECODE=1

stage lint lint
stage types mypy
stage "${folders[*]}" python -m pytest -q --tier="$tier" ${table[@]+"${table[@]}"} "${folders[@]}"
for count in ${ranks[@]+"${ranks[@]}"}; do
  stage "tests/parallel on $count ranks" \
    hvd-vgg launch --ranks="$count" -- python -m pytest -q --color=no --tier="$tier" tests/parallel
done
echo "== all passed: $SECONDS s"
