"""Writes checkpoints in the background, on rank 0: training waits for a copy of the variables only."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.reporting import receipt
from hvd_vgg.training import checkpoint


class CheckpointWriter:
    """One checkpoint at a time, in a thread. A save that fails is no reason to stop, but for the last one.

    `event` logs each one that is whole, at once.
    """

    def __init__(self, run_dir: Path, keep: int, event: Callable[..., None]) -> None:
        self.run_dir, self.keep, self.event = run_dir, keep, event
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Optional[Future[None]] = None
        self.written, self.seconds = 0, 0.0

    def begin(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: bool) -> None:
        """Begins to write `tensors`, which nobody may change any more; call `wait` before."""
        self.saving = self.pool.submit(self._save, tensors, meta, best)

    def _save(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: bool) -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            receipt.sync(self.run_dir / "dllogger.json")  # a checkpoint of updates that no log knows cannot be proved
        path = checkpoint.save(self.run_dir, tensors, meta, self.keep, best)
        try:
            row = receipt.checkpoint_row(path)
        except (OSError, ValueError) as error:
            raise Failure(NOT_WRITTEN, f"the checkpoint {path} was written but cannot be read: {error}") from error
        self.event("checkpoint", step=meta["step"], **row)
        self.written, self.seconds = self.written + 1, self.seconds + time.monotonic() - began

    def failure(self) -> Optional[Failure]:
        """Returns why the save begun last has failed, once; None while it goes on, or when it is whole."""
        if self.saving is None or not self.saving.done():
            return None
        done, self.saving = self.saving, None
        error = done.exception()
        if error is None or isinstance(error, Failure):
            return error
        raise error

    def wait(self) -> Optional[Failure]:
        """Waits for the save begun last, and returns why it has failed; None when it is whole, or was told before."""
        if self.saving is not None:
            self.saving.exception()
        return self.failure()
