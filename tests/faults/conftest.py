"""What the tests of faults share."""

import pytest
from oracles import assert_exact, start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, data):
    """The run that nothing happens to, on 2 ranks."""
    out = tmp_path_factory.mktemp("undisturbed")
    ended = start(out, data, 2).wait()
    assert ended.code == 0, ended.out + ended.err
    assert not (out / "run" / "faults").exists()
    assert_exact(out, 2, out)
    return out
