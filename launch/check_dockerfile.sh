#!/usr/bin/env bash
# Carries out the Dockerfile's targets cpu and corex without docker, on copies of this machine that are gone in the end, and
# trains in what comes of them: on one rank, on two, and on two hosts through the image's own ssh. For corex, what the target cpu has
# made, with its TensorFlow 2.20, stands for the vendor's image. Six minutes on 2 cores, and 6 GB of memory.
#
#   sudo bash launch/check_dockerfile.sh
#
# For root on Debian 12 with python3.11, overlayfs, iproute2 and ssh-keygen. PYTHON is the interpreter (default: python3.11).
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
[ $# -eq 0 ] || refuse "$1: expected nothing"
[ "$(id -u)" = 0 ] || fail "mounting needs root"

# Mounts are in the namespace of what is started here alone: seen from this one, the directory holds none, however that ended.
scratch="$(mktemp -d)"
trap 'rm -r --one-file-system -- "$scratch"' EXIT
TMPDIR="$scratch" PYTHONPATH="$clone/benchmarks" unshare --mount --propagation private \
  "${PYTHON:-python3.11}" "$clone/tests/programs/dockerfile.py" &
check=$!
# A background job does not hear Ctrl-C.
trap 'kill "$check" 2>/dev/null; wait "$check" || exit 130' INT TERM
wait "$check"
