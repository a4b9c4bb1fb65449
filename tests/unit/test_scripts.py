"""The launch scripts without what they start: each prints the command that it would run, and nothing else happens."""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from dockerfile import stages
from support import BIN, ROOT

from hvd_vgg.config import DoctorConfig, LaunchConfig, TrainConfig
from hvd_vgg.flags import parse_flags

LAUNCH = ROOT / "launch"
# name: image, devices on a card
DOCKER = {"bi_v150": ("hvd_vgg:corex", 2), "bi_v100": ("hvd_vgg:corex", 1), "nvidia": ("hvd_vgg:nvidia", 1)}


def call(script, *flags, cwd, **environment):
    """Runs a script of launch/ and returns it, ended."""
    passed = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(cwd), **environment}
    # An environment that the clone has would come before what a test puts on PATH.
    passed.setdefault("HVD_VGG_VENV", f"{cwd}/no environment")
    return subprocess.run(
        ["bash", LAUNCH / script, *flags], cwd=cwd, env=passed, capture_output=True, text=True, timeout=60, check=False
    )


def printed(ended):
    """Returns the words of the one command that a script printed."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("+ ")]
    return shlex.split(line)[1:]


def given(words, name):
    """Returns what all words `--name=VALUE` give."""
    return [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]


def mounts(words):
    """Returns what a container has of the host, by where it has it: the path, and "readonly" or "" """
    found = {}
    for word in given(words, "mount"):
        kind, source, target, *more = word.split(",")
        assert kind == "type=bind"
        found[target[len("target=") :]] = (source[len("source=") :], *more)
    return found


@pytest.fixture
def here(tmp_path):
    """A directory with a space in its name, with data, hosts and keys."""
    folder = tmp_path / "my own files"
    for name in ("image net", "the keys"):
        (folder / name).mkdir(parents=True)
    (folder / "more.flags").write_text("--lr=0.02\n")
    return folder


def write_hosts(here, count, devices):
    (here / "the hosts").write_text("".join(f"node{number} slots={devices}\n" for number in range(count)))


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_on_one_host(here, name, devices):
    image, _ = DOCKER[name]
    words = printed(
        call(
            f"docker_run_{name}.sh",
            "--dry_run",
            f"--devices={devices}",
            "--run_dir=runs/run 1",
            "--flagfile=more.flags",
            "--max_restarts=7",
            "--epochs=2",
            cwd=here,
            DATA_DIR="./image net",
            BATCH_SIZE="64",
            NCCL_DEBUG="INFO",
            UMD_WAITAFTERLAUNCH="1",
            DRT_MEMCPYUSEKERNEL="20000000000",
            CRT_STRICTCUDATIMINGMODE="0",
            TF_API_TOKEN="canary",  # noqa: S106 (no password)
            UMD_KEY="canary",
        )
    )
    assert not (here / "runs").exists()  # only printed
    at = words.index(image)
    docker, inside = words[:at], words[at + 1 :]
    assert docker[:2] == ["docker", "run"]
    assert all(word.startswith("--") for word in docker[2:])
    assert {"--rm", "--init", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--ulimit=memlock=-1"} < set(docker)
    assert "--privileged" not in docker
    assert given(docker, "user") == [f"{os.getuid()}:{os.getgid()}"]
    assert given(docker, "shm-size") == ["32g"]
    if name == "nvidia":
        assert (given(docker, "gpus"), given(docker, "device")) == ([str(devices)], [])
    else:
        nodes = [node for node in given(docker, "device") if node != "/dev/itrctl"]
        assert (given(docker, "gpus"), nodes) == ([], [f"/dev/iluvatar{number}" for number in range(devices)])
    assert mounts(docker) == {
        "/data": (str(here / "image net"), "readonly"),
        "/runs/run 1": (str(here / "runs" / "run 1"),),
        "/etc/hvd-vgg/flags.0": (str(here / "more.flags"), "readonly"),
    }
    # Variables go by name, so that no value is in `ps`; the secret one does not go at all.
    variables = given(docker, "env")
    assert {"NCCL_DEBUG", "UMD_WAITAFTERLAUNCH", "DRT_MEMCPYUSEKERNEL", "CRT_STRICTCUDATIMINGMODE"} < set(variables)
    assert not any("TOKEN" in each or "KEY" in each.split("=")[0] or "canary" in each for each in words)
    split = inside.index("train")
    assert inside[0] == "launch"
    launching = parse_flags(LaunchConfig, inside[1:split])
    assert (launching.ranks, launching.hostfile, launching.max_restarts) == (devices, "", 7)
    flags = [
        word.replace("/opt/hvd_vgg", str(ROOT)).replace("/etc/hvd-vgg/flags.0", str(here / "more.flags"))
        for word in inside[split + 1 :]
    ]
    training = parse_flags(TrainConfig, flags)
    assert (training.data_dir, training.run_dir) == ("/data", "/runs/run 1")
    assert (training.device_batch, training.epochs, training.lr, training.model) == (64, 2, 0.02, "vgg16")


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_on_several_hosts(here, name, devices, hosts):
    write_hosts(here, hosts, devices)
    flags = [f"--devices={devices}", "--data_dir=image net", "--run_dir=run 1", "--ssh_dir=the keys", "--dry_run"]
    words = printed(call(f"docker_run_{name}.sh", "--hostfile=the hosts", *flags, cwd=here))
    worker = printed(call(f"docker_run_{name}.sh", "--worker", *flags, cwd=here))
    image, _ = DOCKER[name]
    at = words.index(image)
    # A worker has all that the launcher's host has, for its own ranks.
    assert [word for word in words[:at] if ",target=/etc/hvd-vgg/hosts," not in word] == [
        word for word in worker[: worker.index(image)] if not word.startswith(("--entrypoint", "--cap-add"))
    ]
    assert "--network=host" in words[:at]
    seen = mounts(words)
    assert seen["/etc/hvd-vgg/hosts"] == (str(here / "the hosts"), "readonly")
    assert seen["/etc/hvd-vgg/ssh"] == (str(here / "the keys"), "readonly")
    assert seen["/etc/passwd"] == (str(here / "the keys" / "passwd"), "readonly")
    launching = parse_flags(LaunchConfig, words[at + 2 : words.index("train", at)])
    assert (launching.hostfile, launching.rsh_agent, launching.ranks) == ("/etc/hvd-vgg/hosts", "hvd-vgg-ssh", 0)
    assert given(worker, "entrypoint") == ["/usr/sbin/sshd"]
    assert worker[worker.index(image) + 1 :] == ["-D", "-e", "-f", "/etc/hvd-vgg/sshd_config"]


def without_restarts(words):
    """Returns the words of a command without what is for training alone."""
    return [word for word in words if not word.startswith("--max_restarts=")]


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_runs_doctor_where_it_would_train(here, name, devices, hosts):
    write_hosts(here, hosts, devices)
    flags = [f"--devices={devices}", "--data_dir=image net", "--run_dir=run 1", "--lr=0.02", "--dry_run"]
    flags += ["--hostfile=the hosts", "--ssh_dir=the keys"] if hosts > 1 else []
    train = printed(call(f"docker_run_{name}.sh", *flags, cwd=here))
    doctor = printed(call(f"docker_run_{name}.sh", "doctor", *flags, "--collectives", cwd=here))
    at = train.index("train")
    assert doctor == without_restarts([*train[:at], "doctor", *train[at + 1 :], "--collectives"])
    assert "--max_restarts=20" in train
    inside = [word.replace("/opt/hvd_vgg", str(ROOT)) for word in doctor[doctor.index("doctor") + 1 :]]
    looking = parse_flags(DoctorConfig, inside)
    assert (looking.data_dir, looking.run_dir, looking.collectives, looking.lr) == ("/data", "/runs/run 1", True, 0.02)


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("what", ["train", "doctor"])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_without_mpi(here, name, devices, what):
    flags = ["--gloo", f"--devices={devices}", "--data_dir=image net", "--run_dir=run 1", "--dry_run"]
    words = printed(call(f"docker_run_{name}.sh", *(["doctor"] if what == "doctor" else []), *flags, cwd=here))
    image, _ = DOCKER[name]
    at = words.index(image)
    assert given(words[:at], "entrypoint") == ["horovodrun"]
    assert words[at + 1 : at + 6] == ["--gloo", "-np", str(devices), "hvd-vgg", what]
    inside = [word.replace("/opt/hvd_vgg", str(ROOT)) for word in words[at + 6 :]]
    assert parse_flags(DoctorConfig if what == "doctor" else TrainConfig, inside).run_dir == "/runs/run 1"


@pytest.mark.parametrize(("name", "cards", "devices"), [("bi_v150", 8, 16), ("bi_v100", 8, 8), ("bi_v150", 1, 2)])
def test_a_card_is_one_device_or_two(here, name, cards, devices):
    words = printed(call(f"docker_run_{name}.sh", "--dry_run", f"--cards={cards}", "--data_dir=image net", cwd=here))
    assert given(words, "ranks") == [str(devices)]


@pytest.mark.parametrize("access", ["runtime", "privileged"])
def test_the_vendors_other_ways_to_the_devices(here, access):
    words = printed(
        call("docker_run_bi_v150.sh", "--dry_run", "--devices=4", f"--access={access}", "--data_dir=image net", cwd=here)
    )
    assert given(words, "device") == []
    assert (
        ("--privileged" in words) == ("--pid=host" in words) == ("--volume=/dev:/dev" in words) == (access == "privileged")
    )
    assert ("--cap-drop=ALL" in words) == (access == "runtime")
    if access == "runtime":
        assert given(words, "runtime") == ["iluvatar"]
        assert "IX_VISIBLE_DEVICES=0,1,2,3" in given(words, "env")
    assert given(words, "ranks") == ["4"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--devices=0"], "--devices=0: expected a number of 1 or more"),
        (["--devices=all"], "--devices=all"),
        (["--cards=2", "--devices=4"], "--cards=2: expected a number of 1 or more, and no --devices"),
        (["--devices=2", "--access=root"], "--access=root: expected"),
        (
            ["--devices=2", "--data_dir=nowhere"],
            "nowhere: no such file or directory; give the TFRecords' by --data_dir=DIR or DATA_DIR",
        ),
        (["--devices=2", "--data_dir=a,b"], "a,b: docker cannot mount"),
        (["--devices=2", "--hostfile=the hosts"], "several hosts need --ssh_dir=DIR"),
        (["--devices=2", "--rsh_agent=ssh"], "--rsh_agent: not in a container"),
        (["--devices=2", "--flagfile=nothing.flags"], "nothing.flags: no such file"),
        (["--devices=2", "--gloo", "--hostfile=the hosts", "--ssh_dir=the keys"], "--gloo: horovodrun starts"),
        (["--devices=2", "--gloo", "--grace_seconds=5"], "--gloo: horovodrun starts"),
        (["--devices=2", "--gloo", "--worker", "--ssh_dir=the keys"], "--gloo: horovodrun starts"),
        (["doctor", "--devices=2", "--worker", "--ssh_dir=the keys"], "doctor: only where --hostfile is given"),
    ],
)
@pytest.mark.parametrize("name", DOCKER)
def test_docker_refuses_what_would_fail_later(here, name, flags, told):
    write_hosts(here, 1, 2)
    (here / "a,b").mkdir()
    ended = call(f"docker_run_{name}.sh", "--data_dir=image net", *flags, "--dry_run", cwd=here)
    assert ended.returncode == 78, ended.stdout
    assert told in ended.stderr
    assert "+ docker" not in ended.stdout


@pytest.mark.parametrize(("flags", "taken"), [([], [5, 0, 12]), (["--devices=2"], [5, 0])])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_takes_the_devices_that_the_host_leaves_it(here, name, flags, taken):
    call_flags = ["--dry_run", "--data_dir=image net", *flags]
    words = printed(call(f"docker_run_{name}.sh", *call_flags, cwd=here, CUDA_VISIBLE_DEVICES="5,0,12"))
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
    ("access", "told"), [("runtime", "IX_VISIBLE_DEVICES=5,0"), ("privileged", "CUDA_VISIBLE_DEVICES=5,0")]
)
def test_the_vendors_other_ways_keep_to_what_the_host_leaves(here, access, told):
    flags = ["--dry_run", "--data_dir=image net", f"--access={access}"]
    words = printed(call("docker_run_bi_v150.sh", *flags, cwd=here, CUDA_VISIBLE_DEVICES="5,0"))
    assert told in given(words, "env")
    assert given(words, "ranks") == ["2"]
    write_hosts(here, 2, 2)
    several = ["--hostfile=the hosts", "--ssh_dir=the keys"]
    ended = call("docker_run_bi_v150.sh", *flags, *several, cwd=here, CUDA_VISIBLE_DEVICES="5,0")
    assert (ended.returncode == 78) == (access == "privileged")
    assert ("cannot be kept with --access=privileged on several hosts" in ended.stderr) == (access == "privileged")


@pytest.mark.parametrize(
    ("mask", "flags", "told"),
    [
        ("0,1", ["--devices=8"], "8 devices asked for; CUDA_VISIBLE_DEVICES=0,1 leaves 2: ask for no more, or unset it"),
        ("", [], "CUDA_VISIBLE_DEVICES=: expected numbers of devices"),
        ("GPU-8932f937", [], "CUDA_VISIBLE_DEVICES=GPU-8932f937: expected numbers of devices"),
        ("1,1", [], "CUDA_VISIBLE_DEVICES=1,1 names a device twice"),
    ],
)
@pytest.mark.parametrize("name", DOCKER)
def test_docker_refuses_devices_that_it_cannot_give(here, name, mask, flags, told):
    ended = call(f"docker_run_{name}.sh", "--data_dir=image net", "--dry_run", *flags, cwd=here, CUDA_VISIBLE_DEVICES=mask)
    assert ended.returncode == 78, ended.stdout
    assert told in ended.stderr
    assert "+ docker" not in ended.stdout


def test_a_device_that_the_host_does_not_show_starts_nothing(here):
    path = stand_ins(here, docker="touch called", **{"nvidia-smi": "for i in 0 1 2 3; do echo GPU $i: H; done"})
    ended = call("docker_run_nvidia.sh", "--data_dir=image net", cwd=here, PATH=path, CUDA_VISIBLE_DEVICES="3,4")
    assert ended.returncode == 78
    assert "CUDA_VISIBLE_DEVICES=3,4: this host shows 4, counted from 0" in ended.stderr
    assert not (here / "called").exists()


@pytest.mark.parametrize("name", DOCKER)
def test_more_devices_than_there_are_start_nothing(here, name):
    ended = call(f"docker_run_{name}.sh", "--data_dir=image net", "--devices=9999", cwd=here)
    assert ended.returncode == 78
    assert "9999 devices asked for; this host shows " in ended.stderr


def test_what_is_printed_is_what_is_run(here):
    """The script becomes docker, here a stand-in that says what it was called with."""
    write_hosts(here, 2, 4)
    path = stand_ins(
        here, docker='printf "%s\\0" docker "$@" > called', **{"nvidia-smi": "for i in 0 1 2 3; do echo GPU $i: H; done"}
    )
    flags = ["--data_dir=image net", "--run_dir=runs/run 1", "--hostfile=the hosts", "--ssh_dir=the keys"]
    words = printed(call("docker_run_nvidia.sh", *flags, cwd=here, PATH=path))
    assert (here / "called").read_text().split("\0")[:-1] == words
    assert given(words, "gpus") == ["4"]
    assert (here / "runs" / "run 1").is_dir()
    users = [line.split(":") for line in (here / "the keys" / "passwd").read_text().splitlines()]
    assert str(os.getuid()) in [user[2] for user in users]
    assert all(len(user) == 7 for user in users)


@pytest.mark.parametrize("flags", [["--dry_run=true"], ["--dry_run=false", "--dry_run"]])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_is_not_started_by_a_dry_run(here, name, flags):
    path = stand_ins(here, docker="touch called")
    printed(call(f"docker_run_{name}.sh", "--data_dir=image net", "--devices=2", *flags, cwd=here, PATH=path))
    assert not (here / "called").exists()


def test_docker_is_started_by_what_is_no_dry_run(here):
    path = stand_ins(here, docker="touch called", **{"nvidia-smi": "echo GPU 0: H"})
    printed(call("docker_run_nvidia.sh", "--data_dir=image net", "--dry_run=false", cwd=here, PATH=path))
    assert (here / "called").exists()


# Scripts that train or run doctor, and how they say what they would start.
TRAIN = [*(f"docker_run_{name}.sh" for name in DOCKER), "run_train_vgg16_imagenet.sh"]
TRAIN += ["run_train_vgg16_multigpu_imagenet.sh", "slurm.sbatch"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--devices", "2"], "--devices 2: expected --devices=2"),
        (["--ranks", "8"], "--ranks 8: expected --ranks=8"),
        (["--epochs", "2"], "--epochs 2: expected --epochs=2"),
        (["docter"], "docter: expected --FLAG=VALUE, or the word doctor"),
        (["doctor", "--lr=0.1", "again"], "again: expected --FLAG=VALUE, or the word doctor"),
        (["--dry_run=yes"], "--dry_run=yes: expected --dry_run, --dry_run=true or --dry_run=false"),
    ],
)
@pytest.mark.parametrize("script", TRAIN)
def test_words_that_are_no_flags_are_refused(here, script, flags, told):
    path = stand_ins(here, **dict.fromkeys(["docker", "srun", "hvd-vgg"], "touch called"))
    ended = call(script, "--data_dir=image net", *flags, cwd=here, **{**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": "2"})
    assert (ended.returncode, ended.stdout) == (64, ""), ended.stderr
    assert ended.stderr == f"{script.replace('16_imagenet', '16_multigpu_imagenet')}: {told}\n"
    assert not (here / "called").exists()


VALUED = [
    "image",
    "devices",
    "cards",
    "access",
    "shm_size",
    "data_dir",
    "run_dir",
    "flagfile",
    "hostfile",
    "ssh_dir",
    "network",
]


@pytest.mark.parametrize("flag", [*VALUED, "docker"])
@pytest.mark.parametrize("equals", ["", "="])
def test_docker_refuses_its_own_flags_without_a_value(here, flag, equals):
    words = ["--data_dir=image net", "--devices=2", "--dry_run", f"--{flag}{equals}"]
    ended = call("docker_run_bi_v150.sh", *words, cwd=here)
    assert (ended.returncode, ended.stdout) == (64, "")
    assert ended.stderr == f"docker_run_bi_v150.sh: --{flag}{equals}: expected --{flag}=VALUE\n"


@pytest.mark.parametrize("name", DOCKER)
def test_docker_tells_the_launcher_which_network_hosts_speak_over(here, name):
    """Containers of several hosts have their hosts' networks."""
    write_hosts(here, 2, 2)
    several = ["--data_dir=image net", "--devices=2", "--ssh_dir=the keys", "--network=eth1", "--dry_run"]
    words = printed(call(f"docker_run_{name}.sh", "--hostfile=the hosts", *several, cwd=here))
    at = words.index(DOCKER[name][0])
    assert given(words[:at], "network") == ["host"]
    assert parse_flags(LaunchConfig, words[at + 2 : words.index("train", at)]).network == "eth1"
    # A worker may have the same words; it starts nothing.
    assert given(printed(call(f"docker_run_{name}.sh", "--worker", *several, cwd=here)), "network") == ["host"]
    ended = call(f"docker_run_{name}.sh", *several, cwd=here)
    assert (ended.returncode, ended.stdout) == (78, "")
    assert "--network=eth1: between hosts, where --hostfile is given" in ended.stderr


@pytest.mark.parametrize("more", [[], ["--gloo"], ["--worker", "--ssh_dir=the keys"]])
@pytest.mark.parametrize("name", DOCKER)
def test_docker_gets_further_options_before_the_image(here, name, more):
    options = ["--volume=/opt/lib/a,b.so:/usr/lib/a b.so:ro", "--group-add", "video"]
    words = ["--data_dir=image net", "--devices=2", "--dry_run", *more, *(f"--docker={option}" for option in options)]
    found = printed(call(f"docker_run_{name}.sh", *words, cwd=here))
    at = found.index(options[0])
    assert found[at : at + 3] == options
    assert at < found.index(DOCKER[name][0])


@pytest.mark.parametrize("script", TRAIN)
def test_help_is_the_head_of_the_script(here, script):
    """Also where there is no environment yet, and outside Slurm."""
    ended = call(script, "doctor", "--help", cwd=here, PATH="/usr/bin:/bin", HVD_VGG_VENV=str(here))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == head(LAUNCH / script)
    assert "--dry_run" in ended.stdout
    assert "DATA_DIR" in ended.stdout


@pytest.mark.parametrize(
    "script",
    [
        "check_dockerfile.sh",
        "container/beside_vendor.sh",
        "environment.sh",
        "kubernetes/doctor.sh",
        "quickstart.sh",
        "test.sh",
        "versions.sh",
    ],
)
def test_help_of_the_scripts_that_train_nothing(here, script):
    ended = call(script, "--help", cwd=here, PATH="/usr/bin:/bin", HVD_VGG_VENV=str(here))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == head(LAUNCH / script)
    assert f"bash launch/{script}" in ended.stdout


def head(path):
    """Returns the comment that a script begins with, after the line that says what runs it."""
    lines = path.read_text().splitlines()[1:]
    end = next(at for at, line in enumerate(lines) if line != "#" and not line.startswith("# "))
    return "".join(f"{line[2:]}\n" for line in lines[:end])


def of_mpirun(words):
    """Returns what an mpirun command says of ranks and hosts, and the training's own flags."""
    at = words.index("-np")
    hosts = words[words.index("--host") + 1].split(",") if "--host" in words else []
    return int(words[at + 1]), hosts, words[words.index("train") + 1 :]


@pytest.mark.parametrize("ranks", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_multigpu_script(here, ranks, hosts):
    write_hosts(here, hosts, ranks)
    flags = ["--dry_run", "--run_dir=run 1", "--lr=0.02"]
    flags += [f"--ranks={ranks}"] if hosts == 1 else ["--hostfile=the hosts"]
    script = "run_train_vgg16_multigpu_imagenet.sh"
    ended = call(script, *flags, cwd=here, DATA_DIR="./image net", BATCH_SIZE="64", PYTHONPATH=str(ROOT))
    started, named, train = of_mpirun(printed(ended))
    assert started == min(ranks * hosts, 256)  # the global batch
    assert named == ([f"node{number}:{ranks}" for number in range(hosts)] if hosts > 1 else [])
    training = parse_flags(TrainConfig, train)
    assert (training.data_dir, training.run_dir, training.lr, training.device_batch) == ("./image net", "run 1", 0.02, 64)
    assert not (here / "run 1").exists()


@pytest.mark.parametrize("ranks", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_multigpu_script_runs_doctor_where_it_would_train(here, ranks, hosts):
    write_hosts(here, hosts, ranks)
    flags = ["--dry_run", "--run_dir=run 1", "--lr=0.02"]
    flags += [f"--ranks={ranks}"] if hosts == 1 else ["--hostfile=the hosts"]
    script, environment = "run_train_vgg16_multigpu_imagenet.sh", {"DATA_DIR": "./image net", "PYTHONPATH": str(ROOT)}
    train = printed(call(script, *flags, cwd=here, **environment))
    doctor = printed(call(script, "doctor", *flags, cwd=here, **environment))
    assert no_tokens(doctor) == no_tokens(["doctor" if word == "train" else word for word in train])
    looking = parse_flags(DoctorConfig, doctor[doctor.index("doctor") + 1 :])
    assert (looking.data_dir, looking.run_dir, looking.lr) == ("./image net", "run 1", 0.02)


def no_tokens(words):
    """Returns the words of an mpirun command without what differs from start to start, and from command to command."""
    at = words.index("hvd_vgg_job")
    return [word for word in [*words[:at], *words[at + 2 :]] if not word.startswith("--console=")]


def test_the_script_for_one_device_runs_doctor(here):
    ended = call("run_train_vgg16_imagenet.sh", "doctor", "--dry_run", cwd=here, PYTHONPATH=str(ROOT))
    words = printed(ended)
    assert words[words.index("-np") + 1] == "1"
    assert words[words.index("hvd_vgg") + 1] == "doctor"


def test_the_script_for_one_device(here):
    ended = call("run_train_vgg16_imagenet.sh", "--dry_run", cwd=here, DATA_DIR="./image net", PYTHONPATH=str(ROOT))
    started, named, train = of_mpirun(printed(ended))
    assert (started, named) == (1, [])
    assert "--data_dir=./image net" in train


def stand_ins(here, **programs):
    """Writes shell programs that stand for Slurm's, and returns PATH with them first."""
    folder = here / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"


SLURM = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-3]", "PYTHONPATH": str(ROOT)}
# `show hostnames` names COUNT nodes; `requeue` leaves a word.
SCONTROL = 'if [ "$1" = requeue ]; then echo "requeued $2"; else for ((i = 0; i < COUNT; i++)); do echo "node$i"; done; fi'


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_slurm_by_mpirun(here, devices, hosts):
    path = stand_ins(here, scontrol=SCONTROL)
    environment = {**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": str(devices), "COUNT": str(hosts), "TMPDIR": str(here)}
    ended = call("slurm.sbatch", "--dry_run", "--run_dir=run 1", cwd=here, DATA_DIR="./image net", **environment)
    shown, run = [shlex.split(line)[1:] for line in ended.stdout.splitlines()]
    assert shown[:2] == ["hvd-vgg", "launch"]
    started, named, train = of_mpirun(run)
    assert (started, named) == (min(devices * hosts, 256), [f"node{number}:{devices}" for number in range(hosts)])
    agent = run[run.index("plm_rsh_agent") + 1]
    assert shlex.split(agent) == [agent]  # TMPDIR has a space in it
    assert {"--data_dir=./image net", "--run_dir=run 1"} < set(train)
    assert not Path(agent).parent.exists()


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_slurm_in_a_clone_whose_path_has_a_space(here, tmp_path, devices, hosts):
    """What stands for the launcher calls the remote shell as mpirun does: cut at spaces, from the first node."""
    cut = 'for word; do case "$word" in *=*) declare "${word//--/}" ;; esac; done'
    launcher = f'{cut}; cat "$hostfile"; $rsh_agent node3 orted'
    clone = here / "the clone"
    shutil.copytree(LAUNCH, clone / "launch")
    path = stand_ins(
        here,
        scontrol=SCONTROL,
        srun='printf "%s\\n" "$@"',
        **{"hvd-vgg": launcher},
    )
    environment = {**SLURM, "SLURM_SUBMIT_DIR": str(clone), "PATH": path, "COUNT": str(hosts), "TMPDIR": str(tmp_path)}
    ended = call("slurm.sbatch", cwd=here, SLURM_NTASKS_PER_NODE=str(devices), **environment)
    assert ended.returncode == 0, ended.stderr
    shown, *lines = ended.stdout.splitlines()
    words = shlex.split(shown)[1:]
    assert f"--flagfile={clone}/configs/vgg16_imagenet.flags" in words
    (agent,) = given(words, "rsh_agent")
    assert Path(agent).parent.parent == tmp_path
    assert not Path(agent).parent.exists()
    assert lines[:hosts] == [f"node{number} slots={devices}" for number in range(hosts)]
    assert "--nodelist=node3" in lines[hosts:]
    assert lines[-1] == "orted"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SLURM_SUBMIT_DIR", "SLURM_SUBMIT_DIR is not set: this is for sbatch"),
        ("SLURM_JOB_ID", "SLURM_JOB_ID is not set: this is for sbatch"),
        ("SLURM_JOB_NODELIST", "SLURM_JOB_NODELIST is not set: this is for sbatch"),
        ("SLURM_NTASKS_PER_NODE", "give sbatch --ntasks-per-node=N"),
    ],
)
def test_what_is_no_job_of_slurm_is_told_so(here, name, told):
    environment = {**SLURM, "SLURM_NTASKS_PER_NODE": "2", name: ""}
    ended = call("slurm.sbatch", "--dry_run", cwd=here, **environment)
    assert (ended.returncode, ended.stdout) == (78, "")
    assert told in ended.stderr


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("by", ["mpirun", "srun"])
def test_slurm_starts_what_is_no_dry_run(here, by, value):
    path = stand_ins(here, scontrol=SCONTROL, srun="touch called", **{"hvd-vgg": '[[ "$*" = *--dry_run* ]] || touch called'})
    environment = {**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": "2", "COUNT": "1", "HVD_VGG_LAUNCHER": by}
    printed(call("slurm.sbatch", f"--dry_run={value}", cwd=here, **environment))
    assert (here / "called").exists() == (value == "false")


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
def test_slurm_by_srun(here, devices):
    environment = {**SLURM, "SLURM_NTASKS_PER_NODE": str(devices), "HVD_VGG_LAUNCHER": "srun", "DATA_DIR": "./image net"}
    words = printed(call("slurm.sbatch", "--dry_run", "--run_dir=run 1", cwd=here, **environment))
    at = words.index("train")
    assert words[:at] == [
        "srun",
        "--mpi=pmix",
        f"--ntasks-per-node={devices}",
        "--kill-on-bad-exit=1",
        "--gpu-bind=none",
        "hvd-vgg",
    ]
    training = parse_flags(TrainConfig, words[at + 1 :])
    assert (training.data_dir, training.run_dir) == ("./image net", "run 1")


@pytest.mark.parametrize("devices", [1, 8, 16, 32])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("by", ["mpirun", "srun"])
def test_slurm_runs_doctor_where_it_would_train(here, by, devices, hosts):
    path = stand_ins(here, scontrol=SCONTROL)
    environment = {**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": str(devices), "COUNT": str(hosts)}
    environment.update(HVD_VGG_LAUNCHER=by, DATA_DIR="./image net", TMPDIR=str(here))
    ended = [
        call("slurm.sbatch", *what, "--dry_run", "--run_dir=run 1", cwd=here, **environment) for what in ([], ["doctor"])
    ]
    assert [each.returncode for each in ended] == [0, 0], ended[1].stderr
    train, doctor = [shlex.split(each.stdout.splitlines()[0])[1:] for each in ended]
    fixed = [[word for word in words if not word.startswith(("--hostfile=", "--rsh_agent="))] for words in (train, doctor)]
    assert fixed[1] == without_restarts(["doctor" if word == "train" else word for word in fixed[0]])
    looking = parse_flags(DoctorConfig, doctor[doctor.index("doctor") + 1 :])
    assert (looking.data_dir, looking.run_dir) == ("./image net", "run 1")
    if by == "mpirun":
        composed = shlex.split(ended[1].stdout.splitlines()[1])[1:]
        assert composed[composed.index("-np") + 1] == str(min(devices * hosts, 256))


@pytest.mark.parametrize("code", [75, 78, 80, 137])
def test_slurm_queues_no_doctor_again(here, code):
    path = stand_ins(here, scontrol=SCONTROL, srun=f"exit {code}")
    environment = {**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": "2", "HVD_VGG_LAUNCHER": "srun"}
    ended = call("slurm.sbatch", "doctor", cwd=here, **environment)
    assert (ended.returncode, "requeued" in ended.stdout) == (code, False)


@pytest.mark.parametrize(
    ("code", "times", "again"),
    [
        (0, 0, False),
        (65, 0, False),
        (81, 0, False),
        (132, 0, False),
        (75, 0, True),
        (80, 19, True),
        (137, 0, True),
        (139, 20, False),
    ],
)
def test_slurm_queues_again_what_may_end_otherwise(here, code, times, again):
    path = stand_ins(here, scontrol=SCONTROL, srun=f"exit {code}")
    environment = {**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": "2", "HVD_VGG_LAUNCHER": "srun"}
    ended = call("slurm.sbatch", cwd=here, SLURM_RESTART_COUNT=str(times), **environment)
    assert ended.returncode == code, ended.stderr
    assert ("requeued 7" in ended.stdout) == again


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurms_warning_reaches_the_ranks_and_a_cancelled_job_is_not_queued_again(here, number, again):
    path = stand_ins(
        here, scontrol=SCONTROL, srun="trap 'sleep 0.2; exit 80' USR1; touch started; while :; do sleep 0.05; done"
    )
    environment = {**SLURM, "PATH": path, "SLURM_NTASKS_PER_NODE": "2", "HVD_VGG_LAUNCHER": "srun", "HOME": str(here)}
    script = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch"],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (here / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        script.send_signal(number)
        out = script.communicate(timeout=60)[0]
    finally:
        script.kill()
        script.wait()
    assert script.returncode == 80, out
    assert ("requeued 7" in out) == again


def test_the_remote_shell_of_a_slurm_job_is_one_step_on_that_node(here):
    path = stand_ins(here, srun='printf "%s\\n" "$SLURM_OVERLAP$SLURM_WHOLE" "$@"')
    ended = call("slurm_rsh.sh", "node3", "echo a b;", "orted --x 'y z'", cwd=here, PATH=path)
    lines = ended.stdout.splitlines()
    assert lines[0] == "11"
    assert "--nodelist=node3" in lines
    assert lines[-3:] == ["bash", "-c", "echo a b; orted --x 'y z'"]


@pytest.mark.parametrize(("ends", "code"), [("exit 3", 3), ("trap 'touch ended; exit 143' TERM; wait_for_it", 130)])
def test_a_check_of_the_dockerfile_that_fails_or_is_ended_leaves_nothing(here, ends, code):
    wait = "wait_for_it() { touch started; while :; do sleep 0.05; done; }"
    path = stand_ins(here, id="echo 0", unshare=f'mkdir "$TMPDIR/made"; {wait}; {ends}')
    (here / "scratch").mkdir()
    environment = {"PATH": path, "HOME": str(here), "TMPDIR": str(here / "scratch")}
    script = subprocess.Popen(["bash", LAUNCH / "check_dockerfile.sh"], cwd=here, env=environment)
    try:
        deadline = time.monotonic() + 60
        while script.poll() is None and not (here / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        script.terminate()
        script.wait(timeout=60)
    finally:
        script.kill()
        script.wait()
    assert script.returncode == code
    assert (here / "ended").exists() == (code == 130)
    assert list((here / "scratch").iterdir()) == []


def test_every_image_runs_as_nobody_and_holds_no_compiler_of_its_own():
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


def test_the_dockerfile_passes_its_linter():
    subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], check=True)


def test_the_context_of_the_images_has_what_is_copied_and_no_more():
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / each).exists() for each in wanted)
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert source == "." or Path(source).parts[0] in wanted, line


def quickstart(tmp_path, *flags):
    """Runs the quickstart in an environment that has been made, with stand-ins; data are there."""
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    (tmp_path / "clone" / "demo_data").mkdir()
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(LAUNCH / "requirements.txt", venv / "hvd_vgg-requirements.txt")
    trained = (
        'for word; do case "$word" in --run_dir=*) at="${word#*=}" ;; esac; done; mkdir -p "$at"; touch "$at/flags.txt"'
    )
    for name, text in {"python": f"echo '{tmp_path / 'clone'}'", "hvd-vgg": trained}.items():
        (venv / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (venv / "bin" / name).chmod(0o755)
    script = tmp_path / "clone" / "launch" / "quickstart.sh"
    return call(script, *flags, cwd=tmp_path / "clone", HVD_VGG_VENV=str(venv))


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--run_dir=../first", "--lr=0.1", "--run_dir=../my run"], "../my run"), ([], "{clone}/runs/quickstart-")],
)
def test_the_quickstart_names_the_directory_that_it_trains_in(tmp_path, flags, told):
    ended = quickstart(tmp_path, *flags)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("Training on 2 ranks in ")]
    at = line[len("Training on 2 ranks in ") :]
    assert at.startswith(told.format(clone=tmp_path / "clone"))
    assert (tmp_path / "clone" / at / "flags.txt").exists()
    assert given(shlex.split(ended.stdout.splitlines()[-1]), "run_dir") == [f"{at}-one-rank"]


def test_the_quickstart_refuses_a_directory_that_it_would_not_name(tmp_path):
    ended = quickstart(tmp_path, "--run_dir", "../run")
    assert (ended.returncode, ended.stdout) == (64, "")
    assert "--run_dir: expected --run_dir=DIR" in ended.stderr


@pytest.mark.parametrize("venv", ["/my own/venv", "venv"])
def test_an_environment_is_not_begun_where_horovod_cannot_be_built(here, venv):
    """A relative path is taken from here, whose own has a space in it."""
    path = stand_ins(here, **{"python3.11": "touch called"})
    ended = call("environment.sh", cwd=here, PATH=path, HVD_VGG_VENV=venv)
    assert (ended.returncode, ended.stdout) == (78, "")
    assert ended.stderr.startswith(
        f"environment: {venv}: Horovod cannot be built in a path with a space in it; set HVD_VGG_VENV"
    )
    assert not (here / "called").exists()


def test_what_is_beside_a_vendors_packages_needs_them_there(here):
    """A python3 without TensorFlow is told so, before anything is installed."""
    path = stand_ins(here, python3='case "$*" in *find_spec*) exit 1 ;; esac; exec /bin/false')
    ended = call("container/beside_vendor.sh", cwd=here, PATH=path)
    assert ended.returncode == 78
    assert "python3 has no tensorflow" in ended.stderr
