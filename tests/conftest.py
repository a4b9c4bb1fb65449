"""Fixtures of all tests; tiers and the table of faults; which skips are allowed."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pytest
from faults.matrix import FAULTS, renew_rows, table
from support import ROOT, STARTED, Ended, Launch, Started, command_line, write_data

# What a machine may lack: a test may skip for these alone, with a reason that begins so.
ALLOWED_SKIPS = tuple(
    f"capability: {what}"
    for what in (
        "mounting a tmpfs",
        "network namespaces",
        "namespaces of host names",
        "another user",
        "memory cgroup",
        "pids cgroup",
        "making a locale",
        # What TensorFlow 2.6 lacks on CPUs.
        "convolutions in NCHW",
        "convolutions in bfloat16",
    )
)

_reports: List[Any] = []
_ids: Dict[str, Sequence[str]] = {}
_tiers: Dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of this project's tests."""
    parser.addoption("--tier", type=int, default=1, help="1: what every change must pass; 3: all")
    parser.addoption("--fault_table", metavar="FILE", help="write what came of each fault")
    parser.addoption("--fault", metavar="F01,...", help="run the tests of these faults alone, and renew their rows alone")


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Leaves out tests of higher tiers or other faults than asked for; notes which faults each test is for."""
    left_out, wanted = [], set((config.getoption("--fault") or "").split(",")) - {""}
    for item in items:
        marks = list(item.iter_markers("fault"))
        _ids[item.nodeid] = [each for mark in marks for each in mark.args]
        _tiers[item.nodeid] = max((mark.kwargs.get("tier", 1) for mark in marks), default=1)
        if _tiers[item.nodeid] > config.getoption("--tier") or (wanted and not wanted.intersection(_ids[item.nodeid])):
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how each phase of a test ended."""
    _reports.append(report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the seconds of each folder and of the slowest files."""
    for parts, most in ((2, 9), (3, 20)):
        seconds: Counter = Counter()
        for report in _reports:
            seconds["/".join(report.nodeid.split("::")[0].split("/")[:parts])] += report.duration
        line = ", ".join(f"{name} {value:.0f}" for name, value in seconds.most_common(most))
        terminalreporter.write_line(f"seconds: {line}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails for a skip that is not allowed; writes the table of faults."""
    reasons = [report.longrepr[2] for report in _reports if report.skipped and isinstance(report.longrepr, tuple)]
    foreign = [reason for reason in reasons if not reason.replace("Skipped: ", "").startswith(ALLOWED_SKIPS)]
    if foreign:
        print(f"\nskips that are not allowed: {foreign}")
        session.exitstatus = 1
    if session.config.getoption("--fault_table") and any("tests/faults/" in each for each in _ids):
        path, chosen = Path(session.config.getoption("--fault_table")), session.config.getoption("--fault")
        text = table(FAULTS, _reports, _ids, _tiers, session.config.getoption("--tier"))
        path.write_text(renew_rows(path.read_text(), text, chosen.split(",")) if chosen else text)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Ends what a test has started and did not wait for, such as one that failed."""
    yield
    while STARTED:
        started = STARTED.pop()
        if started.process.returncode is None:
            started.process.kill()
            started.process.wait()
            started.end()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs `hvd-vgg` on real ranks in an empty directory and returns how it ended: with `code`, where that is given."""

    def run(
        ranks: int,
        *arguments: str,
        program: Optional[Sequence[str]] = None,
        code: Optional[int] = None,
        **environment: str,
    ) -> Ended:
        return Started(command_line(ranks, arguments, program), tmp_path, **environment).wait(code=code)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 records to train on in 3 shards and 37 to evaluate in 2, of ten classes, 48 by 40 pixels."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 records to train on and 9 to evaluate, of three classes, in every layout (tests/reference/make_layouts.py)."""
    folder = tmp_path_factory.mktemp("layouts")
    with zipfile.ZipFile(ROOT / "tests" / "reference" / "layouts.zip") as archive:
        archive.extractall(folder)
    return folder
