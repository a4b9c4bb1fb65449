"""The `report` command: one page, of one run or of several side by side. Needs no TensorFlow; changes nothing in a run."""

import functools
import string
import time
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple

from hvd_vgg.commands.history import History, read_history
from hvd_vgg.commands.runs import describe_run
from hvd_vgg.commands.same_run import compare_runs
from hvd_vgg.commands.verify import check
from hvd_vgg.config import ReportConfig
from hvd_vgg.errors import CONFIGURATION, NOT_WRITTEN, STOPPED, Failure
from hvd_vgg.pages.facts import DAMAGED, Facts, read_facts
from hvd_vgg.pages.figures import require_matplotlib
from hvd_vgg.pages.markup import write_page
from hvd_vgg.pages.mistakes import Sheet, read_sheet
from hvd_vgg.pages.report_page import Comparison, report_page
from hvd_vgg.run_dir import RunDir, check_out
from hvd_vgg.text import plural

_Histories = Callable[[str], History]  # by the letter of a run
# verify-run reads every checkpoint; beyond this many bytes the page only names the command.
_CHECKED_BYTES = 300_000_000
_PICTURES, _LEAST_PICTURES = 24, 4  # of errors: of all runs, and of each
_ENDINGS = 3  # renewals at which no run trains, after which --watch ends: the launcher may be restarting one


def report(config: ReportConfig) -> None:
    """Writes the page of --out; with --watch again and again until no run trains.

    Raises Failure(CONFIGURATION) where a directory is that of no run, or matplotlib is not installed, Failure(NOT_WRITTEN).
    """
    runs, out = [RunDir(each) for each in config.run_dirs], Path(config.out)
    for run in runs:
        if not any(path.exists() for path in (run.log, run.flags, run.receipt, run.result, run.restarts)):
            raise Failure(
                CONFIGURATION, f"{run.path} is not a run: expected a directory that `hvd-vgg train --run_dir=` made"
            )
    require_matplotlib()
    check_out(config.out, NOT_WRITTEN)  # now, not after the logs are read
    quiet = 0
    try:
        while config.watch and quiet < _ENDINGS:
            states = [row_of(run)[0] for run in runs]
            quiet = 0 if "training" in states else quiet + 1
            if quiet and all(state == "done" for state in states):
                break
            _write(runs, out, config.watch_seconds)
            time.sleep(config.watch_seconds)
    except KeyboardInterrupt as error:
        raise Failure(STOPPED, f"interrupted; {out} is as it was renewed last") from error
    _write(runs, out)
    print(f"{out}: {plural(len(runs), 'run')}, {out.stat().st_size / 1e6:.2f} MB")


def row_of(run: RunDir) -> Tuple[str, str]:
    """Returns state and reason of a run, as `hvd-vgg runs` has them."""
    if not run.log.is_file():
        return "unreadable", "there is no log"
    try:
        row = describe_run(run, run.path.parent, time.time())
    except DAMAGED as error:
        return "unreadable", f"the log is damaged, or not what a run writes ({type(error).__name__}: {error})"
    return row.state, row.reason


def _write(runs: Sequence[RunDir], out: Path, refresh_seconds: float = 0) -> None:
    write_page(out, make_page(runs, time.time(), refresh_seconds))


def make_page(runs: Sequence[RunDir], now: float, refresh_seconds: float = 0) -> str:
    """Returns the page of some runs, whatever their files are like. refresh_seconds: of a page that will be made again.

    Such a page is made without the checks of verify-run, without a comparison of weights, and without pictures.
    """
    letters = [_letter(number) for number in range(len(runs))] if len(runs) > 1 else [""]
    facts = [read_facts(run, letter, *row_of(run)) for run, letter in zip(runs, letters)]
    logs = {each.letter: each.lines for each in facts}
    histories = functools.lru_cache(maxsize=None)(lambda letter: read_history(logs[letter]))  # each log is replayed once
    checks = [_checks(each, histories, bool(refresh_seconds)) for each in facts]
    comparisons = [_compare((facts[0], each), histories, bool(refresh_seconds)) for each in facts[1:]]
    return report_page(facts, checks, _sheets(facts, bool(refresh_seconds)), comparisons, now, refresh_seconds)


def _letter(number: int) -> str:
    """Returns A to Z, then A2 to Z2, ..."""
    again, index = divmod(number, 26)
    return string.ascii_uppercase[index] + (str(again + 1) if again else "")


def _checks(facts: Facts, histories: _Histories, again: bool) -> Any:
    """Returns what verify-run finds without the data, or why it was not asked."""
    if again:
        return "runs when the training has ended"
    if not facts.lines:
        return "not run: there is no log"
    size = _checkpoint_bytes(facts.run)
    if size > _CHECKED_BYTES:
        return f"not run: it reads {size / 1e9:.1f} GB of checkpoints"
    try:
        return list(check(facts.run.path, histories(facts.letter)))
    except DAMAGED as error:
        return f"it failed: {type(error).__name__}: {error}"


def _sheets(runs: Sequence[Facts], again: bool) -> List[Sheet]:
    """Returns the pictures of each run's errors, of several runs fewer each; none, and no data read, for a page to come."""
    if again:
        return [Sheet({}, "Pictures are drawn when the run has ended.")] * len(runs)
    return [read_sheet(each, max(_LEAST_PICTURES, _PICTURES // len(runs))) for each in runs]


def _checkpoint_bytes(run: RunDir) -> int:
    try:
        return sum(path.stat().st_size for path in run.list_checkpoints())
    except (OSError, Failure):
        return 0


def _compare(pair: Tuple[Facts, Facts], histories: _Histories, again: bool) -> Comparison:
    """Returns where two runs part, of their logs alone where their checkpoints are large."""
    first, other = pair
    letters = (first.letter, other.letter)
    faults: List[str] = []
    weights = not again and _checkpoint_bytes(first.run) + _checkpoint_bytes(other.run) <= _CHECKED_BYTES
    try:
        findings = compare_runs(first.run, other.run, weights, [histories(letter) for letter in letters])
        while True:
            faults.append(next(findings))
    except StopIteration as done:
        return Comparison(letters, faults, f"{done.value[1]}{'' if weights else ' (checkpoints were not compared)'}")
    except DAMAGED as error:
        text = f"they cannot be compared: one is damaged, or has no start ({type(error).__name__}: {error})"
        return Comparison(letters, [*faults, text], "")
