"""`hvd-vgg doctor` alone, on ranks, on what is broken on purpose, and on emulated hosts (F32, F33, F34).

Emulated hosts are network namespaces of this machine with a link between them.
"""

import json
import os
import subprocess
import sys

import namespaces
import pytest
from support import ROOT, Started, changed, command_line, example, full, picture, write_shard

from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

SMALL = ["--num_classes=10", "--model=vgg11", "--width=0.125", "--image_size=32", "--global_batch=32", "--device_batch=8"]
PROGRAM = [sys.executable, "-m", "hvd_vgg"]


def flags(data, tmp_path, *more):
    """Returns the arguments of a command whose report goes to tmp_path/out.json."""
    return ["doctor", f"--data_dir={data}", f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out.json'}", *SMALL, *more]


def findings(ended, code, tmp_path):
    """Returns the findings of a doctor that ended with `code`, by what they are about."""
    assert ended.code == code, ended.out + ended.err
    found = {}
    for finding in json.loads((tmp_path / "out.json").read_text())["findings"]:
        found.setdefault(finding["about"], []).append(finding)
    return found


def having(found, *verdicts):
    """Returns the findings with one of `verdicts`."""
    return [finding for finding in found if finding["verdict"] in verdicts]


def test_doctor_of_a_sound_host(launch, data, tmp_path):
    """It leaves nothing behind."""
    before = sorted(data.iterdir())
    ended = launch(0, *flags(data, tmp_path))
    found = findings(ended, 0, tmp_path)
    assert set(found) >= {
        "vendor",
        "python",
        "packages",
        "tensorflow",
        "horovod",
        "mpi",
        "memory",
        "shm",
        "limits",
        "run_dir",
    }
    assert set(found) >= {"interfaces", "devices", "data", "flags", "ranks"}
    assert "clocks" not in found  # a single rank has none to compare with
    assert [finding["text"] for finding in found["data"]][:3] == [
        "train: 75 records in 3 shards",
        "validation: 37 records in 2 shards",
        "labels 1..10, 10 distinct; the first class is 1",
    ]
    assert "ok       data         train: 75 records in 3 shards" in ended.out
    assert not (tmp_path / "run").exists()
    assert sorted(data.iterdir()) == before


def test_doctor_on_two_ranks(launch, data, tmp_path):
    """What is equal is printed once; exchanges are correct."""
    ended = launch(2, *flags(data, tmp_path, "--collectives", "--lr_schedule=constant"))
    found = findings(ended, 0, tmp_path)
    assert ended.out.count(" python ") == 1
    assert all(finding["ranks"] == [0, 1] for finding in found["devices"] + found["flags"] + found["collectives"])
    assert "lr_schedule=constant keeps" in found["flags"][-1]["text"]
    sums, fixed_point, limits, gathers = (finding["text"] for finding in found["collectives"])
    assert "sums of gradients of vgg11 in float32 by mpi: correct;" in sums
    assert "sums of gradients of vgg11 in int32 by mpi: correct;" in fixed_point
    assert "sums of 66 numbers in int64 by mpi: correct;" in limits
    assert "gathers of rows of its dense layers by mpi: correct;" in gathers
    assert "sums by mpi, one number in" in found["link"][0]["text"]
    assert "2 ranks, 1 host: " in ended.out


@pytest.mark.fault("F24", "F25", "F27")
def test_doctor_full_names_every_bad_record(launch, tmp_path):
    """Training stops at the first one."""
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
    found = findings(launch(2, *flags(data, tmp_path, "--full")), 78, tmp_path)["data"]
    bad = {finding["text"]: finding["ranks"] for finding in having(found, FAILURE)}
    assert len(bad) == 3
    for part, ranks in (
        ("train-00000-of-00002, record 3,", [0]),
        ("train-00001-of-00002, record 11,", [1]),
        ("validation-00000-of-00001, record 9,", [1]),
    ):
        assert [where for text, where in bad.items() if part in text] == [ranks], bad


@pytest.mark.fault("F24", tier=3)
@pytest.mark.parametrize("full", ["--full", "--nofull"])
def test_doctor_names_unreadable_shards(launch, tmp_path, full):
    """The other shards are checked all the same."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        rows = [example(picture(i, i % 10 + 1), i % 10 + 1) for i in range(10 * number, 10 * number + 10)]
        write_shard(data / f"train-0000{number}-of-00004", rows)
        write_shard(data / f"validation-0000{number}-of-00004", rows)
    (data / "train-00001-of-00004").write_bytes((data / "train-00001-of-00004").read_bytes()[:-5])
    (data / "train-00002-of-00004").write_bytes(b"no record, but as long as a header")
    found = findings(launch(2, *flags(data, tmp_path, full)), 78, tmp_path)["data"]
    bad, good = ([finding["text"] for finding in having(found, *each)] for each in ([FAILURE], [OK, WARNING]))
    assert len(bad) == 2, bad
    assert all(any(f"train-0000{number}-of-00004" in text for text in bad) for number in (1, 2))
    assert "train: 20 records in 4 shards, without 2 that cannot be read (see the failures)" in good
    assert "validation: 40 records in 4 shards" in good
    assert any(text.startswith("labels 1..10, 10 distinct") for text in good)


def test_doctor_reports_all_that_is_wrong_at_once(launch, data, tmp_path):
    (tmp_path / "file").touch()
    places = [f"--run_dir={tmp_path / 'file'}", f"--data_dir={tmp_path / 'nowhere'}"]
    variables = {"UMD_WAITAFTERLAUNCH": "1", "IX_NUM_CUDA_VISIBLE_DEVICES": "2"}
    ended = launch(0, *flags(data, tmp_path, *places, "--steps=5", "--epochs=2"), **variables)
    found = findings(ended, 78, tmp_path)
    every = [finding for group in found.values() for finding in group]
    assert [finding["about"] for finding in having(every, FAILURE)] == ["run_dir", "data", "data"]
    assert {finding["text"].split("=")[0] for finding in found["environment"]} == set(variables)
    assert "--epochs=2 has no effect with --steps=5" in found["flags"][0]["text"]
    assert all(finding["fix"] for finding in having(every, FAILURE, WARNING))
    assert "hvd-vgg: doctor: 3 failures, see above" in ended.err


@pytest.mark.fault(tier=3)
def test_doctor_finds_labels_outside_the_classes(launch, data, tmp_path):
    ended = launch(0, *flags(data, tmp_path, "--num_classes=3"))
    assert ended.code == 78, ended.out + ended.err
    assert "10 distinct; the first class is 1; 4 is outside the --num_classes=3 classes" in ended.out


@pytest.mark.fault("F02", "F32")
def test_doctor_names_rank_and_host_of_a_failure(tmp_path, data):
    """Rank 1 has another variable and flag, and a copy of the data with more bytes."""
    (tmp_path / "other").mkdir()
    for path in data.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes() + (b"x" if "train-00001" in path.name else b""))
    first = command_line(1, flags(data, tmp_path))
    second = ["-np", "1", "env", "TF_XLA_FLAGS=--tf_xla_auto_jit=0", *PROGRAM]
    ended = Started([*first, ":", *second, *flags(tmp_path / "other", tmp_path, "--lr=0.5")], tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    rank = f"rank 1 (host {os.uname().nodename})"
    xla = "TF_XLA_FLAGS is --tf_xla_auto_jit=0; on rank 0 it is not set"
    assert f"failure  software     {rank}: {xla}" in ended.out
    assert f"failure  software     {rank}: --lr is 0.5; on rank 0 it is 0.01" in ended.out
    assert f"failure  data         {rank}: " in ended.out
    assert "train shards differ from those of rank 0: train-00001-of-00003" in ended.out


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.fault("F02", tier=3)
def test_doctor_of_a_broken_installation(tmp_path, data, rank):
    """TensorFlow cannot be imported, on all ranks or on one that the others wait for."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "tensorflow.py").write_text("raise TypeError('Descriptors cannot be created directly')\n")
    program = ["env", f"PYTHONPATH={tmp_path / 'shadow'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", *PROGRAM]
    line = command_line(2, flags(data, tmp_path), program)
    if rank == 1:
        one = flags(data, tmp_path, "--join_seconds=60")
        line = [*command_line(1, one), ":", "-np", "1", *program, *one]
    ended = Started(line, tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    assert "TypeError: Descriptors cannot be created directly" in ended.out + ended.err
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.fault("F08")
def test_doctor_ends_when_a_rank_does_not_join(tmp_path, data):
    """Rank 1 sleeps instead. Where it is waited for, interfaces are named."""
    one = flags(data, tmp_path, "--join_seconds=2")
    sleeper = ["-np", "1", sys.executable, "-c", "import time; time.sleep(600)"]
    ended = Started([*command_line(1, one), ":", *sleeper], tmp_path).wait()
    (bad,) = having(findings(ended, 78, tmp_path)["ranks"], FAILURE)
    assert bad["text"].startswith("the ranks have not met within 2 s; interfaces: lo 127.0.0.1")


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.fault(tier=3)
def test_doctor_names_a_device_that_does_not_start(launch, tmp_path, data, rank):
    """As with errors 801 and 803; raised here in TensorFlow's place on one rank, while the other waits."""
    program = changed(f"""
        import tensorflow as tf
        from hvd_vgg.environment import launched_rank
        def broken(kind):
            raise tf.errors.InternalError(None, None, 'cudaSetDevice() on GPU:0 failed. Status: 803')
        if launched_rank() == {rank}:
            tf.config.list_logical_devices = broken
    """)
    ended = launch(2, *flags(data, tmp_path), program=program)
    assert ended.code == 78, ended.out + ended.err
    text = "cannot initialize them: cudaSetDevice() on GPU:0 failed. Status: 803"
    assert text in ended.out + ended.err
    assert f"rank {rank}: doctor" in ended.err
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.fault(tier=3)
def test_doctor_finds_a_precision_the_cpu_lacks(launch, tmp_path, data):
    """As bfloat16 under TensorFlow 2.6; pretended here of this one."""
    program = changed("""
        from hvd_vgg.doctor import device_test
        from hvd_vgg.parallel import init
        init.cpu_convolves = device_test.cpu_convolves = lambda precision: precision != 'bfloat16'
    """)
    ended = launch(0, *flags(data, tmp_path, "--precision=bfloat16"), program=program)
    (bad,) = having(findings(ended, 78, tmp_path)["devices"], FAILURE)
    assert bad["text"].startswith("CPU: bfloat16 conv2d NHWC: not on a CPU with TensorFlow")


def test_doctor_device_that_hangs_is_named_by_its_rank(launch, tmp_path, data):
    """Rank 1's does not answer; its limit is 120 s, here 4."""
    program = changed("""
        import time
        from hvd_vgg.doctor import device_test, report
        from hvd_vgg.environment import launched_rank
        report.PHASE_SECONDS = 4.0 if launched_rank() else 60.0
        if launched_rank() == 1:
            from hvd_vgg.doctor import collectives, dataset, ranks  # which may take longer
            device_test.check_computation = lambda *rest: time.sleep(600)
    """)
    ended = launch(2, *flags(data, tmp_path), program=program)
    assert ended.code == 78, ended.out + ended.err
    assert "hvd-vgg: rank 1: doctor on " in ended.err
    assert "the devices did not answer within 4 s" in ended.err


@pytest.mark.fault(tier=3)
def test_doctor_warns_of_a_run_dir_that_is_not_shared(tmp_path, data):
    """Rank 1 has another file system where rank 0's run directory will be."""
    (tmp_path / "runs").mkdir()
    arguments = [*flags(data, tmp_path), f"--run_dir={tmp_path / 'runs' / 'run'}"]
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path / "runs"} && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("capability: mounting a tmpfs: root")
    second = ["-np", "1", *apart, *PROGRAM, *arguments]
    ended = Started([*command_line(1, arguments), ":", *second], tmp_path).wait()
    (found,) = having(findings(ended, 0, tmp_path)["run_dir"], WARNING)
    assert found["ranks"] == [1]
    assert found["text"] == f"what rank 0 writes to {tmp_path / 'runs'} is not visible here"


@pytest.mark.parametrize("command", ["train", *full("doctor")])
def test_doctor_host_that_cannot_resolve_its_name(tmp_path, data, command):
    """Without a launcher Gloo looks the name up, and would abort."""
    unnamed = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    if subprocess.run([*unnamed, "true"], capture_output=True, check=False).returncode:
        pytest.skip("capability: namespaces of host names: root")
    arguments = flags(data, tmp_path) if command == "doctor" else ["train", f"--data_dir={data}", f"--run_dir={tmp_path}"]
    ended = Started([*unnamed, *PROGRAM, *arguments], tmp_path).wait()
    assert ended.code == 78, ended.out + ended.err
    assert "this host's name, nowhere.invalid, does not resolve to an address of it" in ended.out + ended.err
    assert "EnforceNotMet" not in ended.err


def test_doctor_without_permission_to_look(tmp_path):
    """As a user who is not root."""
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
        words = [*plain, *PROGRAM, *flags("nowhere", tmp_path), *places, "--out="]
        ended = Started(words, tmp_path, HOME=str(tmp_path / "home")).wait()
    finally:
        (tmp_path / "locked").chmod(0o755)
    assert ended.code == 78, ended.out + ended.err
    assert "cannot be written: Permission denied" in ended.out
    assert "runs/data cannot be read: Permission denied" in ended.out
    assert "Traceback" not in ended.err


@pytest.mark.fault(tier=3)
def test_doctor_under_srun_takes_a_device_per_rank(launch, tmp_path, data):
    """srun sets PMIX_RANK, and the number of ranks in a variable of Slurm's only; mpirun stands in for it."""
    program = changed("""
        import os
        rank, size = (os.environ.pop('OMPI_COMM_WORLD_' + name) for name in ('RANK', 'SIZE'))
        for name in ('LOCAL_RANK', 'LOCAL_SIZE'): os.environ.pop('OMPI_COMM_WORLD_' + name)
        os.environ.update(PMIX_RANK=rank, SLURM_STEP_NUM_TASKS=size, SLURM_LOCALID=rank)
        from hvd_vgg.environment import launched_size
        from hvd_vgg.parallel import init
        take_device = init.take_device
        def announce(*rest):
            print('took a device of', launched_size())
            return take_device(*rest)
        init.take_device = announce
    """)
    ended = launch(2, *flags(data, tmp_path), program=program)
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.count("took a device of 2") == 2
    assert "2 ranks, 1 host: " in ended.out


@pytest.mark.fault(tier=3)
def test_doctor_under_horovodrun_by_gloo(tmp_path, data):
    """The launcher that is left where Horovod is built without MPI."""
    ended = Started(["horovodrun", "--gloo", "-np", "2", *PROGRAM, *flags(data, tmp_path)], tmp_path).wait()
    assert "sums by gloo, one number in" in findings(ended, 0, tmp_path)["link"][0]["text"]
    assert "2 ranks, 1 host: " in ended.out


def test_doctor_of_a_simulated_vendor_host(tmp_path, data):
    """SIMULATED (tests/simulated.py): a BI-V150 host whose TensorFlow sees no device, on this machine's CPU."""
    (tmp_path / "root").mkdir()
    program = changed(f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        import simulated
        from hvd_vgg.doctor import packages
        host = simulated.iluvatar(Path({str(tmp_path / "root")!r}), driver='3.2.3', sdk='4.4.0')
        packages.this_host = lambda: host
    """)
    ended = Started([*program, *flags(data, tmp_path)], tmp_path).wait()
    found = findings(ended, 78, tmp_path)
    evidence = "TensorFlow 2.16.2+corex.4.3.0, /usr/local/corex, 16 /dev/iluvatar*"
    assert found["vendor"][0]["text"].startswith(f"Iluvatar ({evidence}")
    bad = [finding["text"] for each in found.values() for finding in having(each, FAILURE)]
    assert len(bad) == 2, bad
    assert "the driver is older than the SDK" in bad[0] + bad[1]
    assert "TensorFlow sees none of 16 devices" in bad[0] + bad[1]


# ---- emulated hosts


def mpirun_on(hosts, **parameters):
    """Returns the command line of mpirun on two emulated hosts, with MCA parameters, up to the program."""
    parameters = {"plm_rsh_agent": hosts.agent, "plm_rsh_no_tree_spawn": 1, **parameters}
    mca = [word for name, value in parameters.items() for word in ("--mca", name, str(value))]
    exported = [word for name in ("PATH", "PYTHONPATH", "HOME") for word in ("-x", name)]
    return [
        "mpirun",
        "-np",
        "2",
        "-H",
        ",".join(f"{each}:1" for each in hosts.addresses),
        *mca,
        "--bind-to",
        "none",
        *exported,
    ]


@pytest.mark.fault("F33", tier=3)
@pytest.mark.parametrize("emulated_hosts", [2, 4], indirect=True)
def test_doctor_on_hosts_that_reach_each_other(emulated_hosts, tmp_path, data):
    """Started as training is."""
    network = f"--network={namespaces.NETWORK}.0/24"
    words = [*PROGRAM, "launch", *emulated_hosts.flags, network, *flags(data, tmp_path)]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 0, ended.out + ended.err
    assert f"{emulated_hosts.count} ranks" in ended.out


@pytest.mark.parametrize("emulated_hosts", [3], indirect=True)
@pytest.mark.fault(tier=3)
def test_doctor_names_a_host_with_a_slow_link(emulated_hosts, tmp_path, data):
    """The second one's carries 50 Mbit/s."""
    emulated_hosts.slow(2, 50)
    words = [*PROGRAM, "launch", *emulated_hosts.flags, *flags(data, tmp_path)]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait()
    (found,) = having(findings(ended, 0, tmp_path)["link"], WARNING)
    assert found["fix"].startswith("check the link of host2: "), found


@pytest.mark.parametrize(
    ("interface", "text"),
    [
        ("lo", "OMPI_MCA_btl_tcp_if_include=lo never leaves this host, but the job has several; this host has "),
        *full(("dum0", "the ranks have not met within 8 s; interfaces: ")),
    ],
)
@pytest.mark.fault("F33")
def test_doctor_names_a_wrong_interface(emulated_hosts, tmp_path, data, interface, text):
    """Under mpirun itself: one that is never right between hosts, and one that looks right and leads nowhere."""
    emulated_hosts.add_dead_end("dum0")
    subnet = f"{namespaces.NETWORK}.0/24"
    line = mpirun_on(emulated_hosts, oob_tcp_if_include=subnet, btl_tcp_if_include=interface, btl="self,tcp", pml="ob1")
    words = emulated_hosts.on(1, [*line, *PROGRAM, *flags(data, tmp_path)])
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT)).wait()
    assert ended.code == 78, ended.out + ended.err
    assert text in ended.out + ended.err
    # Of the host that ends first; on a loaded machine that need not be rank 0's.
    assert any(f"eth0 {address}" in ended.out + ended.err for address in emulated_hosts.addresses)


@pytest.mark.parametrize("by", ["launch", "mpirun wrong", "mpirun", "mpirun right"])
@pytest.mark.fault("F33", tier=3)
def test_doctor_on_hosts_with_docker(emulated_hosts, tmp_path, data, by):
    """Each has a docker0 with the same address: Open MPI would connect to itself. What its user configures is kept."""
    emulated_hosts.add_bridge("docker0")
    files = {"mpirun right": "btl_tcp_if_include = eth0\n", "mpirun wrong": "btl_tcp_if_exclude = lo\n"}
    (tmp_path / ".openmpi").mkdir()
    (tmp_path / ".openmpi" / "mca-params.conf").write_text(files.get(by, "# nothing\n"))
    line = [*PROGRAM, "launch", *emulated_hosts.flags] if by == "launch" else [*mpirun_on(emulated_hosts), *PROGRAM]
    words = emulated_hosts.on(1, [*line, *flags(data, tmp_path)])
    ended = Started(words, tmp_path, PYTHONPATH=str(ROOT), HOME=str(tmp_path)).wait()
    if by == "mpirun wrong":
        assert ended.code == 78, ended.out + ended.err
        assert "the ranks have not met within 8 s" in ended.out + ended.err
    else:
        (found,) = findings(ended, 0, tmp_path)["interfaces"]
        assert ("MPI leaves out docker0" in found["text"]) == (by not in files), found


@pytest.mark.parametrize("cut", [True, *full(False)])
@pytest.mark.fault("F34")
def test_doctor_asks_hosts_before_mpirun_does(emulated_hosts, tmp_path, data, cut):
    """One of three hosts is unknown to the agent; with this host's link cut, the second cannot connect back."""
    first, second, third = *emulated_hosts.addresses, f"{namespaces.NETWORK}.99"
    if cut:  # the agent of these tests does not need it
        namespaces.ip("-n", emulated_hosts.spaces[0], "link", "set", "eth0", "down")
    (tmp_path / "three").write_text("".join(f"{each} slots=8\n" for each in (first, second, third)))
    asked = [f"--hostfile={tmp_path / 'three'}", f"--rsh_agent={emulated_hosts.agent}"]
    words = [*PROGRAM, *flags(data, tmp_path, *asked)]
    ended = Started(emulated_hosts.on(1, words), tmp_path, PYTHONPATH=str(ROOT)).wait()
    found = {finding["text"].split()[0].rstrip(":"): finding for finding in findings(ended, 78, tmp_path)["hosts"]}
    assert (found[second]["verdict"] == FAILURE) == cut
    assert ("cannot connect to this host" if cut else f"answers and reaches {first}") in found[second]["text"]
    assert found[third]["verdict"] == FAILURE and "No route to host" in found[third]["text"]
