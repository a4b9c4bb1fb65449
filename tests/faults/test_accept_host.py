"""`hvd-vgg acceptance` from end to end at toy size: accepted, refused, stopped."""

import json
import signal

import pytest
from support import LIMIT_SECONDS, Started, command_line, wait_for

TOY = [
    *("--num_classes=10", "--model=vgg11", "--width=0.125", "--image_size=32", "--global_batch=32", "--device_batch=8"),
    *("--updates=3", "--equal_steps=2", "--half_precision=none"),
]
SECRET = "".join(map(chr, range(97, 117)))


def start(tmp_path, *flags):
    """Starts an acceptance into tmp_path/accepted, with a secret in its environment."""
    words = command_line(0, ["acceptance", f"--run_dir={tmp_path / 'accepted'}", *TOY, *flags])
    return Started(words, tmp_path, REGISTRY_TOKEN=SECRET)


@pytest.mark.fault(tier=3)
def test_acceptance_of_this_host(tmp_path):
    """On 1 and 2 ranks: all stages end well, states are equal, and what is left is small and holds no secret."""
    ended = start(tmp_path, "--ranks=2").wait(2 * LIMIT_SECONDS, code=0)  # nine starts of TensorFlow
    folder = tmp_path / "accepted"
    results = json.loads((folder / "acceptance.json").read_text())
    assert results["verdict"] in ("ok", "warning")  # another job beside this one is a warning
    assert [stage["code"] for stage in results["stages"]] == [0] * 8
    found = {finding["about"]: finding for finding in results["findings"]}
    states = {json.loads(path.read_text())["state_sha256"] for path in folder.glob("runs/ranks-*/result.json")}
    assert len(states) == 1 and min(states)[:16] in found["equality"]["text"]
    assert "on 1 rank and 2 ranks, equal in every bit" in found["equality"]["text"]
    texts = [finding["text"] for finding in results["findings"] if finding["about"] == "collectives"]
    for exchanged in (
        "in float32 by mpi: correct",
        "in int32 by mpi: correct",
        "in int64 by mpi: correct",
        "dense layers by mpi",
    ):
        assert sum(exchanged in text for text in texts) == 1
    assert "MB written in" in found["checkpoint"]["text"] and found["published"]["text"].startswith("no figure is known")
    rows = json.loads((folder / "benchmark.float32.json").read_text())["rows"]
    assert [(row["ranks"], row["input"]) for row in rows] == [
        (ranks, kind) for ranks in (1, 2) for kind in ("device", "host", "real", "alone")
    ]
    page = (folder / "acceptance.txt").read_text()
    assert page.splitlines()[0].endswith(": ACCEPTED") and ended.out.endswith(page)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not list(folder.glob("work-*")) and sum(path.stat().st_size for path in files) < 3_000_000
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.fault(tier=3)
def test_acceptance_ends_where_doctor_fails(tmp_path):
    """With doctor's exit code; the results say so."""
    (tmp_path / "hosts").write_text("no-such-host.invalid slots=2\n")
    ended = start(tmp_path, f"--hostfile={tmp_path / 'hosts'}").wait(code=78)
    results = json.loads((tmp_path / "accepted" / "acceptance.json").read_text())
    assert [(stage["stage"], stage["code"]) for stage in results["stages"]] == [("data", 0), ("doctor", 78)]
    assert "NOT ACCEPTED" in ended.out and "cannot use no-such-host.invalid" in ended.out
    assert f"not accepted, see above; {tmp_path / 'accepted'} has the results" in ended.err
    again = start(tmp_path, "--ranks=1").wait(code=78)
    assert "is not empty: name a new directory for the results" in again.err


@pytest.mark.fault(tier=3)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_acceptance_that_is_stopped_says_so(tmp_path, number):
    """80; the ranks are gone, and so are the drawn pictures."""
    started = start(tmp_path, "--ranks=2", "--updates=100000")
    wait_for(lambda: "input         images/s" in started.out.read_text(), LIMIT_SECONDS)
    started.process.send_signal(number)
    ended = started.wait(code=80)
    assert "stopped on request" in ended.err
    folder = tmp_path / "accepted"
    assert not list(folder.glob("work-*")) and (folder / "doctor.json").exists()
    assert json.loads((folder / "acceptance.json").read_text())["stages"][-1]["stage"] == "benchmark-float32"


@pytest.mark.fault(tier=3)
def test_acceptance_that_is_killed_leaves_no_process(tmp_path):
    started = start(tmp_path, "--ranks=2", "--updates=100000")
    wait_for(lambda: "input         images/s" in started.out.read_text(), LIMIT_SECONDS)
    started.process.kill()
    wait_for(lambda: not started.alive(), 60)
