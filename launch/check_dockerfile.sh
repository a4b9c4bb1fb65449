#!/usr/bin/env bash
# Carries out the Dockerfile's target cpu without docker, on a copy of this machine that is gone in the end, and trains in what
# comes of it: on one rank, on two, and on two hosts through the image's own ssh. About ten minutes on 2 cores, and 5 GB of memory.
#
#   sudo bash launch/check_dockerfile.sh
#
# For root on Debian 12 with python3.11, overlayfs, iproute2 and ssh-keygen. PYTHON is the interpreter (default: python3.11).
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$(id -u)" = 0 ] || fail "mounting needs root"
PYTHONPATH="$clone/benchmarks" exec unshare --mount --propagation private "${PYTHON:-python3.11}" "$clone/tests/dockerfile.py"
