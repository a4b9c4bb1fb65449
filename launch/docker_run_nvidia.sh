#!/usr/bin/env bash
# VGG16 on ImageNet on the NVIDIA GPUs of this host, one rank each, in a container of the image of Dockerfile's target nvidia.
# Prints one `docker run`, runs it, starts again what failed for no fault of its own.
#
#   DATA_DIR=./imagenet_tfrecord BATCH_SIZE=16 bash launch/docker_run_nvidia.sh [--devices=N] [--dry_run] [--FLAG=VALUE ...]
#   bash launch/docker_run_nvidia.sh doctor ...     the same ranks with the same flags look whether they can train
#   bash launch/docker_run_nvidia.sh acceptance ...     try this host, or these, from end to end (docs/acceptance.md)
#
# --image=NAME      (default: hvd_vgg:nvidia)
# --devices=N       N of the GPUs (default: all, by nvidia-smi; of CUDA_VISIBLE_DEVICES=2,3 if that is set); docker needs NVIDIA's
#                   container toolkit
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
# Not yet tried on a GPU.
set -euo pipefail
# shellcheck source=docker.sh
source "$(dirname "${BASH_SOURCE[0]}")/docker.sh"
docker_run hvd_vgg:nvidia 1 find_nvidia "$@"
