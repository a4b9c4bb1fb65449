#!/usr/bin/env bash
# Runs the quick tests under several TensorFlows, each in an environment of its own, and prints a table of how they went.
#
#   bash launch/versions.sh [TENSORFLOW:PYTHON:HOROVOD[:MPI] ...]
#
# TENSORFLOW and MPI (openmpi-4, the default, openmpi-5, mpich-5) are names in launch/versions, PYTHON is an interpreter.
# The last step trains by the package's wheel, built here and installed beside that TensorFlow as pip would by itself.
# Without arguments the rows of docs/compatibility.md (launch/test.sh tests 2.20 with all there is).
# The exit code is 0 if all ran and passed. About 4 to 10 minutes and 1.7 GB each, on 2 cores.
#
# VERSIONS_DIR  where environments and logs are (default: .venvs in the clone). Nothing in it is deleted: an environment that
#               was made there from the same versions is used again, so take a new directory, or remove it, for fresh ones.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help "$@"
if [ $# -eq 0 ]; then
  set -- 2.6:python3.8:0.27.0 2.12:python3.8:0.28.1 2.15:python3.9:0.28.1 2.16:python3.10:0.28.1 2.18:python3.12:0.28.1 \
    2.19:python3.12:0.28.1 2.20:python3.13:0.28.1 2.21:python3.13:0.28.1 2.21:python3.13:0.28.1:openmpi-5 2.21:python3.13:0.28.1:mpich-5
fi
for each in "$@"; do
  [[ "$each" =~ ^[0-9.]+:[^:]+:[0-9.]+(:[a-z]+-[0-9]+)?$ ]] ||
    refuse "$each: expected TENSORFLOW:PYTHON:HOROVOD or TENSORFLOW:PYTHON:HOROVOD:MPI, such as 2.21:python3.13:0.28.1:openmpi-5"
done
git -C "$clone" rev-parse --git-dir >/dev/null || fail "$clone is not a git clone: git lists what the package's wheel is built from"
folder="${VERSIONS_DIR:-$clone/.venvs}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
cd "$clone"
export PYTHONDONTWRITEBYTECODE=1
consent_to_root

# Horovod 0.27's Gloo puts a field behind a struct that this header of Linux 6 ends with an array of no length, which C++ does
# not know, and relies on other headers to bring in <array>. Here is the header as it was; compilers look in CPATH first.
mkdir -p "$folder/include/linux"
sed 's/link_mode_masks\[\]/link_mode_masks[0]/' /usr/include/linux/ethtool.h >"$folder/include/linux/ethtool.h"
export CPATH="$folder/include${CPATH:+:$CPATH}" CXXFLAGS="-include array ${CXXFLAGS:-}"

# What a step wrote last that says how many tests passed, or its exit code.
outcome() {
  local code="$1" log="$2" last
  last="$(grep -E '^[0-9]+ (passed|failed).* in ' "$log" | tail -n 1 | sed 's/ in .*//')"
  if [ -n "$last" ]; then echo "$last"; elif [ "$code" = 0 ]; then echo passed; else echo "exit code $code"; fi
}

# Starts a command of hvd-vgg, or behind -- a program, on two ranks: by the launcher, or by the MPI itself where the launcher
# refuses it.
on_two_ranks() {
  local limit="$1"
  shift
  case "$mpi" in
    mpich*)
      if [ "$1" = -- ]; then shift; else set -- hvd-vgg "$@"; fi
      timeout "$limit" mpiexec -n 2 "$@"
      ;;
    *) hvd-vgg launch --ranks=2 --time_limit_seconds="$limit" "$@" ;;
  esac
}

# Replaces the link to the clone by a wheel of what the clone has, tracked or new. launch/environment.sh makes the link again.
install_wheel() {
  local place="$1"
  mkdir "$place/source" &&
    git ls-files -z --cached --others --exclude-standard | tar --create --ignore-failed-read --null --files-from=- | tar --extract --directory="$place/source" &&
    python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir="$place/wheels" "$place/source" &&
    python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps --no-index --find-links="$place/wheels" hvd_vgg &&
    python -I -c 'import os, sys, hvd_vgg; sys.exit(not hvd_vgg.__file__.startswith(sys.prefix + os.sep))'
}

# 5 updates on drawn data, then 5 more from the checkpoint; what the run claims is checked against data and weights.
train_twice() {
  local run="$1"
  install_wheel "$run" &&
    on_two_ranks 300 make-demo-data --data_dir="$run/data" --train_images=200 --validation_images=50 &&
    train_to 5 "$run" && train_to 10 "$run" | tee "$run/continued" && grep -q '^steps 5 to 10,' "$run/continued" &&
    hvd-vgg verify-run "$run/run" --data_dir="$run/data"
}

train_to() {
  on_two_ranks 300 train --flagfile="$clone/configs/smoke.flags" --data_dir="$2/data" --run_dir="$2/run" --steps="$1"
}

# What is installed there, as cells of the table.
versions() {
  python - "$mpi" <<'PYTHON'
import platform
import sys
from importlib.metadata import version

mpi = sys.argv[1].split("-")[0]
cells = [platform.python_version(), *map(version, ("tensorflow-cpu", "horovod")), f"{mpi} {version(mpi)}", version("numpy")]
print("|", " | ".join(cells))
PYTHON
}

# Prints one row of the table; what each step prints goes to a log of its own. Called where `set -e` does not hold.
row() {
  local tensorflow python horovod mpi step code bad=0 began=$SECONDS made results=()
  IFS=: read -r tensorflow python horovod mpi <<<"$1"
  mpi="${mpi:-openmpi-4}"
  local place="$folder/tensorflow-$tensorflow-${python##*/}-horovod-$horovod-$mpi"
  mkdir -p "$place"
  export HVD_VGG_VENV="$place/venv" HVD_VGG_TENSORFLOW="$tensorflow" HVD_VGG_HOROVOD="$horovod" HVD_VGG_MPI="$mpi" PYTHON="$python"
  if ! bash "$launch/environment.sh" >"$place/environment.log" 2>&1; then
    echo "| $python | $tensorflow | $horovod | $mpi | | not run: $(tail -n 1 "$place/environment.log") | | | |"
    return 1
  fi
  made=$((SECONDS - began)) began=$SECONDS
  use_environment
  for step in unit parallel train; do
    code=0
    if [[ "$step/$mpi" == unit/mpich* ]]; then # they start ranks by Open MPI
      results+=("-")
      continue
    fi
    case "$step" in
      unit) timeout 900 python -m pytest -q tests/unit ;;
      parallel) on_two_ranks 900 -- python -m pytest -q --color=no tests/parallel ;;
      train) train_twice "$(mktemp -d "$place/train.XXXXXX")" ;;
    esac >"$place/$step.log" 2>&1 || code=$?
    [ "$code" = 0 ] || bad=1
    results+=("$(outcome "$code" "$place/$step.log")")
  done
  echo "$(versions) | ${results[0]} | ${results[1]} | ${results[2]} | $made + $((SECONDS - began)) |"
  return "$bad"
}

echo "| Python | TensorFlow | Horovod | MPI | NumPy | tests/unit | tests/parallel, 2 ranks | trained, continued, checked | seconds: environment + tests |"
echo "|---|---|---|---|---|---|---|---|---|"
worst=0
for each in "$@"; do
  (row "$each") || worst=1
done
exit "$worst"
