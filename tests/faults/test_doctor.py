"""`hvd-vgg doctor` itself: alone, on ranks, and what is broken on purpose; two emulated hosts (F32, F33, F34).

Emulated hosts are network namespaces of this machine with a link between them.
"""

import json
import os
import subprocess
import sys

import namespaces
import pytest
from support import ROOT, Started, changed, command_line, example, picture, write_shard

from hvd_vgg.reporting.findings import FAILURE, WARNING

SMALL = ["--num_classes=10", "--model=vgg11", "--width=0.125", "--image_size=32", "--global_batch=32"]


def flags(data, tmp_path, *more):
    """Returns a command line's arguments; the report goes to tmp_path/out.json."""
    return ["doctor", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out.json'}", *SMALL, *more]


def report(tmp_path):
    """Returns the JSON report, and its findings by what they are about."""
    told = json.loads((tmp_path / "out.json").read_text())
    found = {}
    for finding in told["findings"]:
        found.setdefault(finding["about"], []).append(finding)
    return told, found


def test_a_host_that_is_right(launch, data, tmp_path):
    before = sorted(data.iterdir())
    ended = launch(0, *flags(data, tmp_path))
    assert ended.code == 0, ended.out + ended.err
    told, found = report(tmp_path)
    assert told["counts"]["failure"] == 0
    assert {"vendor", "python", "packages", "tensorflow", "horovod", "mpi", "memory", "shm", "limits", "run_dir"} <= set(
        found
    )
    assert {"interfaces", "devices", "data", "flags", "ranks"} <= set(found)
    assert "clocks" not in found  # one rank has none to compare with
    texts = [finding["text"] for finding in found["data"]]
    assert texts[:3] == ["train: 75 records in 3 shards", "validation: 37 records in 2 shards", texts[2]]
    assert texts[2] == "labels 1..10, 10 different; the first class is 1"
    assert "ok       data         train: 75 records in 3 shards" in ended.out
    assert not (tmp_path / "run").exists()
    assert sorted(data.iterdir()) == before  # it looks; it keeps nothing


def test_two_ranks_say_what_is_equal_once_and_exchange_right(launch, data, tmp_path):
    ended = launch(2, *flags(data, tmp_path, "--collectives", "--lr_schedule=constant"))
    assert ended.code == 0, ended.out + ended.err
    told, found = report(tmp_path)
    assert ended.out.count(" python ") == 1
    assert all(finding["ranks"] == [0, 1] for finding in found["devices"] + found["flags"] + found["collectives"])
    assert "lr_schedule=constant keeps" in found["flags"][-1]["text"]
    sums, gathers = (finding["text"] for finding in found["collectives"])
    assert "sums of gradients of vgg11 by mpi: right;" in sums
    assert "gathers of the rows of its dense layers by mpi: right;" in gathers
    assert "by mpi a number is summed in" in found["link"][0]["text"]
    assert len(told["hosts"]) == 2


def test_a_sum_that_is_wrong_is_found(launch, tmp_path, data):
    """Rank 1 sends one number that is off by one in the last kernel."""
    program = changed("""
        from hvd_vgg.parallel import comm, conformance
        right = conformance.pattern
        def wrong(numbers, rank):
            values = right(numbers, rank)
            if numbers == 512 * 10 and comm.rank() == rank == 1: values[7] += 1
            return values
        conformance.pattern = wrong
    """)
    ended = launch(2, *flags(data, tmp_path, "--collectives"), program=program)
    assert ended.code == 78, ended.out + ended.err
    (bad,) = [finding for finding in report(tmp_path)[1]["collectives"] if finding["verdict"] == FAILURE]
    assert "sums of gradients of vgg11 by mpi: wrong: predictions/kernel" in bad["text"]


@pytest.mark.fault("F24", "F25", "F27")
def test_every_bad_record_is_named_by_full(launch, tmp_path):
    """Training stops at the first one; doctor lists them."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [example(picture(i, i % 10 + 1), i % 10 + 1) for i in range(40)]
    rows[3], rows[31] = example(b"no image", 4), example(picture(1, 1)[:300], 2)
    write_shard(data / "train-00000-of-00002", rows[:20])
    write_shard(data / "train-00001-of-00002", rows[20:])
    write_shard(data / "validation-00000-of-00001", rows[5:15])
    path = data / "validation-00000-of-00001"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    ended = launch(2, *flags(data, tmp_path, "--full"))
    assert ended.code == 78, ended.out + ended.err
    bad = {finding["text"]: finding["ranks"] for finding in report(tmp_path)[1]["data"] if finding["verdict"] == FAILURE}
    assert len(bad) == 3
    for part, ranks in (
        ("train-00000-of-00002, record 3,", [0]),
        ("train-00001-of-00002, record 11,", [1]),
        ("validation-00000-of-00001, record 9,", [1]),
    ):
        assert [found for text, found in bad.items() if part in text] == [ranks], bad


@pytest.mark.fault("F24")
@pytest.mark.parametrize("full", ["--full", "--nofull"])
def test_shards_that_cannot_be_read_are_named_and_the_others_judged(launch, tmp_path, full):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        rows = [example(picture(i, i % 10 + 1), i % 10 + 1) for i in range(10 * number, 10 * number + 10)]
        write_shard(data / f"train-0000{number}-of-00004", rows)
        write_shard(data / f"validation-0000{number}-of-00004", rows)
    (data / "train-00001-of-00004").write_bytes((data / "train-00001-of-00004").read_bytes()[:-5])
    (data / "train-00002-of-00004").write_bytes(b"no record, but as long as a header")
    ended = launch(2, *flags(data, tmp_path, full))
    assert ended.code == 78, ended.out + ended.err
    told = report(tmp_path)[1]["data"]
    bad = [finding["text"] for finding in told if finding["verdict"] == FAILURE]
    assert len(bad) == 2, bad
    assert all(any(f"train-0000{number}-of-00004" in text for text in bad) for number in (1, 2))
    fine = [finding["text"] for finding in told if finding["verdict"] != FAILURE]
    assert "train: 20 records in 4 shards, without 2 that cannot be read (see the failures)" in fine
    assert "validation: 40 records in 4 shards" in fine
    assert any(text.startswith("labels 1..10, 10 different") for text in fine)


def test_everything_that_is_wrong_is_in_one_report(launch, data, tmp_path):
    (tmp_path / "file").touch()
    arguments = flags(
        tmp_path / "nowhere", tmp_path, f"--run_dir={tmp_path / 'file'}", "--num_classes=3", "--steps=5", "--epochs=2"
    )
    ended = launch(0, *arguments, UMD_WAITAFTERLAUNCH="1", IX_NUM_CUDA_VISIBLE_DEVICES="2")
    assert ended.code == 78, ended.out + ended.err
    told, found = report(tmp_path)
    assert [finding["about"] for finding in told["findings"] if finding["verdict"] == FAILURE] == ["run_dir", "data", "data"]
    assert {finding["text"].split("=")[0] for finding in found["environment"]} == {
        "UMD_WAITAFTERLAUNCH",
        "IX_NUM_CUDA_VISIBLE_DEVICES",
    }
    assert "--epochs=2 has no effect beside --steps=5" in found["flags"][0]["text"]
    assert all(finding["fix"] for finding in told["findings"] if finding["verdict"] in (FAILURE, WARNING))
    assert "hvd-vgg: doctor: 3 failures, see above" in ended.err


def test_labels_beyond_the_classes_are_a_failure(launch, data, tmp_path):
    ended = launch(0, *flags(data, tmp_path, "--num_classes=3"))
    assert ended.code == 78, ended.out + ended.err
    assert "labels 1..10, 10 different; the first class is 1; 4 is none of --num_classes=3" in ended.out


@pytest.mark.fault("F02", "F32")
def test_one_ranks_failure_is_named_with_rank_and_host(tmp_path, data):
    """Rank 1 has another variable and flag, and a copy of the data with more bytes."""
    (tmp_path / "other").mkdir()
    for path in data.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes() + (b"x" if "train-00001" in path.name else b""))
    first = command_line(1, flags(data, tmp_path))
    second = [
        "-np",
        "1",
        "env",
        "TF_XLA_FLAGS=--tf_xla_auto_jit=0",
        sys.executable,
        "-m",
        "hvd_vgg",
        *flags(tmp_path / "other", tmp_path, "--lr=0.5"),
    ]
    ended = Started([*first, ":", *second], tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    name = os.uname().nodename
    assert f"failure  software     rank 1 (host {name}): TF_XLA_FLAGS is --tf_xla_auto_jit=0; on rank 0 not set" in ended.out
    assert f"failure  software     rank 1 (host {name}): --lr is 0.5; on rank 0 0.01" in ended.out
    assert f"failure  data         rank 1 (host {name}): " in ended.out
    assert "train shards are not those of rank 0: train-00001-of-00003" in ended.out


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.fault("F02")
def test_an_installation_that_is_broken_is_told(tmp_path, data, rank):
    """TensorFlow cannot be imported, on all ranks or on one that the others wait for."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "tensorflow.py").write_text("raise TypeError('Descriptors cannot be created directly')\n")
    shadowed = f"PYTHONPATH={tmp_path / 'shadow'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    program = ["env", shadowed, sys.executable, "-m", "hvd_vgg"]
    line = command_line(2, flags(data, tmp_path), program)
    if rank == 1:
        one = flags(data, tmp_path, "--join_seconds=60")
        line = [*command_line(1, one), ":", "-np", "1", *program, *one]
    ended = Started(line, tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    text = ended.out + ended.err
    assert "TypeError: Descriptors cannot be created directly" in text
    assert "Traceback" not in text


@pytest.mark.fault("F08")
def test_ranks_that_do_not_meet_end_with_their_interfaces(tmp_path, data):
    """Rank 1 sleeps instead of joining."""
    one = flags(data, tmp_path, "--join_seconds=2")
    sleeper = ["-np", "1", sys.executable, "-c", "import time; time.sleep(600)"]
    ended = Started([*command_line(1, one), ":", *sleeper], tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    (bad,) = [finding for finding in report(tmp_path)[1]["ranks"] if finding["verdict"] == FAILURE]
    assert "the ranks have not met within 2 s (--join_seconds); interfaces here: lo 127.0.0.1" in bad["text"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_device_that_cannot_be_begun_with_ends_all_and_is_named(launch, tmp_path, data, rank):
    """As errors 801 and 803 do; raised here in TensorFlow's place on one rank, while the other waits."""
    program = changed(f"""
        import tensorflow as tf
        from hvd_vgg.run.health import launched_rank
        def broken(kind):
            raise tf.errors.InternalError(None, None, 'cudaSetDevice() on GPU:0 failed. Status: 803')
        if launched_rank() == {rank}:
            tf.config.list_logical_devices = broken
    """)
    ended = launch(2, *flags(data, tmp_path), program=program)
    assert ended.code == 78, ended.out + ended.err
    text = ended.out + ended.err
    assert "cannot begin to use them: cudaSetDevice() on GPU:0 failed. Status: 803" in text
    assert f"rank {rank}: doctor" in ended.err
    assert "Traceback" not in text


def test_a_precision_that_the_cpu_lacks_is_a_finding(launch, tmp_path, data):
    """As bfloat16 under TensorFlow 2.6; said here of this one."""
    program = changed("""
        from hvd_vgg.parallel import comm
        comm.cpu_convolves = lambda precision: precision != 'bfloat16'
    """)
    ended = launch(2, *flags(data, tmp_path, "--precision=bfloat16"), program=program)
    assert ended.code == 78, ended.out + ended.err
    (bad,) = [finding for finding in report(tmp_path)[1]["devices"] if finding["verdict"] == FAILURE]
    assert bad["text"].startswith("CPU: bfloat16 NHWC: not on a CPU with TensorFlow")
    assert bad["ranks"] == [0, 1]


def test_a_device_that_hangs_on_one_rank_is_named_by_that_rank(launch, tmp_path, data):
    """Rank 1's does not answer; its limit is 120 s, here 4."""
    program = changed("""
        import time
        from hvd_vgg.run import devices, doctor
        from hvd_vgg.run.health import launched_rank
        doctor._LONG_SECONDS = 4.0 if launched_rank() else 60.0
        if launched_rank() == 1:
            doctor._import = lambda *rest: None  # alone may take longer
            devices.check_devices = lambda *rest: time.sleep(600)
    """)
    ended = launch(2, *flags(data, tmp_path), program=program)
    assert ended.code == 78, ended.out + ended.err
    assert "hvd-vgg: rank 1: doctor on " in ended.err
    assert "the devices did not answer within 4 s" in ended.err


def test_a_run_directory_that_hosts_do_not_share_is_a_warning(tmp_path, data):
    """Rank 1 has another file system where rank 0's run directory will be."""
    (tmp_path / "runs").mkdir()
    arguments = [*flags(data, tmp_path), f"--run_dir={tmp_path / 'runs' / 'run'}"]
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path / "runs"} && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("capability: mounting a tmpfs: root")
    second = ["-np", "1", *apart, sys.executable, "-m", "hvd_vgg", *arguments]
    ended = Started([*command_line(1, arguments), ":", *second], tmp_path).wait()
    assert ended.code == 0, ended.out + ended.err
    (told,) = [finding for finding in report(tmp_path)[1]["run_dir"] if finding["verdict"] == WARNING]
    assert told["ranks"] == [1]
    assert told["text"] == f"what rank 0 writes to {tmp_path / 'runs'} is not seen here"


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_host_that_does_not_know_its_own_name_is_told(tmp_path, data, command):
    """Without a launcher Gloo looks it up, and aborts."""
    unnamed = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    if subprocess.run([*unnamed, "true"], capture_output=True, check=False).returncode:
        pytest.skip("capability: namespaces of host names: root")
    arguments = flags(data, tmp_path) if command == "doctor" else ["train", f"--data_dir={data}", f"--run_dir={tmp_path}"]
    ended = Started([*unnamed, sys.executable, "-m", "hvd_vgg", *arguments], tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    assert "this host's name, nowhere.invalid, leads to no address of it" in ended.out + ended.err
    assert "EnforceNotMet" not in ended.err


def test_directories_that_may_not_be_looked_into_are_told(tmp_path):
    """As somebody who is not root."""
    for part in ("locked/runs", "home"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "locked").chmod(0)
    plain = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    try:  # root, setpriv, and a clone and an environment that others may read
        subprocess.run([*plain, sys.executable, "-c", "import hvd_vgg.config"], cwd="/", check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"capability: another user ({error})")
    try:
        for place in (tmp_path, *tmp_path.parents[:2]):
            place.chmod(0o755)
        places = [f"--{name}_dir={tmp_path / 'locked' / 'runs' / name}" for name in ("run", "data")]
        arguments = [*flags("nowhere", tmp_path), *places, "--out="]
        words = [*plain, sys.executable, "-m", "hvd_vgg", *arguments]
        ended = Started(words, tmp_path, HOME=str(tmp_path / "home")).wait()
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert ended.code == 78, ended.out + ended.err
    assert "cannot be written: Permission denied" in ended.out
    assert "runs/data cannot be read: Permission denied" in ended.out
    assert "Traceback" not in ended.err


def test_ranks_of_srun_by_pmix_take_a_device_each(launch, tmp_path, data):
    """srun sets PMIX_RANK, and tells the number of ranks by a variable of Slurm's alone; mpirun stands in for it."""
    program = changed("""
        import os
        rank, size = (os.environ.pop('OMPI_COMM_WORLD_' + name) for name in ('RANK', 'SIZE'))
        for name in ('LOCAL_RANK', 'LOCAL_SIZE'): os.environ.pop('OMPI_COMM_WORLD_' + name)
        os.environ.update(PMIX_RANK=rank, SLURM_STEP_NUM_TASKS=size, SLURM_LOCALID=rank)
        from hvd_vgg.parallel import comm
        from hvd_vgg.run.health import launched_size
        taken = comm.take_device
        def told(*rest):
            print('took a device of', launched_size())
            return taken(*rest)
        comm.take_device = told
    """)
    ended = launch(2, *flags(data, tmp_path), program=program)
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.count("took a device of 2") == 2
    assert "2 ranks, 1 host: " in ended.out


@pytest.mark.fault(tier=3)
def test_ranks_of_horovodrun_by_gloo(tmp_path, data):
    """The way that is left where Horovod is built without MPI."""
    program = [sys.executable, "-m", "hvd_vgg", *flags(data, tmp_path)]
    ended = Started(["horovodrun", "--gloo", "-np", "2", *program], tmp_path).wait()
    assert ended.code == 0, ended.out + ended.err
    assert "by gloo a number is summed in" in report(tmp_path)[1]["link"][0]["text"]
    assert len(report(tmp_path)[0]["hosts"]) == 2


def test_a_simulated_vendor_host(tmp_path, data):
    """SIMULATED (tests/simulated.py): a BI-V150 host whose TensorFlow sees no device, on this machine's CPU."""
    (tmp_path / "root").mkdir()
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "import simulated\n"
        "from hvd_vgg.config import DoctorConfig, parse\n"
        "from hvd_vgg.run import doctor\n"
        "from hvd_vgg.run.health import Failure\n"
        f"here = simulated.iluvatar(Path({str(tmp_path / 'root')!r}), driver='3.2.3', sdk='4.4.0')\n"
        "try:\n"
        "    doctor.doctor(parse(DoctorConfig, sys.argv[2:]), here)\n"
        "except Failure as failure:\n"
        "    sys.exit(failure.code)\n"
    )
    ended = Started([sys.executable, "-c", program, *flags(data, tmp_path)], tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    _, found = report(tmp_path)
    assert found["vendor"][0]["text"].startswith(
        "Iluvatar (TensorFlow 2.16.2+corex.4.3.0, /usr/local/corex, 16 /dev/iluvatar*"
    )
    bad = [finding["text"] for each in found.values() for finding in each if finding["verdict"] == FAILURE]
    assert len(bad) == 2, bad
    assert "the driver is older than the SDK" in bad[0] + bad[1]
    assert "TensorFlow sees none of 16 devices" in bad[0] + bad[1]


# ---- emulated hosts


@pytest.mark.fault("F33")
@pytest.mark.parametrize("emulated_hosts", [2, pytest.param(4, marks=pytest.mark.fault(tier=3))], indirect=True)
def test_hosts_that_reach_each_other(emulated_hosts, tmp_path, data):
    """Started as training is."""
    network = f"--network={namespaces.NETWORK}.0/24"
    words = [sys.executable, "-m", "hvd_vgg", "launch", *emulated_hosts.flags, network, *flags(data, tmp_path)]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 0, ended.out + ended.err
    assert f"{emulated_hosts.count} ranks" in ended.out


@pytest.mark.parametrize("emulated_hosts", [3], indirect=True)
@pytest.mark.fault(tier=3)
def test_a_host_with_a_slow_link_is_named(emulated_hosts, tmp_path, data):
    """The second one's carries 50 Mbit/s."""
    emulated_hosts.slow(2, 50)
    words = [sys.executable, "-m", "hvd_vgg", "launch", *emulated_hosts.flags, *flags(data, tmp_path)]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 0, ended.out + ended.err
    (told,) = [finding for finding in report(tmp_path)[1]["link"] if finding["verdict"] == WARNING]
    assert told["fix"].startswith("see the link of host2: "), told


@pytest.mark.parametrize(
    ("interface", "told"),
    [
        ("lo", "OMPI_MCA_btl_tcp_if_include=lo never leaves this host, and the job has several; here are: "),
        ("dum0", "the ranks have not met within 8 s (--join_seconds); interfaces here: "),
    ],
)
@pytest.mark.fault("F33")
def test_a_wrong_interface_is_named_before_the_night(emulated_hosts, tmp_path, data, interface, told):
    """Under mpirun itself: one that is never right between hosts, and one that looks right and leads nowhere."""
    emulated_hosts.add_dead_end("dum0")
    line = ["mpirun", "-np", "2", "-H", ",".join(f"{address}:1" for address in emulated_hosts.addresses)]
    for name, value in {
        "plm_rsh_agent": emulated_hosts.agent,
        "plm_rsh_no_tree_spawn": 1,
        "oob_tcp_if_include": f"{namespaces.NETWORK}.0/24",
        "btl_tcp_if_include": interface,
        "btl": "self,tcp",
        "pml": "ob1",
    }.items():
        line += ["--mca", name, str(value)]
    line += ["--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH", sys.executable, "-m", "hvd_vgg"]
    words = emulated_hosts.on(1, [*line, *flags(data, tmp_path)])
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 78, ended.out + ended.err
    assert told in ended.out + ended.err
    assert f"eth0 {emulated_hosts.addresses[0]}" in ended.out + ended.err


@pytest.mark.parametrize("by", ["launch", "mpirun", "mpirun, told in a file", "mpirun, told wrong"])
@pytest.mark.fault("F33")
def test_hosts_with_docker_meet(emulated_hosts, tmp_path, data, by):
    """Each has a docker0 of one address: Open MPI would connect to itself. Its user's own word is kept, right or wrong."""
    emulated_hosts.add_bridge("docker0")
    told = {"mpirun, told in a file": "btl_tcp_if_include = eth0\n", "mpirun, told wrong": "btl_tcp_if_exclude = lo\n"}
    (tmp_path / ".openmpi").mkdir()
    (tmp_path / ".openmpi" / "mca-params.conf").write_text(told.get(by, "# nothing\n"))
    line = [sys.executable, "-m", "hvd_vgg", "launch", *emulated_hosts.flags]
    if by != "launch":
        line = ["mpirun", "-np", "2", "-H", ",".join(f"{address}:1" for address in emulated_hosts.addresses)]
        line += ["--mca", "plm_rsh_agent", emulated_hosts.agent, "--mca", "plm_rsh_no_tree_spawn", "1", "--bind-to", "none"]
        line += ["-x", "PATH", "-x", "PYTHONPATH", "-x", "HOME", sys.executable, "-m", "hvd_vgg"]
    words = emulated_hosts.on(1, [*line, *flags(data, tmp_path)])
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT), HOME=str(tmp_path)).wait(120)
    if by == "mpirun, told wrong":
        assert ended.code == 78, ended.out + ended.err
        assert "the ranks have not met within 8 s" in ended.out + ended.err
        return
    assert ended.code == 0, ended.out + ended.err
    told_of = report(tmp_path)[1]["interfaces"]
    assert ("MPI leaves out docker0" in told_of[0]["text"]) == (by not in told), told_of


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.fault("F34")
def test_hosts_are_asked_before_mpirun_is(emulated_hosts, tmp_path, data, cut):
    """One of three hosts is unknown to the agent; with this host's link cut for it, the second cannot connect back."""
    first, second, third = *emulated_hosts.addresses, f"{namespaces.NETWORK}.99"
    if cut:  # the agent of these tests needs no link of the host that asks
        namespaces.ip("-n", emulated_hosts.spaces[0], "link", "set", "eth0", "down")
    (tmp_path / "three").write_text("".join(f"{each} slots=8\n" for each in (first, second, third)))
    asked = [f"--hostfile={tmp_path / 'three'}", f"--rsh_agent={emulated_hosts.agent}"]
    words = [sys.executable, "-m", "hvd_vgg", *flags(data, tmp_path, *asked)]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 78, ended.out + ended.err
    found = {finding["text"].split()[0].rstrip(":"): finding for finding in report(tmp_path)[1]["hosts"]}
    assert (found[second]["verdict"] == FAILURE) == cut
    assert ("cannot connect to this host" if cut else f"answers and reaches {first}") in found[second]["text"]
    assert found[third]["verdict"] == FAILURE and "No route to host" in found[third]["text"]
