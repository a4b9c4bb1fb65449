#!/usr/bin/env bash
# VGG16 on ImageNet on one device: the run of launch/run_train_vgg16_multigpu_imagenet.sh, at the speed of one.
#
#   DATA_DIR=./imagenet_tfrecord BATCH_SIZE=32 bash launch/run_train_vgg16_imagenet.sh [--epochs=90] [--FLAG=VALUE ...]
#   bash launch/run_train_vgg16_imagenet.sh doctor ...               it looks whether it can train
#
# DATA_DIR    TFRecords (default: ./imagenet_tfrecord)
# BATCH_SIZE  images a device holds at once (default: 32); the batch of an update is --global_batch and stays the same
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_train_vgg16_multigpu_imagenet.sh" --ranks=1 "$@"
