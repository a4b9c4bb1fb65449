"""Writes checkpoints in the background: training waits only for a copy of the variables."""

import contextlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from hvd_vgg.errors import NOT_WRITTEN, Failure
from hvd_vgg.parallel.consensus import run_on_all_ranks
from hvd_vgg.reporting import receipt
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

COPY_WAIT_SECONDS = 5.0  # so long, once, a save waits for the copy of the one before
Save = Tuple[checkpoint.Tensors, Dict[str, Any], Sequence[str]]


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread. A save that fails is no reason to stop, except for the last one.

    `event` logs each one as soon as it is whole. Rank 0 alone begins any; on the others there is nothing to wait for.
    copy: where a second copy of each is written, whether the first succeeds or not; `say` tells of a copy that fails. It
    has a thread of its own, which does not outlive the process: a disk that blocks keeps training from nothing.
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
        self.copying: Optional[threading.Thread] = None
        self.next_copy: Optional[Save] = None
        self.waited_for_copy = False  # in vain
        self.lock = threading.Lock()  # of these three
        self.written, self.seconds = 0, 0.0

    def begin(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: Sequence[str]) -> None:
        """Starts writing `tensors`, which nobody may change any more; call `wait` first."""
        self.saving = self.pool.submit(self._save, tensors, meta, best)

    def _save(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: Sequence[str]) -> None:
        try:
            self._save_first(tensors, meta, best)
        finally:
            if self.copy:
                self._begin_copy(self.copy, (tensors, meta, best))

    def _begin_copy(self, copy: RunDir, save: Save) -> None:
        """Writes a copy in a thread, now or after the current one; of those waiting, only the newest is written."""
        with self.lock:
            waiting, self.next_copy = self.next_copy, save
            if not (self.copying and self.copying.is_alive()):
                self.copying = threading.Thread(target=self._write_copies, args=[copy], name="copy", daemon=True)
                self.waited_for_copy = False
                try:
                    self.copying.start()
                except RuntimeError as error:  # no thread is left
                    self.copying = self.next_copy = None
                    self._copy_failed(copy, save, str(error))
            elif waiting:
                self._copy_failed(copy, waiting, "the one before is still being written")
            else:
                self.say(f"warning: {copy.checkpoints} is slow or blocks: its last copy is still being written")

    def _write_copies(self, copy: RunDir) -> None:
        while True:
            with self.lock:
                save, self.next_copy = self.next_copy, None
                if not save:
                    self.copying = None
                    return
            try:
                path = checkpoint.save(copy, save[0], save[1], self.keep, save[2])
                self.event("checkpoint_copy", step=save[1]["step"], file=str(path))
            except Failure as failure:
                self._copy_failed(copy, save, str(failure.__cause__ or failure))

    def _copy_failed(self, copy: RunDir, save: Save, reason: str) -> None:
        step = save[1]["step"]
        self.event("copy_failed", step=step, error=reason)
        self.say(f"warning: no copy of the checkpoint of step {step} in {copy.checkpoints}: {reason}")

    def _save_first(self, tensors: checkpoint.Tensors, meta: Dict[str, Any], best: Sequence[str]) -> None:
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

    def wait(self, copy_seconds: float = COPY_WAIT_SECONDS) -> Optional[Failure]:
        """Waits for the newest save, and returns as `failure` does; and so long for its copy, unless that was in vain."""
        if self.saving is not None:
            self.saving.exception()
        copying = self.copying
        if copying and not self.waited_for_copy:
            copying.join(copy_seconds)
            self.waited_for_copy = copying.is_alive()
        return self.failure()

    def wait_for_last(self, copy_seconds: float) -> None:
        """Waits for the newest save, which must succeed, and so long for its copy, which need not; raises Failure."""
        self.waited_for_copy = False
        failure = self.wait(copy_seconds)
        if self.copy and self.waited_for_copy:
            self.say(f"warning: {self.copy.checkpoints} blocks: the copy that is being written there is given up")
        if failure:
            raise failure

    def finish(self, copy_seconds: float) -> None:
        """Waits for the last save, as `wait_for_last`. Collective; raises a collective Failure(NOT_WRITTEN)."""
        run_on_all_ranks(lambda: self.wait_for_last(copy_seconds))
