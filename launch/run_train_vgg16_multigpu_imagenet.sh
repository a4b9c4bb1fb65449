#!/usr/bin/env bash
# VGG16 on ImageNet on all devices of this host, or of those in a host file, one rank each. Goes on where the run directory
# stands; deletes nothing; starts again what failed for no fault of its own.
#
#   DATA_DIR=./imagenet_tfrecord BATCH_SIZE=16 bash launch/run_train_vgg16_multigpu_imagenet.sh [--epochs=200] [--FLAG=VALUE ...]
#   bash launch/run_train_vgg16_multigpu_imagenet.sh doctor ...      the same ranks with the same flags look whether they can train
#   bash launch/run_train_vgg16_multigpu_imagenet.sh acceptance ...  try this host, or these, from end to end (docs/acceptance.md)
#
# DATA_DIR    TFRecords (default: ./imagenet_tfrecord)
# BATCH_SIZE  images a device holds at once (default: the config's); the batch of an update is --global_batch and stays the same
#
# All flags are --FLAG=VALUE: those of `hvd-vgg train --help` or `hvd-vgg doctor --help`, and of `hvd-vgg launch --help`, such as
# --hostfile=hosts.txt, --ranks=8, --dry_run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
split_flags "$@"
use_environment
if $dry_run; then launcher+=(--dry_run); fi

# The later flag wins: what is on the command line overrides what is here.
exec "${launcher[@]}" ${launch_flags[@]+"${launch_flags[@]}"} \
  ${started[@]+"${started[@]}"} --flagfile="$clone/configs/vgg16_imagenet.flags" \
  --data_dir="${DATA_DIR:-./imagenet_tfrecord}" --run_dir="$run_dir" \
  ${BATCH_SIZE:+"--device_batch=$BATCH_SIZE"} ${train_flags[@]+"${train_flags[@]}"}
