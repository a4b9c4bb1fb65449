#!/usr/bin/env bash
# VGG16 on ImageNet on one device: the run of launch/run_train_vgg16_multigpu_imagenet.sh, at the speed of one.
#
#   DATA_DIR=./imagenet_tfrecord BATCH_SIZE=16 bash launch/run_train_vgg16_imagenet.sh [--epochs=200] [--FLAG=VALUE ...]
#   bash launch/run_train_vgg16_imagenet.sh doctor ...               it looks whether it can train
#
# DATA_DIR    TFRecords (default: ./imagenet_tfrecord)
# BATCH_SIZE  images a device holds at once (default: the config's); the batch of an update is --global_batch and stays the same
#
# Flags are those of `hvd-vgg train --help` or `hvd-vgg doctor --help`, and of `hvd-vgg launch --help`, such as --dry_run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
exec bash "$launch/run_train_vgg16_multigpu_imagenet.sh" --ranks=1 "$@"
