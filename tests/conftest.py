"""Fixtures of all tests."""

from pathlib import Path
from typing import Optional, Sequence

import pytest
from support import Ended, Launch, Started, command_line, write_data


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs `hvd-vgg` on real ranks in an empty directory and returns how it ended."""

    def run(ranks: int, *arguments: str, program: Optional[Sequence[str]] = None, **environment: str) -> Ended:
        return Started(command_line(ranks, arguments, program), tmp_path, **environment).wait()

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 records to train on in 3 shards and 37 to evaluate in 2, of ten classes, 48 by 40 pixels."""
    return write_data(tmp_path_factory.mktemp("data"))
