"""The second copy of each checkpoint, --checkpoint_copy_dir: opening it, and bringing back what the first directory lost.

It has the layout of a run directory: `checkpoints/` and a lock. All functions are for rank 0 alone.
"""

import shutil
from pathlib import Path
from typing import Optional

from hvd_vgg import storage
from hvd_vgg.errors import Failure
from hvd_vgg.run_dir import RunDir, lock_run_dir, write_error
from hvd_vgg.training import checkpoint
from hvd_vgg.training.reporter import Reporter


class CopyDir(RunDir):
    """A directory of copies, locked until this process ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
        RunDir(path).lock.touch()
        self.held = lock_run_dir(path, "--checkpoint_copy_dir")


def open_copy_dir(path: str, reporter: Reporter) -> Optional[RunDir]:
    """Returns the directory of copies, None without one; raises Failure(CONFIGURATION) where another job uses it.

    Where it cannot be written now, warns: the copies of later checkpoints may succeed.
    """
    if not path:
        return None
    try:
        return CopyDir(Path(path))
    except OSError as error:
        reason = write_error(Path(path), error)
    except Failure as failure:
        if isinstance(failure.__cause__, BlockingIOError):  # another job uses it
            raise
        reason = failure.message
    reporter.say(f"warning: no copies of checkpoints at present: {reason}")
    return RunDir(path)


def bring_back(found: checkpoint.Checkpoint, run_dir: RunDir, copy: RunDir, reporter: Reporter) -> checkpoint.Checkpoint:
    """Returns the checkpoint `found` as it is in `run_dir`, after it and the best one were written there from the copies."""
    reporter.say(f"{run_dir.checkpoints} holds no whole checkpoint as new as the copy {found.path}, which is used")
    reporter.event("checkpoint_copy_used", step=found.meta["step"], file=str(found.path))
    path = run_dir.checkpoint(found.meta["step"])
    try:
        _copy_file(found.path, path)
        for name in (checkpoint.BEST, checkpoint.BEST_AVERAGE):
            best = checkpoint.best(copy, name)
            if best is not None and checkpoint.best(run_dir, name) is None:
                own = run_dir.checkpoints / best.name
                if not own.exists():
                    checkpoint.load(best)  # raises if it is damaged
                    _copy_file(best, own)
                checkpoint.point_to_best(own, [name])
    except (OSError, ValueError, Failure) as error:
        reporter.say(f"warning: {run_dir.checkpoints} cannot be filled from the copies in {copy.checkpoints}: {error}")
    return found._replace(path=path) if path.exists() else found


def _copy_file(source: Path, path: Path) -> None:
    """Copies a checkpoint byte for byte, as the log has its digests; whole or not at all. Raises OSError."""
    temporary = path.with_suffix(".safetensors.tmp")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            storage.sync(file.fileno(), temporary)
        storage.replace(temporary, path)
        storage.sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
