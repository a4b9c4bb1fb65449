# shellcheck shell=bash
# What the launch scripts share; sourced by them. Deletes nothing, needs no root.

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
clone="$(dirname "$launch")"

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 78
}

# Puts the environment of launch/environment.sh first on PATH if it has been made; else the host's own python3 is used.
use_environment() {
  local venv="${HVD_VGG_VENV:-$clone/.venv}"
  if [ -x "$venv/bin/python" ]; then
    PATH="$venv/bin:$PATH"
  fi
  command -v hvd-vgg >/dev/null || fail "hvd-vgg is not installed: run launch/environment.sh, or on a host with its own TensorFlow: pip install --no-deps $clone"
}

# Prints how many devices TensorFlow sees, as the trainer will: CUDA_VISIBLE_DEVICES is honoured.
count_devices() {
  TF_CPP_MIN_LOG_LEVEL=3 python3 -c 'import tensorflow as tf; print(len(tf.config.list_physical_devices("GPU")))'
}

# run_ranks N COMMAND...: runs the command on N ranks of this host and prints it first.
run_ranks() {
  local ranks="$1"
  shift
  local mpirun=(mpirun -np "$ranks" --bind-to none --map-by slot --oversubscribe)
  if [ "$(id -u)" = 0 ]; then
    # Open MPI refuses root unless told twice; in a container there is often no one else.
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  printf '+'
  printf ' %q' "${mpirun[@]}" "$@"
  printf '\n'
  "${mpirun[@]}" "$@"
}

# Under mpirun a process cannot tell a terminal from a file; here one can.
console() { if [ -t 1 ]; then echo bar; else echo lines; fi; }
