"""Tests the Dockerfile without docker: reads its instructions, and executes those of a target on a copy of this machine.

Run by launch/check_dockerfile.sh, it executes the targets cpu and corex and trains in what they make. The copy is an
overlay that is removed at the end; this machine and this Python stand for the base image, which is therefore not tested.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[2]
# This Python stands for the image's.
PYTHON = Path(sys.base_prefix).resolve() / "bin" / "python3.11"
PATH = f"{PYTHON.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOBODY = shlex.split("setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all")
SMOKE = ["train", "--flagfile=/opt/hvd_vgg/configs/smoke.flags", "--data_dir=/runs/demo"]
# What an instruction may see of this machine's environment: the way to package indexes.
_PASSED = re.compile(r"\w+_proxy|PIP_\w+|SSL_CERT_FILE|REQUESTS_CA_BUNDLE", re.I)


# A writable copy of this machine at $1, whose changes are in memory at $2.
_MOUNTS = """
mkdir -p "$1" "$2"
mount -t tmpfs -o size=5g tmpfs "$2"
mkdir "$2/upper" "$2/work"
mount -t overlay -o "lowerdir=/,upperdir=$2/upper,workdir=$2/work" overlay "$1"
mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
mount -t tmpfs tmpfs "$1/dev"
for name in null zero full random urandom tty; do
  touch "$1/dev/$name"
  mount --bind "/dev/$name" "$1/dev/$name"
done
ln -s /proc/self/fd "$1/dev/fd"
ln -s fd/0 "$1/dev/stdin"
ln -s fd/1 "$1/dev/stdout"
ln -s fd/2 "$1/dev/stderr"
ln -s pts/ptmx "$1/dev/ptmx"
mkdir "$1/dev/pts" "$1/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$1/dev/pts"
for name in dev/shm tmp; do
  mount -t tmpfs -o mode=1777 tmpfs "$1/$name"
done
"""


class Stage(NamedTuple):
    """A stage of a Dockerfile: its name, what it is made from, and its instructions with their arguments."""

    name: str
    base: str
    instructions: List[Tuple[str, str]]


def stages(path: Path) -> Dict[str, Stage]:
    """Returns the stages of a Dockerfile by name, in order; lines joined, without comments and what comes before FROM."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    found: Dict[str, Stage] = {}
    stage = Stage("", "", [])
    for line in filter(None, (line.strip() for line in text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found.setdefault(name, Stage(name, base, []))
        else:
            stage.instructions.append((instruction, rest.strip()))
    return found


class Container:
    """A stage as far as it was carried out: its root directory, environment, working directory and user."""

    def __init__(self, folder: Path) -> None:
        self.root, self.layers = folder / "root", folder / "layers"
        self.cwd, self.user = "/", ""
        self.entrypoint: List[str] = []
        self.environment = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
        self.environment.update(PATH=PATH, HOME="/root")
        subprocess.run(["bash", "-euc", _MOUNTS, "_", str(self.root), str(self.layers)], check=True)
        # The image has no user yet.
        for name in ("passwd", "group"):
            lines = (self.root / "etc" / name).read_text().splitlines(keepends=True)
            (self.root / "etc" / name).write_text("".join(line for line in lines if ":1000:" not in line))
        # Nor anything half installed, as this machine may have: apt-get would refuse to go on.
        self.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--configure", "-a")
        # Everybody may use an image's Python.
        for each in PYTHON.resolve().parents:
            inside = self.root / str(each).lstrip("/")
            inside.chmod(inside.stat().st_mode | 0o011)

    def remove(self) -> None:
        """Gives back its memory. Its directories are empty then; one that is not stays."""
        subprocess.run(["umount", "--recursive", "--lazy", str(self.root)], check=True)
        subprocess.run(["umount", "--lazy", str(self.layers)], check=True)
        for folder in (self.root, self.layers, self.root.parent):
            folder.rmdir()

    def command(self, words: List[str], prefix: Tuple[str, ...] = ()) -> List[str]:
        """Returns the command that runs `words` in it, as its user: who has no capability and may not gain any."""
        inside = f"cd {shlex.quote(self.cwd)} && exec {shlex.join([*(NOBODY if self.user else []), *words])}"
        return [*prefix, "chroot", str(self.root), "/bin/bash", "-c", inside]

    def run(self, *words: str, code: int = 0, prefix: Tuple[str, ...] = ()) -> str:
        """Runs words in it, and returns what they said; fails when they end otherwise than with `code`."""
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ended = subprocess.run(self.command(list(words), prefix), env=self.environment, **merged)
        if ended.returncode != code:
            sys.exit(f"{shlex.join(words)}: exit code {ended.returncode}, expected {code}\n{ended.stdout[-6000:]}")
        return ended.stdout


def context(folder: Path) -> Path:
    """Returns a copy of what .dockerignore lets through; of its patterns, those that it uses."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            copy(ROOT / line[1:], folder / line[1:], into=False)
    return folder


def copy(source: Path, target: Path, into: bool) -> None:
    """Copies a file, or what a directory holds, as COPY does."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (target if into else target.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target / source.name if into else target)


def carry_out(container: Container, stage: Stage, files: Path, made: Dict[str, Container]) -> Container:
    """Carries out the instructions of a stage, and prints each."""
    for instruction, rest in stage.instructions:
        print(f"-- {stage.name}: {instruction} {rest}", flush=True)
        began = time.monotonic()
        if instruction == "RUN":
            container.run("/bin/sh", "-c", rest)
        elif instruction == "COPY":
            words = rest.split()
            start = files
            if words[0].startswith("--from="):
                start = made[words.pop(0)[len("--from=") :]].root
            target = container.root / (Path(container.cwd) / words[-1]).relative_to("/")  # an absolute one replaces it
            for source in words[:-1]:
                copy(start / source.lstrip("/"), target, words[-1].endswith("/"))
        elif instruction == "ARG":  # of a stage: a variable of what it runs from here on, unless the build gave another
            name, _, value = rest.partition("=")
            container.environment.setdefault(name, value)
        elif instruction == "ENV":
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                container.environment[name] = value.replace("$PATH", container.environment["PATH"])
        elif instruction == "WORKDIR":
            container.cwd = rest
            (container.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            container.user = "" if rest.startswith("0") else rest
        elif instruction == "ENTRYPOINT":
            container.entrypoint = json.loads(rest)
        elif instruction not in ("LABEL", "VOLUME", "CMD"):
            sys.exit(f"{instruction}: an instruction that this does not know")
        if instruction == "RUN":
            print(f"   {time.monotonic() - began:.0f} s", flush=True)
    return container


def vendors(container: Container, venv: Path) -> None:
    """Makes a container stand for a vendor's image: `python3` with TensorFlow, Horovod, Open MPI, found by variables."""
    vendor = "/usr/local/openmpi"
    shutil.copytree(venv, container.root / vendor.lstrip("/"), symlinks=True)
    container.environment.update(
        PATH=f"{vendor}/bin:{PATH}",
        PYTHONPATH=f"{vendor}/lib/python3.11/site-packages",
        LD_LIBRARY_PATH=f"{vendor}/lib",
    )
    lacking = ["hvd_vgg", "crc32c", "opencv-python-headless", "pillow", "safetensors", "cloudpickle", "mpi4py"]
    container.run("python3", "-m", "pip", "uninstall", "--yes", "--quiet", *lacking)
    (container.root / vendor.lstrip("/") / "bin/python").unlink()


def train(container: Container) -> None:
    """Trains as a container's user on one rank and on two."""
    container.environment["HOME"] = "/tmp"  # noqa: S108 (as launch/docker.sh has it)
    assert container.run("id", "-u").strip() == "1000"
    assert "hvd-vgg train" in container.run(*container.entrypoint, "--help")
    container.run("bash", "-c", "! ls /etc/ssh/ssh_host_* && [ ! -w /opt/hvd_vgg ]")
    container.run(*container.entrypoint, "make-demo-data", "--data_dir=/runs/demo")
    for name, words in (("one", SMOKE), ("two", ["launch", "--ranks=2", *SMOKE])):
        said = container.run(*container.entrypoint, *words, f"--run_dir=/runs/{name}")
        assert "step 5" in said, said
        print(f"   trained: {name} rank(s) on one host", flush=True)


def train_on_hosts(container: Container) -> None:
    """Trains on two hosts, of which one is a worker with sshd as in Kubernetes; a host with another key is refused."""
    import namespaces

    keys = container.root / "etc/hvd-vgg/ssh"
    keygen = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f"]  # as the MPI operator's are
    subprocess.run([*keygen, str(keys / "id_rsa")], check=True)
    shutil.copy(keys / "id_rsa.pub", keys / "authorized_keys")
    (keys / "id_rsa").chmod(0o644)  # as Kubernetes mounts a secret: root's, and readable
    with namespaces.Hosts(2, container.root / "tmp") as hosts:
        (container.root / "runs/hosts").write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
        first, second = [("ip", "netns", "exec", f"{hosts.prefix}h{number}") for number in (1, 2)]
        sshd = ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/hvd-vgg/sshd_config"]
        worker = subprocess.Popen(container.command(sshd, second), env={"PATH": PATH})
        try:
            time.sleep(1)
            words = ["launch", "--hostfile=/runs/hosts", "--rsh_agent=hvd-vgg-ssh", *SMOKE]
            # What the operator sets for its launcher.
            container.environment.update(
                OMPI_MCA_orte_keep_fqdn_hostnames="true",
                OMPI_MCA_orte_default_hostfile="/runs/hosts",
                OMPI_MCA_plm_rsh_args="-o ConnectionAttempts=10",
                OMPI_MCA_orte_set_default_slots="1",
            )
            said = container.run(*container.entrypoint, *words, "--run_dir=/runs/hosts-2", prefix=first)
            assert "step 5" in said, said
            assert hosts.addresses[1] in said, said
            print("   trained: a rank on each of two hosts, through hvd-vgg-ssh and sshd", flush=True)
            subprocess.run([*keygen, str(keys / "other")], check=True)
            shutil.copy(keys / "other.pub", keys / "id_rsa.pub")
            said = container.run(*container.entrypoint, *words, "--run_dir=/runs/hosts-3", prefix=first, code=78)
            assert f"cannot use {hosts.addresses[1]} (" in said, said
            print("   refused: a host that shows another key", flush=True)
        finally:
            worker.kill()
            worker.wait()


def main() -> None:
    """Carries out the targets cpu and corex, and uses them."""
    if sys.version_info[:2] != (3, 11):
        sys.exit("the image's Python is 3.11, this is another")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts and what runs on them end too
    # Nothing below is ever removed with what is in it: it may be a mount. All mounts end with this process' namespace; what
    # stays when this fails, launch/check_dockerfile.sh removes from without.
    folder = Path(tempfile.mkdtemp())
    found = stages(ROOT / "Dockerfile")
    with tempfile.TemporaryDirectory() as name:
        files = context(Path(name))
        build = carry_out(Container(folder / "build"), found["cpu-build"], files, {})
        cpu = carry_out(Container(folder / "cpu"), found["cpu"], files, {"cpu-build": build})
        build.remove()
        train(cpu)
        train_on_hosts(cpu)
        vendor = Container(folder / "vendor")
        vendors(vendor, cpu.root / "opt/venv")
        cpu.remove()
        train(carry_out(vendor, found["corex"], files, {}))
        vendor.remove()
    folder.rmdir()
    print("all held")


if __name__ == "__main__":
    main()
