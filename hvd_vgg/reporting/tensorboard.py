"""Scalars for TensorBoard, written without its package."""

import contextlib
import os
from pathlib import Path
from typing import Callable, Optional

import tensorflow as tf

from hvd_vgg.reporting.console import Console


def open_scalars(folder: Path, console: Console) -> Optional[Callable[[str, float, int], None]]:
    """Returns a function (name, value, step) that writes an event; None, which is reported, if `folder` is unwritable."""
    try:
        writer = tf.summary.create_file_writer(os.fsencode(folder))  # of text TensorFlow makes UTF-8, whatever the locale
    except tf.errors.OpError as error:
        reason = (error.message or "").splitlines()[0].split(";")[-1].strip()
        console.say(f"{folder} cannot be written ({reason}): no TensorBoard events this time")
        return None
    # What tf.summary.scalar writes. That function is TensorBoard's, and is missing where TensorBoard is.
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "scalars"

    def scalar(name: str, value: float, step: int) -> None:
        # All of this is in dllogger.json too: a full disk is no reason to stop.
        with contextlib.suppress(tf.errors.OpError), writer.as_default():
            tf.summary.write(name, tf.constant(value, tf.float32), step, metadata)
            writer.flush()

    return scalar
