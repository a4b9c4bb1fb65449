"""Time limits of the launcher's own waits, which a pause of the whole job does not use up."""

import time

# Between two looks at a deadline this much counts at most: whoever waits looks more often, unless it is stopped itself.
_MOST_SECONDS = 1.0


class Deadline:
    """A time limit that is looked at every fraction of a second.

    Where the launcher is stopped and continued together with what it waits for (Slurm's suspend, a paused virtual machine),
    the time in between is not counted.
    """

    def __init__(self, seconds: float) -> None:
        self._left, self._looked_at = seconds, time.monotonic()

    def passed(self) -> bool:
        """Returns whether the time is up."""
        now = time.monotonic()
        self._left -= min(now - self._looked_at, _MOST_SECONDS)
        self._looked_at = now
        return self._left <= 0
