#!/usr/bin/env bash
# Lint, types and every test, in the environment of launch/environment.sh with the test extras. About 25 minutes on 2 cores, 50 with --all.
#
#   bash launch/test.sh [--all]
#
# HVD_VGG_VENV  where the environment is (default: .venv in the clone)
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help "$@"
all=()
case "${1:-}" in
  --all) all=(--tier=3 --fault_table=tests/faults/README.md) ;;
  '') ;;
  *) fail "$1: no such flag; expected --all or nothing" ;;
esac

bash "$launch/environment.sh" --test
use_environment
consent_to_root
cd "$clone"
export PYTHONDONTWRITEBYTECODE=1

echo "== lint and types"
ruff check .
ruff format --check .
mypy
shellcheck -x -P SCRIPTDIR launch/*.sh launch/*.sbatch launch/container/*.sh launch/kubernetes/*.sh \
  launch/container/hvd-vgg-ssh .ci/run
hadolint Dockerfile

echo "== tests of one process, and those that start their own ranks"
python -m pytest -q ${all[@]+"${all[@]}"} tests/unit tests/faults

for ranks in 2 3; do
  echo "== tests on $ranks ranks"
  hvd-vgg launch --ranks="$ranks" -- python -m pytest -q --color=no tests/parallel
done
