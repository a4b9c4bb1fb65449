#!/usr/bin/env bash
# VGG16 on ImageNet on all devices of this host, one rank each. Goes on where the run directory stands; deletes nothing.
#
#   DATA_DIR=./imagenet_tfrecord BATCH_SIZE=32 bash launch/run_train_vgg16_multigpu_imagenet.sh [--epochs=90] [--FLAG=VALUE ...]
#
# DATA_DIR       TFRecords (default: ./imagenet_tfrecord)
# BATCH_SIZE     images a device holds at once (default: 32); the batch of an update is --global_batch and stays the same
# HVD_VGG_RANKS  ranks, where not one for each device that TensorFlow sees (on a host without any: 1)
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment

if [ -n "${HVD_VGG_RANKS:-}" ]; then
  ranks="$HVD_VGG_RANKS"
  echo "ranks: $ranks (HVD_VGG_RANKS)"
else
  devices="$(count_devices)" || fail "python3 cannot import tensorflow: see above"
  ranks=$((devices > 0 ? devices : 1))
  echo "ranks: $ranks (TensorFlow sees $devices devices; CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-unset})"
fi
case "$ranks" in '' | *[!0-9]* | 0) fail "HVD_VGG_RANKS=$ranks: expected a number of ranks, 1 or more" ;; esac

# The later flag wins: what is on the command line overrides what is here.
run_ranks "$ranks" hvd-vgg train --flagfile="$clone/configs/vgg16_imagenet.flags" \
  --data_dir="${DATA_DIR:-./imagenet_tfrecord}" --run_dir=./runs/vgg16_imagenet --device_batch="${BATCH_SIZE:-32}" \
  --console="$(console)" "$@"
