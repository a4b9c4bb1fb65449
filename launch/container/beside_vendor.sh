#!/usr/bin/env bash
# Installs hvd_vgg beside a vendor's TensorFlow, Horovod and Open MPI (Dockerfile, target corex), or on a host that has them:
# only what cannot be imported is installed, and nothing that is there is replaced, or this fails.
#
#   bash launch/container/beside_vendor.sh
#   COREX_WHEELS=launch/wheels bash launch/container/beside_vendor.sh
#
# COREX_WHEELS  the vendor's wheels of TensorFlow and Horovod, where python3 lacks them: directories or files, from the clone if
#               the path is relative, or addresses that pip can read. With what they require, of which nothing may change a
#               package that is there
# MPICC         the compiler of the MPI that Horovod was built with, for mpi4py (default: /usr/local/openmpi/bin/mpicc, else mpicc)
set -euo pipefail

# This script is copied into images alone, without common.sh.
case " $* " in *' -h '* | *' --help '*)
  sed -n -E '1d; /^#( |$)/!q; s/^# ?//p' "$0"
  exit 0
  ;;
esac

clone="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

say() { printf 'beside_vendor: %s\n' "$*"; }
fail() {
  say "$*" >&2
  exit 78
}
packages() { python3 -m pip list --format=freeze --disable-pip-version-check | sort; }
has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

before=""
if [ -n "${COREX_WHEELS:-}" ]; then
  before="$(packages)"
  wheels=()
  read -ra words <<<"$COREX_WHEELS"
  [ "${#words[@]}" -gt 0 ] || fail "COREX_WHEELS is blank: expected a directory, files or addresses of wheels, or nothing"
  for word in "${words[@]}"; do
    case "$word" in
      *://*) wheels+=("$word") ;;
      *)
        case "$word" in /*) ;; *) word="$clone/$word" ;; esac
        if [ -d "$word" ]; then word="${word%/}/*.whl"; fi
        mapfile -t files < <(compgen -G "$word")
        [ "${#files[@]}" -gt 0 ] || fail "COREX_WHEELS: $word: no such file; docker takes what is in the clone's launch/"
        wheels+=("${files[@]}")
        ;;
    esac
  done
  say "installing $(sed -E 's#//[^/ ]+@#//...@#g; s#\?[^ ]*#?...#g' <<<"${wheels[*]}")" # without names and passwords of addresses
  python3 -m pip install --disable-pip-version-check --no-cache-dir --constraint <(printf '%s\n' "$before") "${wheels[@]}" ||
    fail "COREX_WHEELS: these wheels do not go with this image's Python or packages, as pip says above: ask for those of its SDK"
fi
for needed in tensorflow horovod numpy; do
  has "$needed" || fail "python3 has no $needed: ask the vendor for the wheel of this image's SDK and Python, and give it by COREX_WHEELS (docs/iluvatar.md); without such a vendor, launch/environment.sh installs all"
done
before="${before:-$(packages)}"

# These pins are for Python 3.9 and later; SDK 3.1.0 has 3.8.
constraints=()
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
  constraints=(--constraint "$clone/launch/versions/requirements-2.16.txt")
fi
install() { python3 -m pip install --disable-pip-version-check --no-cache-dir --no-deps "$@"; }

# The module, and what brings it. The last three are Horovod's own, which the one package list of a vendor's image that is public lacks in part.
while read -r module requirement; do
  if has "$module"; then
    say "$module is there"
  else
    install ${constraints[@]+"${constraints[@]}"} "$requirement"
  fi
done <<'MODULES'
absl absl-py
crc32c crc32c
cv2 opencv-python-headless<4.12
PIL pillow
psutil psutil
safetensors safetensors
cloudpickle cloudpickle
packaging packaging
yaml PyYAML
MODULES

if has mpi4py; then
  say "mpi4py is there"
else
  mpicc="${MPICC:-/usr/local/openmpi/bin/mpicc}"
  [ -x "$mpicc" ] || mpicc="$(command -v mpicc)" || fail "no mpicc in /usr/local/openmpi/bin nor on PATH: set MPICC"
  # A wheel would look for an MPI of its own choice.
  MPICC="$mpicc" install ${constraints[@]+"${constraints[@]}"} --no-binary mpi4py mpi4py
fi
install "$clone"

replaced="$(comm -23 <(printf '%s\n' "$before") <(packages))"
[ -z "$replaced" ] || fail "these were there and are not any more: $replaced"
command -v hvd-vgg >/dev/null || fail "hvd-vgg was installed where PATH does not lead: $(python3 -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
hvd-vgg --help >/dev/null

# Without the driver TensorFlow may refuse to be imported while an image is built; on a host it must not.
if told="$(TF_CPP_MIN_LOG_LEVEL=3 python3 -c 'import tensorflow, horovod.tensorflow' 2>&1)"; then
  say "TensorFlow and Horovod can be imported"
else
  say "look at this, unless it is for want of a driver: $(tail -n 1 <<<"$told")"
fi
