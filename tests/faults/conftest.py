"""What the tests of faults share."""

import namespaces
import pytest
from oracles import assert_exact, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, data):
    """The run that nothing happens to, on 2 ranks."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(out, data, 2)
    assert not (out / "run" / "faults").exists()
    assert_exact(out, 2, out)
    return out


@pytest.fixture
def emulated_hosts(request, tmp_path):
    """Emulated hosts, 2 or as many as a test's parameter says; `flags`: the launcher's, to reach them, a slot each."""
    if namespaces.missing():
        pytest.skip(f"capability: network namespaces: {namespaces.missing()}")
    with namespaces.Hosts(getattr(request, "param", 2), tmp_path) as hosts:
        (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
        hosts.flags = [f"--hostfile={tmp_path / 'hosts'}", f"--rsh_agent={hosts.agent}"]
        yield hosts
