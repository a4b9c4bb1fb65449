#!/usr/bin/env bash
# Prints the manifest of a training job, an MPIJob or a TrainJob, as one of doctor, under a name of its own: the same workers,
# ranks and flags, once.
#
#   bash launch/kubernetes/doctor.sh launch/kubernetes/mpijob-bi-v150.yaml [--FLAG=VALUE ...] | kubectl create -f -
#   kubectl logs -f job/vgg16-bi-v150-doctor-launcher     # of a TrainJob: -launcher-0
#
# Flags are those of `hvd-vgg doctor --help`, such as --collectives, and of `hvd-vgg launch --help`, such as --network=eth0.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
show_help "$@"
[ $# -gt 0 ] || fail "expected a manifest, such as launch/kubernetes/mpijob-bi-v150.yaml"
manifest="$1"
shift
[ -f "$manifest" ] || fail "$manifest: no such file"
split_flags "$@"
[ "$what" != acceptance ] || fail "acceptance starts the ranks itself: only doctor here"
expected=('^  name: ' '^    Launcher:$' '^      restartPolicy: ' '^    backoffLimit: ')
# What a pod does again is in its runtime, where doctor's exit code, 78, ends the job.
if grep -q '^kind: TrainJob$' "$manifest"; then expected=('^  name: ' '^    numNodes: '); fi
for line in "${expected[@]}" '^ *- train$' '^ *- --run_dir='; do
  grep -q -- "$line" "$manifest" || fail "$manifest: no line like \`$line\`, as the manifests of launch/kubernetes have it"
done

# as_list INDENTATION WORD...: words as items of a list in YAML.
as_list() {
  local word
  for word in "${@:2}"; do printf "%s- '%s'\n" "$1" "${word//\'/\'\'}"; done
}

role=""
while IFS= read -r line; do
  if [[ "$line" =~ ^\ *# ]]; then continue; fi # these tell of training
  case "$line" in
    '    Launcher:' | '    Worker:') role="$line" ;;
    '  name: '*) line+=-doctor ;;
    # A doctor that found something is not asked again, and its pod stays for its log.
    '    backoffLimit: '*) line='    backoffLimit: 0' ;;
    '      restartPolicy: '*) if [ "$role" = '    Launcher:' ]; then line='      restartPolicy: Never'; fi ;;
    *'- --max_restarts='*) continue ;;
    *'- train')
      as_list "${line%%-*}" ${launch_flags[@]+"${launch_flags[@]}"}
      line="${line%train}doctor"
      ;;
  esac
  printf '%s\n' "$line"
  if [[ "$line" = *'- --run_dir='* ]]; then as_list "${line%%-*}" ${train_flags[@]+"${train_flags[@]}"}; fi
done <"$manifest"
