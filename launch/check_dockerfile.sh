#!/usr/bin/env bash
# Carries out the Dockerfile's targets cpu and corex without docker, on copies of this machine that are gone in the end, and
# trains in what comes of them: on one rank, on two, and on two hosts through the image's own ssh. For corex, what the target cpu has
# made stands for the vendor's image. Six minutes on 2 cores, and 6 GB of memory.
#
#   sudo bash launch/check_dockerfile.sh
#
# For root on Debian 12 with python3.11, overlayfs, iproute2 and ssh-keygen. PYTHON is the interpreter (default: python3.11).
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$(id -u)" = 0 ] || fail "mounting needs root"
PYTHONPATH="$clone/benchmarks" exec unshare --mount --propagation private "${PYTHON:-python3.11}" "$clone/tests/dockerfile.py"
