"""What TensorBoard shows of a run: scalars, written without its package; with it also hyperparameters and images."""

import contextlib
import importlib.util
import os
import struct
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

import tensorflow as tf

from hvd_vgg.reporting.console import Console

FINAL = ("eval/acc@1", "eval/acc@5")  # the scalars by which runs are compared beside their hyperparameters


class Events:
    """A file of events that is being written. A full disk ends nothing: most of this is in dllogger.json too."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes a number, as tf.summary.scalar does, which is TensorBoard's and missing where that is."""
        self._write(name, tf.constant(value, tf.float32), step, _metadata("scalars"))

    def image(self, name: str, png: bytes, step: int, description: str) -> None:
        """Writes a PNG, as tf.summary.image does; description: Markdown."""
        # Width, then height, big-endian, in the first chunk of every PNG.
        width, height = struct.unpack(">II", png[16:24])
        self._write(name, tf.constant([str(width), str(height), png]), step, _metadata("images", description))

    def hyperparameters(self, flags: Mapping[str, Any]) -> None:
        """Writes the flags that decide a run's result, and FINAL, for TensorBoard's HParams; needs its package."""
        from tensorboard.plugins.hparams import api_pb2, summary

        values = {name: value if isinstance(value, (bool, int, float)) else _text(value) for name, value in flags.items()}
        kinds = {name: _kind(value) for name, value in values.items()}
        columns = [api_pb2.HParamInfo(name=name, type=api_pb2.DataType.Value(kind)) for name, kind in kinds.items()]
        metrics = [
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag.rpartition("/")[2]) for tag in FINAL
        ]
        self._write_all(summary.experiment_pb(columns, metrics))
        self._write_all(summary.session_start_pb(values))

    def ended(self) -> None:
        """Writes that the run is complete, for TensorBoard's HParams; needs its package."""
        from tensorboard.plugins.hparams import api_pb2, summary

        self._write_all(summary.session_end_pb(api_pb2.Status.Value("STATUS_SUCCESS")))

    def _write_all(self, summary: Any) -> None:
        for value in summary.value:  # all that matters of them is in their metadata
            self._write(value.tag, tf.constant([], tf.float32), 0, value.metadata)

    def _write(self, tag: str, tensor: Any, step: int, metadata: Any) -> None:
        with contextlib.suppress(tf.errors.OpError), self.writer.as_default():
            tf.summary.write(tag, tensor, step, metadata)
            self.writer.flush()


def open_events(folder: Path, console: Console) -> Optional[Events]:
    """Returns a new file of events in `folder`; None, which is reported, if that is unwritable."""
    try:
        # Of text TensorFlow makes UTF-8, whatever the locale.
        return Events(tf.summary.create_file_writer(os.fsencode(folder)))
    except tf.errors.OpError as error:
        reason = (error.message or "").splitlines()[0].split(";")[-1].strip()
        console.say(f"{folder} cannot be written ({reason}): no TensorBoard events this time")
        return None


def has_tensorboard() -> bool:
    """Returns whether TensorBoard's package is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def _metadata(plugin: str, description: str = "") -> Any:
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = plugin
    metadata.summary_description = description
    return metadata


def _kind(value: Any) -> str:
    """Returns TensorBoard's name of a value's type."""
    kinds: Dict[type, str] = {bool: "DATA_TYPE_BOOL", int: "DATA_TYPE_FLOAT64", float: "DATA_TYPE_FLOAT64"}
    return kinds.get(type(value), "DATA_TYPE_STRING")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
