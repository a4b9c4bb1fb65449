"""The launch scripts without what they start: each prints the command that it would run, and nothing else happens."""

import csv
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from dockerfile import stages
from support import BIN, ROOT, full, wait_for

from hvd_vgg.config import AcceptanceConfig, DoctorConfig, LaunchConfig, TrainConfig
from hvd_vgg.flags import format_value, parse_flags

LAUNCH = ROOT / "launch"
# name: image, devices per card. All vendors' scripts share launch/docker.sh, but for how they find and pass on devices.
DOCKER = {"bi_v150": ("hvd_vgg:corex", 2), "bi_v100": ("hvd_vgg:corex", 1), "nvidia": ("hvd_vgg:nvidia", 1)}
BOTH_VENDORS = ["bi_v150", "nvidia", *full("bi_v100")]
ANY_VENDOR = ["bi_v150", *full("bi_v100", "nvidia")]
MULTIGPU = "run_train_vgg16_multigpu_imagenet.sh"
# Scripts that train or run doctor, and print what they would start.
TRAIN = [*(f"docker_run_{name}.sh" for name in DOCKER), "run_train_vgg16_imagenet.sh", MULTIGPU, "slurm.sbatch"]
SIZES = [(1, 8), (2, 16), *full(*[(1, 1), (1, 16), (1, 32), (2, 1), (2, 8), (2, 32), (4, 1), (4, 8), (4, 16), (4, 32)])]


def call(script, *flags, cwd, **environment):
    """Runs a script of launch/ and returns it, ended."""
    passed = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(cwd), **environment}
    # An environment in the clone would come before what a test puts on PATH.
    passed.setdefault("HVD_VGG_VENV", f"{cwd}/no environment")
    return subprocess.run(
        ["bash", LAUNCH / script, *flags], cwd=cwd, env=passed, capture_output=True, text=True, timeout=60, check=False
    )


def printed(ended):
    """Returns the words of the one command that a script printed."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("+ ")]
    return shlex.split(line)[1:]


def docker(name, *flags, cwd, **environment):
    """Runs a vendor's docker script on data that are there, and returns it, ended."""
    return call(f"docker_run_{name}.sh", "--data_dir=image net", *flags, cwd=cwd, **environment)


def cut_at_image(words, name):
    """Returns the options of docker, and what runs inside."""
    at = words.index(DOCKER[name][0])
    return words[:at], words[at + 1 :]


def parsed(words, config, here=None):
    """Returns the flags of a command inside a container, read with the files that it has outside."""
    words = [word.replace("/opt/hvd_vgg", str(ROOT)) for word in words]
    return parse_flags(config, [word.replace("/etc/hvd-vgg/flags.0", f"{here}/more.flags") for word in words])


def given(words, name):
    """Returns the values of all words `--name=VALUE`."""
    return [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]


def mounts(words):
    """Returns {path in the container: (path on the host[, "readonly"])}."""
    found = {}
    for word in given(words, "mount"):
        kind, source, target, *more = word.split(",")
        assert kind == "type=bind"
        found[target[len("target=") :]] = (source[len("source=") :], *more)
    return found


def refused(ended, code, message):
    """Asserts that a script refused its command line and printed no command."""
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert message in ended.stderr
    assert "+ " not in ended.stdout


def stubs(here, **programs):
    """Writes shell programs in place of those that a script starts, and returns PATH with them first."""
    folder = here / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"


NVIDIA_SMI = {"nvidia-smi": "for i in 0 1 2 3; do echo GPU $i: H; done"}


@pytest.fixture
def here(tmp_path):
    """A directory with a space in its name, with data, hosts and keys."""
    folder = tmp_path / "my own files"
    for name in ("image net", "the keys"):
        (folder / name).mkdir(parents=True)
    (folder / "more.flags").write_text("--lr=0.02\n")
    write_hosts(folder, 2, 4)
    return folder


def write_hosts(here, count, devices):
    (here / "the hosts").write_text("".join(f"node{number} slots={devices}\n" for number in range(count)))


# ---- docker


@pytest.mark.parametrize("devices", [16, *full(1, 8, 32)])
@pytest.mark.parametrize("name", BOTH_VENDORS)
def test_docker_on_one_host(here, name, devices):
    """Rights, mounts, variables and flags of the one command."""
    flags = ["--run_dir=runs/run 1", "--flagfile=more.flags", "--max_restarts=7", "--epochs=3"]
    passed = {"NCCL_DEBUG": "INFO", "UMD_WAITAFTERLAUNCH": "1", "DRT_MEMCPYUSEKERNEL": "2", "CRT_STRICTCUDATIMINGMODE": "0"}
    secret = {"TF_API_TOKEN": "canary", "UMD_KEY": "canary"}
    environment = {"DATA_DIR": "./image net", "BATCH_SIZE": "64", **passed, **secret}
    words = printed(call(f"docker_run_{name}.sh", "--dry_run", f"--devices={devices}", *flags, cwd=here, **environment))
    assert not (here / "runs").exists()  # only printed
    options, inside = cut_at_image(words, name)
    assert options[:2] == ["docker", "run"]
    assert all(word.startswith("--") for word in options[2:])
    assert {"--rm", "--init", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--ulimit=memlock=-1"} < set(options)
    assert "--privileged" not in options
    assert given(options, "user") == [f"{os.getuid()}:{os.getgid()}"]
    assert given(options, "shm-size") == ["32g"]
    nodes = [node for node in given(options, "device") if node != "/dev/itrctl"]
    expected = ([str(devices)], []) if name == "nvidia" else ([], [f"/dev/iluvatar{number}" for number in range(devices)])
    assert (given(options, "gpus"), nodes) == expected
    assert mounts(options) == {
        "/data": (str(here / "image net"), "readonly"),
        "/runs/run 1": (str(here / "runs" / "run 1"),),
        "/etc/hvd-vgg/flags.0": (str(here / "more.flags"), "readonly"),
    }
    # Variables go by name, so that no value is in `ps`; the secret ones do not go at all.
    assert set(passed) < set(given(options, "env"))
    assert not any("TOKEN" in each or "KEY" in each.split("=")[0] or "canary" in each for each in words)
    split = inside.index("train")
    assert inside[0] == "launch"
    launching = parsed(inside[1:split], LaunchConfig)
    assert (launching.ranks, launching.hostfile, launching.max_restarts) == (devices, "", 7)
    training = parsed(inside[split + 1 :], TrainConfig, here)
    assert (training.data_dir, training.run_dir) == ("/data", "/runs/run 1")
    assert (training.device_batch, training.epochs, training.lr, training.model) == (64, 3, 0.02, "vgg16")


@pytest.mark.parametrize("name", ANY_VENDOR)
def test_docker_on_several_hosts(here, name):
    flags = ["--devices=4", "--run_dir=run 1", "--ssh_dir=the keys", "--network=eth1", "--dry_run"]
    words = printed(docker(name, "--hostfile=the hosts", *flags, cwd=here))
    worker = printed(docker(name, "--worker", *flags, cwd=here))
    options, inside = cut_at_image(words, name)
    # A worker has all that the launcher's host has, for its own ranks.
    assert [word for word in options if ",target=/etc/hvd-vgg/hosts," not in word] == [
        word for word in cut_at_image(worker, name)[0] if not word.startswith(("--entrypoint", "--cap-add"))
    ]
    assert given(options, "network") == ["host"]
    seen = mounts(words)
    assert seen["/etc/hvd-vgg/hosts"] == (str(here / "the hosts"), "readonly")
    assert seen["/etc/hvd-vgg/ssh"] == (str(here / "the keys"), "readonly")
    assert seen["/etc/passwd"] == (str(here / "the keys" / "passwd"), "readonly")
    launching = parsed(inside[1 : inside.index("train")], LaunchConfig)
    assert (launching.hostfile, launching.rsh_agent, launching.ranks) == ("/etc/hvd-vgg/hosts", "hvd-vgg-ssh", 0)
    assert launching.network == "eth1"
    assert given(worker, "entrypoint") == ["/usr/sbin/sshd"]
    assert cut_at_image(worker, name)[1] == ["-D", "-e", "-f", "/etc/hvd-vgg/sshd_config"]


def as_doctor(train):
    """Returns the words of doctor's command where `train` would train: the same without restarts."""
    return ["doctor" if word == "train" else word for word in train if not word.startswith("--max_restarts=")]


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("name", ANY_VENDOR)
def test_docker_runs_doctor_where_it_would_train(here, name, hosts):
    flags = ["--devices=4", "--run_dir=run 1", "--lr=0.02", "--dry_run"]
    flags += ["--hostfile=the hosts", "--ssh_dir=the keys"] if hosts > 1 else []
    train = printed(docker(name, *flags, cwd=here))
    doctor = printed(docker(name, "doctor", *flags, "--collectives", cwd=here))
    assert doctor == as_doctor([*train, "--collectives"])
    assert "--max_restarts=20" in train
    looking = parsed(doctor[doctor.index("doctor") + 1 :], DoctorConfig)
    assert (looking.data_dir, looking.run_dir, looking.collectives, looking.lr) == ("/data", "/runs/run 1", True, 0.02)


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize("name", ANY_VENDOR)
def test_docker_without_mpi(here, name, command):
    flags = ["--gloo", "--devices=8", "--run_dir=run 1", "--dry_run"]
    words = printed(docker(name, *(["doctor"] if command == "doctor" else []), *flags, cwd=here))
    options, inside = cut_at_image(words, name)
    assert given(options, "entrypoint") == ["horovodrun"]
    assert inside[:5] == ["--gloo", "-np", "8", "hvd-vgg", command]
    assert parsed(inside[5:], DoctorConfig if command == "doctor" else TrainConfig).run_dir == "/runs/run 1"


@pytest.mark.parametrize("more", [[], ["--gloo"]])
@pytest.mark.parametrize("name", ANY_VENDOR)
def test_docker_runs_acceptance(here, name, more):
    """Which starts the ranks itself, and has a directory of its own."""
    words = printed(docker(name, "acceptance", "--devices=8", "--dry_run", *more, cwd=here))
    options, inside = cut_at_image(words, name)
    assert given(options, "entrypoint") == []
    trying = parse_flags(AcceptanceConfig, [word for word in inside[1:] if "flagfile" not in word])
    assert (inside[0], trying.ranks, trying.gloo) == ("acceptance", 8, bool(more))
    assert (trying.data_dir, trying.run_dir) == ("/data", "/runs/acceptance")
    assert mounts(words)["/runs/acceptance"] == (str(here / "acceptance"),)


@pytest.mark.parametrize(("name", "cards", "devices"), [("bi_v150", 8, 16), ("bi_v100", 8, 8), ("bi_v150", 1, 2)])
def test_docker_counts_devices_of_cards(here, name, cards, devices):
    assert given(printed(docker(name, "--dry_run", f"--cards={cards}", cwd=here)), "ranks") == [str(devices)]


@pytest.mark.parametrize("access", ["runtime", "privileged"])
def test_docker_access_by_other_documented_ways(here, access):
    privileged = access == "privileged"
    flags = ["--dry_run", f"--access={access}"]
    words = printed(docker("bi_v150", *flags, "--devices=4", cwd=here))
    assert given(words, "device") == []
    assert {word in words for word in ("--privileged", "--pid=host", "--volume=/dev:/dev")} == {privileged}
    assert ("--cap-drop=ALL" in words) == (not privileged)
    assert given(words, "runtime") == ([] if privileged else ["iluvatar"])
    assert ("IX_VISIBLE_DEVICES=0,1,2,3" in given(words, "env")) == (not privileged)
    assert given(words, "ranks") == ["4"]
    words = printed(docker("bi_v150", *flags, cwd=here, CUDA_VISIBLE_DEVICES="5,0"))
    assert ("CUDA_VISIBLE_DEVICES=5,0" if privileged else "IX_VISIBLE_DEVICES=5,0") in given(words, "env")
    assert given(words, "ranks") == ["2"]
    several = ["--hostfile=the hosts", "--ssh_dir=the keys"]
    ended = docker("bi_v150", *flags, *several, cwd=here, CUDA_VISIBLE_DEVICES="5,0")
    assert (ended.returncode == 78) == privileged
    assert ("cannot be kept with --access=privileged on several hosts" in ended.stderr) == privileged


SSH, GLOO = "--ssh_dir=the keys", "--gloo: horovodrun starts"
REFUSED = [
    (["--devices=0"], None, "--devices=0: expected a number of 1 or more"),
    (["--devices=all"], None, "--devices=all"),
    (["--cards=2", "--devices=4"], None, "--cards=2: expected a number of 1 or more, and no --devices"),
    (["--devices=2", "--access=root"], None, "--access=root: expected"),
    (["--devices=2", "--data_dir=nowhere"], None, "nowhere: no such file or directory; give the TFRecords' by --data_dir="),
    (["--devices=2", "--data_dir=a,b"], None, "a,b: docker cannot mount"),
    (["--devices=2", "--hostfile=the hosts"], None, "several hosts need --ssh_dir=DIR"),
    (["--devices=2", "--network=eth1", SSH], None, "--network=eth1: between hosts, where --hostfile is given"),
    (["--devices=2", "--rsh_agent=ssh"], None, "--rsh_agent: not in a container"),
    (["--devices=2", "--flagfile=nothing.flags"], None, "nothing.flags: no such file"),
    (["--devices=2", "--gloo", "--hostfile=the hosts", SSH], None, GLOO),
    (["--devices=2", "--gloo", "--grace_seconds=5"], None, GLOO),
    (["--devices=2", "--gloo", "--worker", SSH], None, GLOO),
    (["doctor", "--devices=2", "--worker", SSH], None, "doctor: only where --hostfile is given"),
    (["--devices=8"], "0,1", "8 devices asked for; CUDA_VISIBLE_DEVICES=0,1 leaves 2: ask for no more, or unset it"),
    ([], "", "CUDA_VISIBLE_DEVICES=: expected numbers of devices"),
    ([], "GPU-8932f937", "CUDA_VISIBLE_DEVICES=GPU-8932f937: expected numbers of devices"),
    ([], "1,1", "CUDA_VISIBLE_DEVICES=1,1 names a device twice"),
]


@pytest.mark.parametrize(("flags", "mask", "message"), REFUSED)
@pytest.mark.parametrize("name", ANY_VENDOR)
def test_docker_refuses_what_would_fail_later(here, name, flags, mask, message):
    (here / "a,b").mkdir()
    masked = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    refused(docker(name, *flags, "--dry_run", cwd=here, **masked), 78, message)


@pytest.mark.parametrize(("flags", "taken"), [([], [5, 0, 12]), (["--devices=2"], [5, 0])])
@pytest.mark.parametrize("name", BOTH_VENDORS)
def test_docker_takes_devices_that_the_host_leaves(here, name, flags, taken):
    words = printed(docker(name, "--dry_run", *flags, cwd=here, CUDA_VISIBLE_DEVICES="5,0,12"))
    if name == "nvidia":
        # docker reads the value as a line of CSV.
        (devices,) = csv.reader(given(words, "gpus"))
        assert devices == ["device=" + ",".join(map(str, taken))]
    else:
        nodes = [node for node in given(words, "device") if node != "/dev/itrctl"]
        assert nodes == [f"/dev/iluvatar{number}" for number in taken]
    assert given(words, "ranks") == [str(len(taken))]
    # Inside they are counted from 0.
    assert not any("CUDA_VISIBLE_DEVICES" in each for each in given(words, "env"))


@pytest.mark.parametrize(
    ("flags", "mask", "message"),
    [
        ([], {"CUDA_VISIBLE_DEVICES": "3,4"}, "CUDA_VISIBLE_DEVICES=3,4: this host shows 4, counted from 0"),
        (["--devices=5"], {}, "5 devices asked for; this host shows 4"),
    ],
)
def test_docker_does_not_start_without_its_devices(here, flags, mask, message):
    path = stubs(here, docker="touch called", **NVIDIA_SMI)
    refused(docker("nvidia", *flags, cwd=here, PATH=path, **mask), 78, message)
    assert not (here / "called").exists()


def test_docker_does_not_start_without_iluvatar_devices(here):
    refused(docker("bi_v150", "--devices=9999", cwd=here), 78, "9999 devices asked for; this host shows ")


def test_docker_prints_what_it_runs(here):
    """The script becomes docker, here a stub that writes how it was called."""
    path = stubs(here, docker='printf "%s\\0" docker "$@" > called', **NVIDIA_SMI)
    flags = ["--run_dir=runs/run 1", "--hostfile=the hosts", "--ssh_dir=the keys"]
    words = printed(docker("nvidia", *flags, cwd=here, PATH=path))
    assert (here / "called").read_text().split("\0")[:-1] == words
    assert given(words, "gpus") == ["4"]
    assert (here / "runs" / "run 1").is_dir()
    users = [line.split(":") for line in (here / "the keys" / "passwd").read_text().splitlines()]
    assert str(os.getuid()) in [user[2] for user in users]
    assert all(len(user) == 7 for user in users)


@pytest.mark.parametrize(
    ("flags", "starts"),
    [(["--dry_run=true"], False), (["--dry_run=false", "--dry_run"], False), (["--dry_run=false"], True)],
)
def test_docker_is_started_unless_by_a_dry_run(here, flags, starts):
    path = stubs(here, docker="touch called", **NVIDIA_SMI)
    printed(docker("nvidia", "--devices=2", *flags, cwd=here, PATH=path))
    assert (here / "called").exists() == starts


VALUED = "image devices cards access shm_size data_dir run_dir flagfile hostfile ssh_dir network docker"


@pytest.mark.parametrize("equals", ["", "="])
@pytest.mark.parametrize("flag", VALUED.split())
def test_docker_refuses_its_own_flags_without_a_value(here, flag, equals):
    ended = docker("bi_v150", "--devices=2", "--dry_run", f"--{flag}{equals}", cwd=here)
    refused(ended, 64, f"docker_run_bi_v150.sh: --{flag}{equals}: expected --{flag}=VALUE\n")


@pytest.mark.parametrize("more", [[], ["--gloo"], ["--worker", "--ssh_dir=the keys"]])
def test_docker_gets_further_options_before_the_image(here, more):
    options = ["--volume=/opt/lib/a,b.so:/usr/lib/a b.so:ro", "--group-add", "video"]
    words = ["--devices=2", "--dry_run", *more, *(f"--docker={option}" for option in options)]
    found = cut_at_image(printed(docker("bi_v150", *words, cwd=here)), "bi_v150")[0]
    at = found.index(options[0])
    assert found[at : at + 3] == options


# ---- all scripts


SLURM = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-3]", "PYTHONPATH": str(ROOT)}
SLURM["SLURM_NTASKS_PER_NODE"] = "2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "2"], "--devices 2: expected --devices=2"),
        (["--ranks", "8"], "--ranks 8: expected --ranks=8"),
        (["--epochs", "2"], "--epochs 2: expected --epochs=2"),
        (["docter"], "docter: expected --FLAG=VALUE, or the word doctor or acceptance"),
        (["doctor", "--lr=0.1", "again"], "again: expected --FLAG=VALUE, or the word doctor or acceptance"),
        (["--dry_run=yes"], "--dry_run=yes: expected --dry_run, --dry_run=true or --dry_run=false"),
    ],
)
@pytest.mark.parametrize("script", ["docker_run_bi_v150.sh", MULTIGPU, "slurm.sbatch", *full(*TRAIN)])
def test_scripts_refuse_words_that_are_no_flags(here, script, flags, message):
    path = stubs(here, **dict.fromkeys(["docker", "srun", "hvd-vgg"], "touch called"))
    ended = call(script, "--data_dir=image net", *flags, cwd=here, **{**SLURM, "PATH": path})
    assert (ended.returncode, ended.stdout) == (64, ""), ended.stderr
    assert ended.stderr == f"{script.replace('16_imagenet', '16_multigpu_imagenet')}: {message}\n"
    assert not (here / "called").exists()


OTHERS = ["check_dockerfile.sh", "container/beside_vendor.sh", "environment.sh", "kubernetes/doctor.sh", "quickstart.sh"]
OTHERS += ["test.sh", "versions.sh"]


@pytest.mark.parametrize("script", [*TRAIN, *OTHERS])
def test_scripts_help_is_their_head(here, script):
    """Also where there is no environment yet, and outside Slurm."""
    words = ["doctor", "--help"] if script in TRAIN else ["--help"]
    ended = call(script, *words, cwd=here, PATH="/usr/bin:/bin", HVD_VGG_VENV=str(here))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = (LAUNCH / script).read_text().splitlines()[1:]
    end = next(at for at, line in enumerate(lines) if line != "#" and not line.startswith("# "))
    assert ended.stdout == "".join(f"{line[2:]}\n" for line in lines[:end])
    wanted = ["--dry_run", "DATA_DIR"] if script in TRAIN else [f"bash launch/{script}"]
    assert all(each in ended.stdout for each in wanted)


# ---- mpirun


def of_mpirun(words):
    """Returns (ranks, hosts, the flags of train) of an mpirun command."""
    at = words.index("-np")
    hosts = words[words.index("--host") + 1].split(",") if "--host" in words else []
    return int(words[at + 1]), hosts, words[words.index("train") + 1 :]


@pytest.mark.parametrize(("hosts", "devices"), SIZES)
def test_multigpu_script(here, hosts, devices):
    """As many ranks as slots, and doctor where it would train."""
    write_hosts(here, hosts, devices)
    flags = ["--dry_run", "--run_dir=run 1", "--lr=0.02", f"--ranks={devices}" if hosts == 1 else "--hostfile=the hosts"]
    environment = {"DATA_DIR": "./image net", "BATCH_SIZE": "2", "PYTHONPATH": str(ROOT)}
    words = printed(call(MULTIGPU, *flags, cwd=here, **environment))
    started, named, train = of_mpirun(words)
    assert started == devices * hosts
    assert named == ([f"node{number}:{devices}" for number in range(hosts)] if hosts > 1 else [])
    training = parse_flags(TrainConfig, train)
    assert (training.data_dir, training.run_dir, training.lr, training.device_batch) == ("./image net", "run 1", 0.02, 2)
    assert not (here / "run 1").exists()
    doctor = printed(call(MULTIGPU, "doctor", *flags, cwd=here, **environment))
    assert lasting(doctor) == lasting(as_doctor(words))
    looking = parse_flags(DoctorConfig, doctor[doctor.index("doctor") + 1 :])
    assert (looking.data_dir, looking.run_dir, looking.lr) == ("./image net", "run 1", 0.02)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LaunchConfig) if field.name != "dry_run"])
def test_scripts_know_the_flags_of_launch(here, name):
    """Which go before the command; else it would refuse them."""
    default = next(field.default for field in dataclasses.fields(LaunchConfig) if field.name == name)
    shown = call(MULTIGPU, "--dry_run", f"--{name}={format_value(default)}", cwd=here, PYTHONPATH=str(ROOT))
    assert "no such flag" not in shown.stderr
    assert shown.returncode == 0, shown.stderr


def test_multigpu_script_runs_acceptance(here):
    ended = call(MULTIGPU, "acceptance", "--dry_run", "--ranks=2", cwd=here, DATA_DIR="./image net", PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    commands = [shlex.split(line)[1:] for line in ended.stdout.splitlines()]
    assert [words[1] for words in commands] == ["make-demo-data", *["launch"] * (len(commands) - 3), *["verify-run"] * 2]
    assert f"--out={here}/acceptance/doctor.json" in commands[1] and not (here / "acceptance").exists()


def lasting(words):
    """Returns the words of an mpirun command without what differs from start to start, and from command to command."""
    pairs = zip(["", *words], words)
    return [word for before, word in pairs if before != "hvd_vgg_job" and not word.startswith("--console=")]


def test_single_device_script(here):
    script, environment = "run_train_vgg16_imagenet.sh", {"DATA_DIR": "./image net", "PYTHONPATH": str(ROOT)}
    started, named, train = of_mpirun(printed(call(script, "--dry_run", cwd=here, **environment)))
    assert (started, named) == (1, [])
    assert "--data_dir=./image net" in train
    assert parse_flags(TrainConfig, train).device_batch == 16  # the config's
    words = printed(call(script, "doctor", "--dry_run", cwd=here, **environment))
    assert (words[words.index("-np") + 1], words[words.index(str(ROOT / "hvd_vgg" / "__main__.py")) + 1]) == ("1", "doctor")


# ---- Slurm


# `show hostnames` names COUNT nodes; `requeue` prints that it was called.
SCONTROL = 'if [ "$1" = requeue ]; then echo "requeued $2"; else for ((i = 0; i < COUNT; i++)); do echo "node$i"; done; fi'


def slurm(here, *flags, path="", **environment):
    """Runs the batch script as Slurm would, with a stub for scontrol, and returns it, ended."""
    path = path or stubs(here, scontrol=SCONTROL)
    return call(
        "slurm.sbatch", *flags, cwd=here, **{**SLURM, "COUNT": "2", "TMPDIR": str(here), "PATH": path, **environment}
    )


@pytest.mark.parametrize(("hosts", "devices"), SIZES)
def test_slurm_by_mpirun(here, hosts, devices):
    environment = {"SLURM_NTASKS_PER_NODE": str(devices), "COUNT": str(hosts), "DATA_DIR": "./image net", "BATCH_SIZE": "2"}
    ended = slurm(here, "--dry_run", "--run_dir=run 1", **environment)
    shown, run = [shlex.split(line)[1:] for line in ended.stdout.splitlines()]
    assert shown[:2] == ["hvd-vgg", "launch"]
    started, named, train = of_mpirun(run)
    assert (started, named) == (devices * hosts, [f"node{number}:{devices}" for number in range(hosts)])
    (agent,) = (value for name, value in zip(run, run[1:]) if name in ("plm_rsh_agent", "plm_ssh_agent"))  # Open MPI 4, 5
    assert shlex.split(agent) == [agent]  # TMPDIR has a space in it
    assert {"--data_dir=./image net", "--run_dir=run 1", "--device_batch=2"} < set(train)
    assert not Path(agent).parent.exists()


def test_slurm_in_a_clone_whose_path_has_a_space(here, tmp_path):
    """What stands for the launcher calls the remote shell as mpirun does: cut at spaces, from the first node."""
    cut = 'for word; do case "$word" in *=*) declare "${word//--/}" ;; esac; done'
    launcher = f'{cut}; cat "$hostfile"; $rsh_agent node3 orted'
    clone = here / "the clone"
    shutil.copytree(LAUNCH, clone / "launch")
    path = stubs(here, scontrol=SCONTROL, srun='printf "%s\\n" "$@"', **{"hvd-vgg": launcher})
    ended = slurm(here, path=path, SLURM_SUBMIT_DIR=str(clone), TMPDIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    shown, *lines = ended.stdout.splitlines()
    words = shlex.split(shown)[1:]
    assert f"--flagfile={clone}/configs/vgg16_imagenet.flags" in words
    (agent,) = given(words, "rsh_agent")
    assert Path(agent).parent.parent == tmp_path
    assert not Path(agent).parent.exists()
    assert lines[:2] == ["node0 slots=2", "node1 slots=2"]
    assert "--nodelist=node3" in lines[2:]
    assert lines[-1] == "orted"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, f"{name} is not set: this is for sbatch") for name in list(SLURM)[:3]),
        ("SLURM_NTASKS_PER_NODE", "give sbatch --ntasks-per-node=N"),
    ],
)
def test_slurm_script_outside_slurm_is_refused(here, name, message):
    refused(slurm(here, "--dry_run", **{name: ""}), 78, message)


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("by", ["mpirun", "srun"])
def test_slurm_starts_unless_by_a_dry_run(here, by, value):
    called = {"srun": "touch called", "hvd-vgg": '[[ "$*" = *--dry_run* ]] || touch called'}
    printed(slurm(here, f"--dry_run={value}", path=stubs(here, scontrol=SCONTROL, **called), HVD_VGG_LAUNCHER=by))
    assert (here / "called").exists() == (value == "false")


def test_slurm_by_srun(here):
    ended = slurm(here, "--dry_run", "--run_dir=run 1", HVD_VGG_LAUNCHER="srun", DATA_DIR="./image net")
    words = printed(ended)
    at = words.index("train")
    assert words[:at] == ["srun", "--mpi=pmix", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--gpu-bind=none", "hvd-vgg"]
    training = parse_flags(TrainConfig, words[at + 1 :])
    assert (training.data_dir, training.run_dir) == ("./image net", "run 1")


@pytest.mark.parametrize("by", ["mpirun", "srun"])
def test_slurm_runs_doctor_where_it_would_train(here, by):
    flags, path = ["--dry_run", "--run_dir=run 1"], stubs(here, scontrol=SCONTROL)
    environment = {"path": path, "HVD_VGG_LAUNCHER": by, "DATA_DIR": "./image net"}
    ended = [slurm(here, *command, *flags, **environment) for command in ([], ["doctor"])]
    assert [each.returncode for each in ended] == [0, 0], ended[1].stderr
    words = [shlex.split(each.stdout.splitlines()[0])[1:] for each in ended]
    train, doctor = [[each for each in some if not each.startswith(("--hostfile=", "--rsh_agent="))] for some in words]
    assert doctor == as_doctor(train)
    looking = parse_flags(DoctorConfig, doctor[doctor.index("doctor") + 1 :])
    assert (looking.data_dir, looking.run_dir) == ("./image net", "run 1")
    if by == "mpirun":
        composed = shlex.split(ended[1].stdout.splitlines()[1])[1:]
        assert composed[composed.index("-np") + 1] == "4"


@pytest.mark.parametrize(
    ("code", "times", "again", "flags"),
    [
        *[(0, 0, False, []), (65, 0, False, []), (81, 0, False, []), (132, 0, False, []), (139, 20, False, [])],
        *[(75, 0, True, []), (80, 19, True, []), (137, 0, True, [])],
        *[(code, 0, False, ["doctor"]) for code in (75, 78, 80, 137)],
    ],
)
def test_slurm_queues_again_what_may_end_otherwise(here, code, times, again, flags):
    path = stubs(here, scontrol=SCONTROL, srun=f"exit {code}")
    ended = slurm(here, *flags, path=path, HVD_VGG_LAUNCHER="srun", SLURM_RESTART_COUNT=str(times))
    assert ended.returncode == code, ended.stderr
    assert ("requeued 7" in ended.stdout) == again


def signalled(here, script, number, started, **environment):
    """Starts a script, sends it a signal when the file `started` is there, and returns (exit code, what it printed)."""
    process = subprocess.Popen(
        ["bash", LAUNCH / script],
        cwd=here,
        env={"HOME": str(here), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: started.exists() or process.poll() is not None)
        process.send_signal(number)
        return process.communicate(timeout=60)[0], process.returncode
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_warning_reaches_the_ranks(here, number, again):
    """A job that was warned is queued again, one that was cancelled is not."""
    rank = "trap 'sleep 0.2; exit 80' USR1; touch started; while :; do sleep 0.05; done"
    environment = {**SLURM, "PATH": stubs(here, scontrol=SCONTROL, srun=rank), "HVD_VGG_LAUNCHER": "srun"}
    out, code = signalled(here, "slurm.sbatch", number, here / "started", **environment)
    assert code == 80, out
    assert ("requeued 7" in out) == again


def test_slurm_remote_shell_is_one_step_on_that_node(here):
    path = stubs(here, srun='printf "%s\\n" "$SLURM_OVERLAP$SLURM_WHOLE" "$@"')
    ended = call("slurm_rsh.sh", "node3", "echo a b;", "orted --x 'y z'", cwd=here, PATH=path)
    lines = ended.stdout.splitlines()
    assert lines[0] == "11"
    assert "--nodelist=node3" in lines
    assert lines[-3:] == ["bash", "-c", "echo a b; orted --x 'y z'"]


# ---- images


@pytest.mark.parametrize(("ends", "code"), [("exit 3", 3), ("trap 'touch ended; exit 143' TERM; wait_for_it", 130)])
def test_dockerfile_check_that_ends_early_leaves_nothing(here, ends, code):
    wait = "wait_for_it() { touch started; while :; do sleep 0.05; done; }"
    path = stubs(here, id="echo 0", unshare=f'mkdir "$TMPDIR/made"; {wait}; {ends}')
    (here / "scratch").mkdir()
    environment = {"PATH": path, "TMPDIR": str(here / "scratch")}
    assert signalled(here, "check_dockerfile.sh", signal.SIGTERM, here / "started", **environment)[1] == code
    assert (here / "ended").exists() == (code == 130)
    assert list((here / "scratch").iterdir()) == []


def test_dockerfile_images_run_as_nobody_without_compiler():
    made = {name: [" ".join(each) for each in stage.instructions] for name, stage in stages(ROOT / "Dockerfile").items()}
    assert list(made)[-1] == "cpu"  # what `docker build .` makes
    for name in ("cpu", "nvidia", "corex"):
        users = [line for line in made[name] if line.startswith("USER ")]
        assert users[-1] == "USER 1000:1000"
        assert 'ENTRYPOINT ["hvd-vgg"]' in made[name]
        assert 'VOLUME ["/data", "/runs"]' in made[name]
        assert not any("g++" in line for line in made[name])
    # The vendor's packages are not among what the target for his image installs.
    assert not any("environment.sh" in line or "requirements" in line for line in made["corex"])
    # What a build gives reaches the script that installs them.
    given = made["corex"].index("ARG COREX_WHEELS=")
    assert "beside_vendor.sh" in next(line for line in made["corex"][given:] if line.startswith("RUN "))


# Stands for the python3 of a vendor's image: a file in ./modules for each that can be imported, `name==version` within.
VENDORS_PYTHON = """
case "$*" in
  *'pip list'*) cat modules/* ;;
  *'pip install'*)
    printf '%s\\n' "$@" >>installed
    for word; do case "$word" in
      /dev/fd/*) sed 's/^/constraint /' "$word" >>installed ;;
      *.whl) name="${word##*/}" && echo "${name%%-*}==0" >"modules/${name%%-*}" ;;
    esac; done ;;
  *find_spec*) name="${2##*find_spec(\\'}" && [ -e "modules/${name%%\\'*}" ] ;;
esac
"""


@pytest.fixture
def vendors(here):
    """A clone beside a vendor's packages, all that are needed but TensorFlow and Horovod; returns PATH."""
    (here / "modules").mkdir()
    for name in (
        "numpy",
        "absl",
        "crc32c",
        "cv2",
        "PIL",
        "psutil",
        "safetensors",
        "cloudpickle",
        "packaging",
        "yaml",
        "mpi4py",
    ):
        (here / "modules" / name).write_text(f"{name}==1.0\n")
    (here / "clone/launch/container").mkdir(parents=True)
    (here / "clone/launch/wheels").mkdir()
    shutil.copy(LAUNCH / "container/beside_vendor.sh", here / "clone/launch/container")
    for name in (
        "tensorflow-2.16.2+corex.4.4.0-cp312-cp312-linux_x86_64",
        "horovod-0.27.0+corex.4.4.0-cp312-cp312-linux_x86_64",
    ):
        (here / f"clone/launch/wheels/{name}.whl").touch()
    return stubs(here, python3=VENDORS_PYTHON, **{"hvd-vgg": "true"})


@pytest.mark.parametrize(
    "wheels",
    [
        "launch/wheels",
        "launch/wheels/tensorflow-2.16.2*.whl https://me:secret@wheels.example.com/horovod-0.27.0%2Bcorex.4.4.0-py3-none-any.whl",
    ],
)
def test_vendors_wheels_are_installed_where_its_image_has_none(here, vendors, wheels):
    """Before all else, and so that no package of the image is replaced by what they require."""
    script = here / "clone/launch/container/beside_vendor.sh"
    ended = call(script, cwd=here, PATH=vendors, COREX_WHEELS=wheels)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "secret" not in ended.stdout + ended.stderr
    lines = (here / "installed").read_text().splitlines()
    assert len([line for line in lines if line.endswith(".whl")]) == 2
    assert "--no-deps" not in lines[: lines.index("constraint numpy==1.0")]
    assert lines[-1] == str(here / "clone")


@pytest.mark.parametrize(
    ("wheels", "message"),
    [
        ({}, "python3 has no tensorflow: ask the vendor for the wheel of this image's SDK and Python"),
        ({"COREX_WHEELS": " "}, "COREX_WHEELS is blank"),
        ({"COREX_WHEELS": "/none/*.whl"}, "COREX_WHEELS: /none/*.whl: no such file"),
        ({"COREX_WHEELS": "wheels/*.whl"}, "COREX_WHEELS: {clone}/wheels/*.whl: no such file"),
    ],
)
def test_vendors_image_without_tensorflow_is_refused(here, vendors, wheels, message):
    script = here / "clone/launch/container/beside_vendor.sh"
    ended = call(script, cwd=here, PATH=vendors, **wheels)
    assert ended.returncode == 78
    assert ended.stderr.startswith(f"beside_vendor: {message.format(clone=here / 'clone')}")
    assert not (here / "installed").exists()


def test_dockerfile_context_has_what_is_copied_and_no_more():
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / each).exists() for each in wanted)
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert source == "." or Path(source).parts[0] in wanted, line


# ---- environments


def quickstart(tmp_path, *flags):
    """Runs the quickstart in an environment that has been made, with stubs; data are there."""
    clone, venv = tmp_path / "clone", tmp_path / "venv"
    shutil.copytree(LAUNCH, clone / "launch")
    (clone / "demo_data").mkdir()
    venv.mkdir()
    shutil.copy(LAUNCH / "requirements.txt", venv / "hvd_vgg-requirements.txt")
    trained = (
        'for word; do case "$word" in --run_dir=*) at="${word#*=}" ;; esac; done; mkdir -p "$at"; touch "$at/flags.txt"'
    )
    python = f'case "$*" in *version_info*) echo 3.11 ;; *) echo "{clone}" ;; esac'
    stubs(venv, python=python, **{"hvd-vgg": trained})
    return call(clone / "launch" / "quickstart.sh", *flags, cwd=clone, HVD_VGG_VENV=str(venv))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--run_dir=../first", "--lr=0.1", "--run_dir=../my run"], "../my run"), ([], "{clone}/runs/quickstart-")],
)
def test_quickstart_names_the_directory_it_trains_in(tmp_path, flags, expected):
    ended = quickstart(tmp_path, *flags)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("Training on 2 ranks in ")]
    at = line[len("Training on 2 ranks in ") :]
    assert at.startswith(expected.format(clone=tmp_path / "clone"))
    assert (tmp_path / "clone" / at / "flags.txt").exists()
    again, compared = map(shlex.split, ended.stdout.splitlines()[-2:])
    assert given(again, "run_dir") == given(compared, "same_as") == [f"{at}-one-rank"]
    assert compared[1:3] == ["verify-run", at]


def test_quickstart_refuses_a_directory_it_would_not_name(tmp_path):
    refused(quickstart(tmp_path, "--run_dir", "../run"), 64, "--run_dir: expected --run_dir=DIR")


@pytest.mark.parametrize("venv", ["/my own/venv", "venv"])
def test_environment_is_not_begun_where_horovod_cannot_build(here, venv):
    """A relative path is taken from here, whose own has a space in it."""
    path = stubs(here, **{"python3.11": "touch called"})
    ended = call("environment.sh", cwd=here, PATH=path, HVD_VGG_VENV=venv)
    message = f"environment: {venv}: Horovod cannot be built in a path with a space in it; set HVD_VGG_VENV"
    refused(ended, 78, message)
    assert not (here / "called").exists()


# Interpreters as the script asks them: whether they can be used, and which they are.
OLD, NEW = (
    f"""case "$*" in *ensurepip*) echo True ;; *'sep="."'*) echo {name} ;; *) exit 1 ;; esac""" for name in ("3.9", "3.11")
)


@pytest.mark.parametrize(
    ("wanted", "python", "made"),
    [
        ({}, NEW, "2.21"),
        ({"HVD_VGG_TENSORFLOW": "2.18"}, OLD, "mpich-5"),
        ({}, OLD, "requirements"),
        ({}, NEW, "requirements-2.16"),
        ({}, "exit 1", ""),
    ],
)
def test_environment_of_other_versions_is_left_alone(tmp_path, wanted, python, made):
    """What it was made from lies in it, and Python 3.9 has other versions than the default. One without any is made: here,
    as far as the interpreter goes."""
    path = stubs(tmp_path, **{"python3.9": python})
    venv = tmp_path / "venv"
    venv.mkdir()
    if made:
        (venv / f"hvd_vgg-{made}.txt").write_text("tensorflow-cpu==2.21.0\n")
    ended = call("environment.sh", cwd=tmp_path, HVD_VGG_VENV=venv, PATH=path, PYTHON="python3.9", **wanted)
    message = f"{venv} was made from other versions ({made}): remove it" if made else "no Python 3.9 to 3.13 with venv found"
    refused(ended, 78, f"environment: {message}")


def test_environment_of_another_python_is_left_alone(tmp_path):
    """Also one whose making was interrupted."""
    (tmp_path / "venv").mkdir()
    stubs(tmp_path / "venv", python=OLD.replace("exit 1", "exit 0"))
    environment = {"PATH": stubs(tmp_path, **{"python3.11": NEW}), "HVD_VGG_VENV": tmp_path / "venv", "PYTHON": "python3.11"}
    message = f"environment: {tmp_path / 'venv'} has Python 3.9, but PYTHON=python3.11 is another version: remove it"
    refused(call("environment.sh", cwd=tmp_path, **environment), 78, message)


def test_environment_of_tests_is_not_made_by_an_old_python(tmp_path):
    environment = {"PATH": stubs(tmp_path, **{"python3.9": OLD}), "PYTHON": "python3.9", "HVD_VGG_VENV": tmp_path / "venv"}
    ended = call("environment.sh", "--test", cwd=tmp_path, **environment)
    refused(ended, 78, "environment: --test: expected Python 3.10 to 3.13, but python3.9 is older")


def test_environment_beside_a_vendors_needs_tensorflow(here):
    """A python3 without TensorFlow is refused before anything is installed."""
    path = stubs(here, python3='case "$*" in *find_spec*) exit 1 ;; esac; exec /bin/false')
    refused(call("container/beside_vendor.sh", cwd=here, PATH=path), 78, "python3 has no tensorflow")


def test_docker_script_takes_home_in_paths(here):
    """A shell leaves ~ in --flag=~/x, and docker would be given a directory of that name."""
    paths = ["--data_dir=~/image net", "--run_dir=~/run 1", "--flagfile=~/more.flags"]
    script = ["docker_run_nvidia.sh", "--devices=1", "--dry_run", *paths]
    words = printed(call(*script, cwd=here / "the keys", HOME=str(here), PATH=stubs(here, **NVIDIA_SMI)))
    found = mounts(words)
    assert found["/data"] == (f"{here}/image net", "readonly")
    assert f"{here}/run 1" in [source for source, *_ in found.values()]
    assert f"{here}/more.flags" in [source for source, *_ in found.values()]
