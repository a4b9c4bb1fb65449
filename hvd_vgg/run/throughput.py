"""Images per second of the job, and how they are counted.

Counted are the images consumed by updates over the wall time of those updates on rank 0, from one synchronisation of all
ranks to the next (a window: --log_every_steps updates). Left out are the first WARMUP_STEPS updates of each start (tracing,
first touch of memory, choice of convolutions), evaluation, and saving.
"""

import contextlib
import statistics
import time
from typing import Dict, Iterator, List, Tuple

WARMUP_STEPS = 2


class Throughput:
    """The windows measured so far, (images, seconds) each; begins with the first update."""

    def __init__(self) -> None:
        self.windows: List[Tuple[int, float]] = []
        self.mark = time.perf_counter()
        self.left_out = 0.0

    def close_window(self, images: int, counts: bool) -> float:
        """Ends a window in which `images` were consumed and returns its images/s; warm-up does not count."""
        now = time.perf_counter()
        seconds = now - self.mark - self.left_out
        if counts:
            self.windows.append((images, seconds))
        self.mark, self.left_out = now, 0.0
        return images / seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        began = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - began

    def summary(self) -> Dict[str, object]:
        """Returns `fps` over all windows, and the number, spread and extremes of the windows' own."""
        if not self.windows:
            return {"fps": None, "fps_windows": 0}
        each = [images / seconds for images, seconds in self.windows]
        return {
            "fps": sum(images for images, _ in self.windows) / sum(seconds for _, seconds in self.windows),
            "fps_windows": len(each),
            "fps_standard_deviation": statistics.pstdev(each),
            "fps_min": min(each),
            "fps_max": max(each),
        }
