# shellcheck shell=bash
# What launch/docker_run_*.sh share; sourced by them. Composes one `docker run`, prints it, runs it.
#
#   docker_run IMAGE DEVICES_ON_A_CARD FIND FLAG...
#
# FIND is one of the functions below: it reads access and devices, sets devices where it is empty, and device_words.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# choose_devices THERE: sets `numbers` to the devices to take, counted from 0 among those of the host, and `devices` to how many.
# They are the first ones: of CUDA_VISIBLE_DEVICES where the host's user or scheduler has set it, else of all.
choose_devices() {
  local there="$1" told="CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}" number
  if $masked; then
    [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "$told: expected numbers of devices, such as 0,1; unset it to have all"
    [ -z "$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | sort | uniq -d)" ] || fail "$told names a device twice"
    IFS=, read -ra numbers <<<"$CUDA_VISIBLE_DEVICES"
    devices="${devices:-${#numbers[@]}}"
    [ "$devices" -le "${#numbers[@]}" ] ||
      fail "$devices devices asked for; $told leaves ${#numbers[@]}: ask for no more, or unset it"
    numbers=("${numbers[@]:0:devices}")
  else
    devices="${devices:-$there}"
    for ((number = 0; number < devices; number++)); do numbers+=("$number"); done
  fi
  [ "$devices" -gt 0 ] || fail "this host shows no device: is the driver loaded? (--devices=N --dry_run prints the command for N)"
  if $dry_run; then return; fi
  [ "$devices" -le "$there" ] || fail "$devices devices asked for; this host shows $there"
  for number in "${numbers[@]}"; do
    [ "$number" -lt "$there" ] || fail "$told: this host shows $there, counted from 0"
  done
}

list() { (IFS=, && printf '%s' "$*"); }

# Iluvatar: a node /dev/iluvatarN for each device, and of drivers since 4.4.0 one to control them all. That devices are counted
# as their nodes are is assumed (docs/iluvatar.md, section 4, has a check).
find_iluvatar() {
  local nodes=() number
  for number in /dev/iluvatar[0-9]*; do
    [ -e "$number" ] && nodes+=("${number#/dev/iluvatar}")
  done
  if [ "${#nodes[@]}" -gt 0 ]; then mapfile -t nodes < <(printf '%s\n' "${nodes[@]}" | sort -n); fi
  choose_devices "${#nodes[@]}"
  case "$access" in
    device)
      for number in "${numbers[@]}"; do
        device_words+=("--device=/dev/iluvatar${nodes[number]:-$number}") # one that is not there is only printed
      done
      if [ -e /dev/itrctl ]; then device_words+=(--device=/dev/itrctl); fi
      ;;
    runtime)
      device_words=(--runtime=iluvatar "--env=IX_VISIBLE_DEVICES=$(list "${numbers[@]}")")
      ;;
    privileged)
      # All devices are there then: the ranks take the first ones, or those that they are told of.
      device_words=(--privileged --cap-add=ALL --pid=host --volume=/usr/src:/usr/src --volume=/lib/modules:/lib/modules --volume=/dev:/dev)
      if $masked; then
        if [ -n "$hostfile" ] || $worker; then
          fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES cannot be kept with --access=privileged on several hosts, whose ranks would all get it: unset it"
        fi
        device_words+=("--env=CUDA_VISIBLE_DEVICES=$(list "${numbers[@]}")")
      fi
      ;;
    *) fail "--access=$access: expected device, runtime or privileged" ;;
  esac
}

# docker counts as nvidia-smi does; CUDA_VISIBLE_DEVICES does so where the GPUs are alike, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
find_nvidia() {
  [ "$access" = device ] || fail "--access=$access: expected device"
  choose_devices "$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)"
  device_words=("--gpus=$devices")
  # docker takes this for a line of a table, hence quotation marks of its own.
  if $masked; then device_words=("--gpus=\"device=$(list "${numbers[@]}")\""); fi
}

# absolute PATH: what docker mounts it by, links followed.
absolute() {
  local found
  found="$(realpath -m -- "$1")"
  case "$found" in *[,\"]*) fail "$found: docker cannot mount a path with a comma or a quotation mark in it" ;; esac
  printf '%s' "$found"
}

# existing PATH: the same, of what must be there.
existing() {
  [ -e "$1" ] || fail "$1: no such file or directory"
  absolute "$1"
}

# Names of variables that change how training runs, without those that say which devices there are; docker takes their values from the
# environment, so that none is on a command line.
passed_variables() {
  compgen -e | grep -E '^(HOROVOD|TF|NCCL|UCX|GLOO|UMD|CRT|DRT)_' | grep -Eiv 'token|key|secret|pass|cred' || true
}

# sshd and ssh ask who the user is that a container runs as.
write_passwd() {
  printf 'root:x:0:0::/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n' >"$1"
  if [ "$(id -u)" != 0 ]; then printf 'hvd:x:%s:%s::/tmp:/bin/bash\n' "$(id -u)" "$(id -g)" >>"$1"; fi
}

docker_run() {
  local image="$1" devices_per_card="$2" find="$3"
  shift 3
  show_help "$@"
  check_words "$@"
  local access=device cards="" devices="" numbers=() device_words=() masked=false gloo=false
  local hostfile="" ssh_dir="" network="" worker=false
  local data="${DATA_DIR:-./imagenet_tfrecord}" own_run_dir="" copies="" metrics="" shm_size=32g flag flagfiles=() options=() rest=()
  for flag in "$@"; do
    # A shell leaves ~ in --run_dir=~/x, and realpath would take it for a directory of that name.
    case "$flag" in
      --data_dir=\~/* | --run_dir=\~/* | --flagfile=\~/* | --hostfile=\~/* | --ssh_dir=\~/*)
        flag="${flag%%=*}=$HOME/${flag#*=\~/}"
        ;;
    esac
    case "${flag%%=*}" in
      --checkpoint_copy_dir | --metrics_file | --image | --devices | --cards | --access | --shm_size | --data_dir | --run_dir | --flagfile | --hostfile | --ssh_dir | --network | --docker)
        [[ "$flag" = *=?* ]] || refuse "$flag: expected ${flag%%=*}=VALUE"
        ;;
    esac
    case "$flag" in
      --image=*) image="${flag#*=}" ;;
      --devices=*) devices="${flag#*=}" ;;
      --cards=*) cards="${flag#*=}" ;;
      --access=*) access="${flag#*=}" ;;
      --shm_size=*) shm_size="${flag#*=}" ;;
      --data_dir=*) data="${flag#*=}" ;;
      --run_dir=*) own_run_dir="${flag#*=}" ;;
      --flagfile=*) flagfiles+=("${flag#*=}") ;;
      --checkpoint_copy_dir=*) copies="${flag#*=}" ;;
      --metrics_file=*) metrics="${flag#*=}" ;;
      --hostfile=*) hostfile="${flag#*=}" ;;
      --ssh_dir=*) ssh_dir="${flag#*=}" ;;
      --worker | --worker=*) if is_true "$flag"; then worker=true; else worker=false; fi ;;
      --gloo | --gloo=*) if is_true "$flag"; then gloo=true; else gloo=false; fi ;;
      --docker=*) options+=("${flag#*=}") ;;
      --ranks=*) fail "--ranks: there is one for each device; give --devices=N or --cards=N" ;;
      --rsh_agent=*) fail "--rsh_agent: not in a container; hosts are reached through --ssh_dir" ;;
      --network=*) network="${flag#*=}" rest+=("$flag") ;;
      *) rest+=("$flag") ;;
    esac
  done
  if [ -n "$network" ] && [ -z "$hostfile" ] && ! $worker; then
    fail "--network=$network: between hosts, where --hostfile is given; on one host a container has a network of its own"
  fi
  local what launcher started run_dir dry_run
  split_flags ${rest[@]+"${rest[@]}"}
  run_dir="${own_run_dir:-$run_dir}"
  if $gloo; then
    if $worker || [ -n "$hostfile${launch_flags[*]-}" ]; then
      fail "--gloo: horovodrun starts the ranks of one host, without the flags of hvd-vgg launch"
    fi
  fi

  if [ -n "$cards" ]; then
    [[ "$cards" =~ ^[1-9][0-9]*$ && -z "$devices" ]] || fail "--cards=$cards: expected a number of 1 or more, and no --devices"
    devices=$((cards * devices_per_card))
  fi
  [[ "$devices" =~ ^([1-9][0-9]*)?$ ]] || fail "--devices=$devices: expected a number of 1 or more"
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then masked=true; fi
  "$find"
  echo "$devices device(s), one rank each; devices on a card: $devices_per_card"
  if $masked; then echo "by CUDA_VISIBLE_DEVICES: $(list "${numbers[@]}") of this host"; fi

  local data_at run_at command train
  [ -e "$data" ] || fail "$data: no such file or directory; give the TFRecords' by --data_dir=DIR or DATA_DIR"
  data_at="$(absolute "$data")" || exit
  if ! $dry_run; then mkdir -p -- "$run_dir"; fi
  run_at="$(absolute "$run_dir")" || exit
  local inside
  inside="/runs/$(basename -- "$run_at")"

  # --init: something must bury processes that nobody waits for. Stopped, ranks get the minute that they have elsewhere.
  command=(docker run --rm --init --stop-timeout=90 "--user=$(id -u):$(id -g)" --env=HOME=/tmp
    "--shm-size=$shm_size" --ulimit=memlock=-1 "${device_words[@]}")
  if [ "$(id -u)" = 0 ]; then command+=(--env=OMPI_ALLOW_RUN_AS_ROOT=1 --env=OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1); fi
  if [ "$access" != privileged ]; then command+=(--cap-drop=ALL --security-opt=no-new-privileges); fi
  command+=("--mount=type=bind,source=$data_at,target=/data,readonly" "--mount=type=bind,source=$run_at,target=$inside")
  local outputs=() path
  if [ -n "$copies" ]; then
    if ! $dry_run; then mkdir -p -- "$copies"; fi
    path="$(absolute "$copies")" || exit
    command+=("--mount=type=bind,source=$path,target=/copies")
    outputs+=(--checkpoint_copy_dir=/copies)
  fi
  if [ -n "$metrics" ]; then
    path="$(existing "$(dirname -- "$metrics")")" || exit
    command+=("--mount=type=bind,source=$path,target=/metrics")
    outputs+=("--metrics_file=/metrics/$(basename -- "$metrics")")
  fi
  for flag in $(passed_variables); do
    command+=("--env=$flag")
  done

  if [ -n "$hostfile" ] || $worker; then
    local keys
    [ -n "$ssh_dir" ] || fail "several hosts need --ssh_dir=DIR, the same on each: mkdir -m 700 DIR && ssh-keygen -q -t ed25519 -N '' -f DIR/id_rsa && cp DIR/id_rsa.pub DIR/authorized_keys"
    keys="$(existing "$ssh_dir")" || exit
    if ! $dry_run; then write_passwd "$keys/passwd"; fi
    command+=(--network=host "--mount=type=bind,source=$keys,target=/etc/hvd-vgg/ssh,readonly"
      "--mount=type=bind,source=$keys/passwd,target=/etc/passwd,readonly")
  fi
  command+=(${options[@]+"${options[@]}"})
  if $worker; then
    [ "$what" = train ] || fail "$what: only where --hostfile is given; a worker waits for all commands alike"
    # Another user's sshd needs no right at all; root's gives up its rights in a corner of its own.
    if [ "$(id -u)" = 0 ] && [ "$access" != privileged ]; then command+=(--cap-add=SETUID --cap-add=SETGID --cap-add=SYS_CHROOT); fi
    command+=(--entrypoint=/usr/sbin/sshd "$image" -D -e -f /etc/hvd-vgg/sshd_config)
  else
    train=(--flagfile=/opt/hvd_vgg/configs/vgg16_imagenet.flags --data_dir=/data "--run_dir=$inside" ${BATCH_SIZE:+"--device_batch=$BATCH_SIZE"})
    train+=(${outputs[@]+"${outputs[@]}"})
    local number=0
    for flag in ${flagfiles[@]+"${flagfiles[@]}"}; do
      path="$(existing "$flag")" || exit
      command+=("--mount=type=bind,source=$path,target=/etc/hvd-vgg/flags.$number,readonly")
      train+=("--flagfile=/etc/hvd-vgg/flags.$number")
      number=$((number + 1))
    done
    if $gloo && [ "$what" = acceptance ]; then
      command+=("$image" acceptance --gloo "--ranks=$devices")
    elif $gloo; then
      command+=(--entrypoint=horovodrun "$image" --gloo -np "$devices" hvd-vgg)
    else
      if [ -n "$hostfile" ]; then
        path="$(existing "$hostfile")" || exit
        command+=("--mount=type=bind,source=$path,target=/etc/hvd-vgg/hosts,readonly")
        launcher+=(--hostfile=/etc/hvd-vgg/hosts --rsh_agent=hvd-vgg-ssh)
      else
        launcher+=("--ranks=$devices")
      fi
      # The image's entry point is hvd-vgg.
      command+=("$image" "${launcher[@]:1}" ${launch_flags[@]+"${launch_flags[@]}"})
    fi
    command+=(${started[@]+"${started[@]}"} "${train[@]}" ${train_flags[@]+"${train_flags[@]}"})
  fi

  show "${command[@]}"
  if $dry_run; then return; fi
  command -v docker >/dev/null || fail "docker is not on PATH"
  exec "${command[@]}"
}
