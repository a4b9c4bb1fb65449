"""Writes checkpoints in the background: training waits only for a copy of the variables."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Optional

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread. A save that fails is no reason to stop, except for the last one.

    `event` logs each one as soon as it is whole. Rank 0 alone begins any; on the others there is nothing to wait for.
    copy: where a second copy of each is written, whether the first succeeds or not; `say` tells of a copy that fails.
    """

    def __init__(
        self,
        run_dir: RunDir,
        keep: int,
        event: Callable[..., None],
        copy: Optional[RunDir] = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run_dir, self.keep, self.event, self.copy, self.say = run_dir, keep, event, copy, say
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Optional[Future[None]] = None
        self.written, self.seconds = 0, 0.0

    def begin(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: bool) -> None:
        """Starts writing `tensors`, which nobody may change any more; call `wait` first."""
        self.saving = self.pool.submit(self._save, tensors, meta, best)

    def _save(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: bool) -> None:
        try:
            self._save_first(tensors, meta, best)
        finally:
            if self.copy:
                self._save_copy(self.copy, tensors, meta, best)

    def _save_copy(self, copy: RunDir, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: bool) -> None:
        try:
            path = checkpoint.save(copy, tensors, meta, self.keep, best)
            self.event("checkpoint_copy", step=meta["step"], file=str(path))
        except Failure as failure:
            reason = str(failure.__cause__ or failure)
            self.event("copy_failed", step=meta["step"], error=reason)
            self.say(f"warning: no copy of the checkpoint of step {meta['step']} in {copy.checkpoints}: {reason}")

    def _save_first(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: bool) -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            receipt.sync(self.run_dir.log)  # a checkpoint of updates that are in no log cannot be verified
        path = checkpoint.save(self.run_dir, tensors, meta, self.keep, best)
        try:
            row = receipt.checkpoint_row(path)
        except (OSError, ValueError) as error:
            raise Failure(NOT_WRITTEN, f"the checkpoint {path} was written but cannot be read: {error}") from error
        seconds = time.monotonic() - began
        self.event("checkpoint", step=meta["step"], **row, seconds=seconds)
        self.written, self.seconds = self.written + 1, self.seconds + seconds

    def failure(self) -> Optional[Failure]:
        """Returns why the newest save has failed, once; None while it runs, or when it has succeeded."""
        if self.saving is None or not self.saving.done():
            return None
        done, self.saving = self.saving, None
        error = done.exception()
        if error is None or isinstance(error, Failure):
            return error
        raise error

    def wait(self) -> Optional[Failure]:
        """Waits for the newest save, and returns as `failure` does."""
        if self.saving is not None:
            self.saving.exception()
        return self.failure()

    def finish(self) -> None:
        """Waits for the newest save, which must succeed. Collective; raises a collective Failure(NOT_WRITTEN)."""

        def wait() -> None:
            failure = self.wait()
            if failure:
                raise failure

        run_on_all_ranks(wait)
