#!/usr/bin/env bash
# VGG16 on ImageNet on the BI-V150 cards of this host, in a container of the image of Dockerfile's target corex. Such a card is
# two devices: 8 cards are 16 ranks. Prints one `docker run`, runs it, starts again what failed for no fault of its own.
#
#   DATA_DIR=./imagenet_tfrecord BATCH_SIZE=16 bash launch/docker_run_bi_v150.sh [--cards=N] [--dry_run] [--FLAG=VALUE ...]
#   bash launch/docker_run_bi_v150.sh doctor ...     the same ranks with the same flags look whether they can train
#   bash launch/docker_run_bi_v150.sh acceptance ...     try this host, or these, from end to end (docs/acceptance.md)
#
# --image=NAME      (default: hvd_vgg:corex)
# --cards=N         the first N cards, or
# --devices=N       the first N devices (default: all, by /dev/iluvatarN; of CUDA_VISIBLE_DEVICES=2,3 if that is set)
# --access=device   gives the container these devices and no privilege; runtime: through the vendor's docker runtime;
#                   privileged: the vendor's documented way, with all of the host's devices and rights. Try them in this order.
# --data_dir=DIR    TFRecords (default: DATA_DIR, else ./imagenet_tfrecord), mounted read-only
# --run_dir=DIR     (default: ./runs/vgg16_imagenet)
# --checkpoint_copy_dir=DIR, --metrics_file=FILE   as for `hvd-vgg train`; mounted too
# --flagfile=FILE   a file of flags of this host
# --shm_size=32g    limit of shared memory
# --docker=OPTION   one more option of docker run, such as --docker=--volume=/on/host:/inside:ro; as often as there are any
# --dry_run         only prints
# --gloo            starts ranks by `horovodrun --gloo`, for a Horovod without MPI: starts nothing again, makes 1 of any exit code
# --hostfile=FILE --ssh_dir=DIR   on several hosts: --worker --ssh_dir=DIR first on all but this one (docs/containers.md)
#
# All other flags are those of `hvd-vgg launch --help` and of `hvd-vgg train --help` or `hvd-vgg doctor --help`.
# Not yet tried on such cards.
set -euo pipefail
# shellcheck source=docker.sh
source "$(dirname "${BASH_SOURCE[0]}")/docker.sh"
docker_run hvd_vgg:corex 2 find_iluvatar "$@"
