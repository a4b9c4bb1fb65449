# shellcheck shell=bash
# What the launch scripts share; sourced by them. Deletes nothing, needs no root.

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
clone="$(dirname "$launch")"

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 78
}

# refuse WHAT...: the words that a script was called with are at fault.
refuse() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 64
}

# show_help WORD...: if one of them asks for help, prints the head of the script that was called, and ends.
show_help() {
  local word
  for word in "$@"; do
    case "$word" in -h | --help)
      sed -n -E '1d; /^#( |$)/!q; s/^# ?//p' "$0"
      exit 0
      ;;
    esac
  done
}

# Puts the environment of launch/environment.sh first on PATH if it has been made; else the host's own python3 is used.
use_environment() {
  local venv="${HVD_VGG_VENV:-$clone/.venv}"
  if [ -x "$venv/bin/python" ]; then
    PATH="$venv/bin:$PATH"
  fi
  command -v hvd-vgg >/dev/null || fail "hvd-vgg is not installed: run launch/environment.sh, or on a host with its own TensorFlow: pip install --no-deps $clone"
}

# Open MPI refuses root unless told twice. For what runs in the clone alone; a script that trains leaves it to its user.
consent_to_root() {
  if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
}

# check_words WORD...: refuses values that no = joins to their flag, and all words without -- but doctor and acceptance.
check_words() {
  local word flag=""
  for word in "$@"; do
    case "$word" in
      doctor | acceptance) flag="" ;;
      -*) flag="$word" ;;
      *)
        case "$flag" in
          '' | *=*) refuse "$word: expected --FLAG=VALUE, or the word doctor or acceptance" ;;
          *) refuse "$flag $word: expected $flag=$word" ;;
        esac
        ;;
    esac
  done
}

# is_true FLAG: whether --FLAG, --FLAG=true or --FLAG=false is the first of these.
is_true() {
  case "${1#*=}" in
    "$1" | true) return 0 ;;
    false) return 1 ;;
    *) refuse "$1: expected ${1%%=*}, ${1%%=*}=true or ${1%%=*}=false" ;;
  esac
}

# split_flags WORD...: flags of `hvd-vgg launch` go to the array launch_flags, all others to train_flags; `dry_run` is true or
# false, and in neither. `what` is the command: train, or doctor or acceptance where that is among the words; `launcher` is what
# starts it, with launch_flags and then the words `started` behind it; `run_dir` is its default. Acceptance is a launcher itself.
# shellcheck disable=SC2034 # dry_run, run_dir and started are for the scripts that source this
split_flags() {
  launch_flags=() train_flags=() what=train dry_run=false
  check_words "$@"
  local flag
  for flag in "$@"; do
    case "$flag" in
      doctor | acceptance) what="$flag" ;;
      --ranks=* | --hostfile=* | --rsh_agent=* | --network=* | --export_env=* | --max_restarts=* | --grace_seconds=* | \
        --time_limit_seconds=* | --check_hosts | --check_hosts=* | --nocheck_hosts) launch_flags+=("$flag") ;;
      --dry_run | --dry_run=*) if is_true "$flag"; then dry_run=true; else dry_run=false; fi ;;
      *) train_flags+=("$flag") ;;
    esac
  done
  launcher=(hvd-vgg launch) started=("$what") run_dir=./runs/vgg16_imagenet
  if [ "$what" = train ]; then launcher+=(--max_restarts=20); fi # a later flag wins
  if [ "$what" = acceptance ]; then launcher=(hvd-vgg acceptance) started=() run_dir=./acceptance; fi
}

# show WORD...: prints a command so that it can be pasted into a shell.
show() {
  local word
  printf '+'
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf ' %s' "$word"; else printf ' %q' "$word"; fi
  done
  printf '\n'
}
