"""Whose devices a host has, and whether its packages are there and fit them, without importing any of them.

What is looked at hangs on a `Host`: a root directory, an environment and Python's path, so that the same questions can be
asked of any directory tree. What is known of Iluvatar's hosts is from public sources and was tried on none: each rule
below says what it rests on.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.reporting.findings import Finding, failure, ok, warning

# The versions that the package is made for; each end was tried or is what vendors ship.
_PYTHON, _TENSORFLOW, _HOROVOD = ((3, 8), (3, 12)), ((2, 6), (2, 18)), ((0, 27), (0, 28))
# Module: the distributions that bring it, and what to do where it is missing.
_NEEDED = {
    "tensorflow": (("tensorflow", "tensorflow-cpu", "tensorflow-gpu"), ""),
    "horovod": (("horovod",), ""),
    "numpy": (("numpy",), "pip install numpy, in the version that TensorFlow was built for"),
    "absl": (("absl-py",), "pip install absl-py"),
    "crc32c": (("crc32c",), "pip install crc32c"),
    "safetensors": (("safetensors",), "pip install safetensors"),
    "cv2": (
        ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
        'pip install --no-deps "opencv-python-headless<4.12"',
    ),
    # Horovod's own, which a vendor's image may lack in part: the one public list of its packages lacks cloudpickle.
    "cloudpickle": (("cloudpickle",), "pip install --no-deps cloudpickle: Horovod imports it"),
    "psutil": (("psutil",), "pip install --no-deps psutil: Horovod imports it"),
    "yaml": (("PyYAML",), "pip install --no-deps pyyaml: Horovod imports it"),
    "packaging": (("packaging",), "pip install --no-deps packaging: Horovod imports it"),
}
_WISHED = {
    "mpi4py": (("mpi4py",), "without it mpirun's exit code may be another rank's; build it with this MPI's mpicc"),
}
# Without these nothing of a run is lost.
_OPTIONAL = {
    "dllogger": (("DLLogger",), "the same log lines are written without it"),
    "tensorboard": (("tensorboard",), "events are written without it; to look at them install it anywhere"),
}
_COREX = re.compile(r"\+corex\.(\d+(?:\.\d+)*)")


class Host(NamedTuple):
    """What is looked at: the file system below `root`, variables, and where Python looks for modules."""

    root: Path
    environ: Mapping[str, str]
    path: Sequence[str]


def this_host() -> Host:
    """Returns the machine that this process runs on."""
    return Host(Path("/"), os.environ, sys.path)


def version(host: Host, names: Sequence[str]) -> str:
    """Returns the version of the first distribution of `names` that is installed, with its local part; else nothing.

    A module's own `__version__` may lack the vendor's `+corex...`; the distribution's does not.
    """
    for name in names:
        for found in importlib.metadata.distributions(name=name, path=list(host.path)):
            return found.version
    return ""


def numbers(text: str) -> Tuple[int, ...]:
    """Returns (2, 16, 2) of `2.16.2+corex.4.3.0`."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def vendor(host: Host) -> Tuple[str, List[str]]:
    """Returns Iluvatar, NVIDIA or CPU, and what says so."""
    tensorflow = version(host, _NEEDED["tensorflow"][0])
    corex = host.root / "usr/local/corex"
    why = [f"TensorFlow {tensorflow}"] * bool(_COREX.search(tensorflow))
    why += ["/usr/local/corex"] * (corex.exists() or corex.is_symlink())
    why += [f"{len(nodes(host, 'Iluvatar'))} /dev/iluvatar*"] * bool(nodes(host, "Iluvatar"))
    why += ["ixsmi"] * bool(tool(host, "ixsmi"))
    if why:
        return "Iluvatar", why
    why = [f"{len(nodes(host, 'NVIDIA'))} /dev/nvidia*"] * bool(nodes(host, "NVIDIA"))
    why += ["nvidia-smi"] * bool(tool(host, "nvidia-smi"))
    return ("NVIDIA", why) if why else ("CPU", ["no device of NVIDIA or Iluvatar, nor software for one"])


def nodes(host: Host, whose: str) -> List[Path]:
    """Returns the device nodes, one a device."""
    name = {"Iluvatar": "iluvatar", "NVIDIA": "nvidia"}.get(whose)
    found = (host.root / "dev").glob(f"{name}[0-9]*") if name else []
    return sorted(found, key=lambda path: numbers(path.name))


def check_python(host: Host) -> List[Finding]:
    """Looks at Python and every package that training imports."""
    name = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    known = _PYTHON[0] <= sys.version_info[:2] <= _PYTHON[1]
    wanted = "Python 3.8 to 3.12 is what this is made for"
    found = [ok("python", name) if known else warning("python", f"{name} is not known to work", wanted)]
    for module, (names, fix) in {**_NEEDED, **_WISHED}.items():
        here = importlib.machinery.PathFinder.find_spec(module, list(host.path)) is not None
        if here or module in ("tensorflow", "horovod"):
            continue
        say = failure if module in _NEEDED else warning
        found.append(say("packages", f"{names[0]} is not installed", fix))
    for module, (names, instead) in _OPTIONAL.items():
        if importlib.machinery.PathFinder.find_spec(module, list(host.path)) is None:
            found.append(ok("packages", f"{names[0]} is not installed: {instead}"))
    for distribution in ("tensorflow", "horovod"):
        asked = _not_there(host, _NEEDED[distribution][0])
        if asked:
            text = f"{distribution} asks for {', '.join(asked)}: not installed"
            fix = f"pip install --no-deps {' '.join(asked)}, if its import (software) fails"
            found.append(warning("packages", text, fix))
    versions = {names[0]: version(host, names) for names, _ in {**_NEEDED, **_WISHED, **_OPTIONAL}.values()}
    return [*found, ok("packages", ", ".join(f"{name} {text}" for name, text in versions.items() if text))]


def check_tensorflow(host: Host, whose: str) -> List[Finding]:
    """Looks at TensorFlow and Horovod: there, of known versions, the vendor's own, one built for the other."""
    mend = (
        "use the vendor's image and its own TensorFlow and Horovod; pip must install neither"
        if whose == "Iluvatar"
        else 'launch/environment.sh installs both (README, "Your own TensorFlow")'
    )
    tensorflow, horovod = version(host, _NEEDED["tensorflow"][0]), version(host, ("horovod",))
    found = [
        failure(name, "is not installed, or not where this Python looks", mend)
        for name, there in (("tensorflow", tensorflow), ("horovod", horovod))
        if not there
    ]
    built = _built_for(host)
    for name, text, (low, high) in (("tensorflow", tensorflow, _TENSORFLOW), ("horovod", horovod, _HOROVOD)):
        if text and not low <= numbers(text)[:2] <= high:
            known = f"{'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
            found.append(warning(name, f"{text} is not known to work", f"{known} is what this is made for"))
        elif text:
            found.append(
                ok(name, f"{text}, built for TensorFlow {built or 'of unknown version'}" if name == "horovod" else text)
            )
    if tensorflow and built and numbers(built) != numbers(tensorflow):
        text = f"Horovod was built for TensorFlow {built}; here is {tensorflow}: it warns of that, and may not load"
        fix = "build it again beside this TensorFlow: pip install --no-cache-dir --no-build-isolation horovod"
        found.append(warning("horovod", text, mend if whose == "Iluvatar" else fix))
    return found + (_check_corex(host, tensorflow, horovod, mend) if whose == "Iluvatar" else [])


def _check_corex(host: Host, tensorflow: str, horovod: str, mend: str) -> List[Finding]:
    """Looks whether the vendor's stack is the one in use and whole."""
    found = []
    prefix = host.root / "usr/local/corex"
    theirs = sorted((prefix / "lib64/python3/dist-packages").glob("tensorflow-*corex*.dist-info"))
    if tensorflow and not _COREX.search(tensorflow):
        text = f"TensorFlow {tensorflow} is not the vendor's (+corex): it sees no device of Iluvatar"
        if theirs:
            text += "; the vendor's is in /usr/local/corex/lib64/python3/dist-packages"
            mend = "PYTHONPATH was lost: mpirun -x PYTHONPATH -x LD_LIBRARY_PATH, or `source /usr/local/corex/enable`"
        found.append(failure("vendor", text, mend))
    if horovod and not _COREX.search(horovod) and _COREX.search(tensorflow):
        text = f"Horovod {horovod} is not the vendor's (+corex)"
        found.append(warning("vendor", text, "right where it was built on this host against this TensorFlow"))
    if not prefix.is_dir() or not sorted(prefix.glob("lib64/libcudart.so*")):
        text = "/usr/local/corex is absent, leads nowhere or holds no libcudart.so: there is no SDK here"
        found.append(
            failure("vendor", text, "the SDK must come from the image (corex:<version>), not from the host's directory")
        )
    elif "corex" not in host.environ.get("LD_LIBRARY_PATH", ""):
        text = "LD_LIBRARY_PATH does not name /usr/local/corex/lib64"
        found.append(warning("vendor", text, "export it, and pass it on: mpirun -x LD_LIBRARY_PATH"))
    in_wheel, around = _COREX.search(tensorflow), _prefix_version(host)
    if in_wheel and around and numbers(in_wheel[1])[:2] != numbers(around)[:2]:
        text = f"TensorFlow is of SDK {in_wheel[1]}, /usr/local/corex of {around}"
        found.append(warning("vendor", text, "take both from one image"))
    return found


def _not_there(host: Host, names: Sequence[str]) -> List[str]:
    """Returns what the first distribution of `names` asks for, by its own metadata, and is not installed."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # told as missing
        return []
    for name in names:
        for found in importlib.metadata.distributions(name=name, path=list(host.path)):
            try:
                asked = [Requirement(line) for line in found.requires or []]
            except InvalidRequirement:
                return []
            here = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
            needed = {known.lower() for known_as, _ in _NEEDED.values() for known in known_as}
            return sorted(each.name for each in here if each.name.lower() not in needed and not version(host, (each.name,)))
    return []


def sdk(host: Host) -> str:
    """Returns the SDK's version: that of TensorFlow's wheel, or of /usr/local/corex."""
    in_wheel = _COREX.search(version(host, _NEEDED["tensorflow"][0]))
    return in_wheel[1] if in_wheel else _prefix_version(host)


def _prefix_version(host: Host) -> str:
    try:
        link = os.readlink(host.root / "usr/local/corex")
    except OSError:
        link = ""
    found = re.search(r"corex-(\d[\d.]*)", link)
    return found[1] if found else host.environ.get("COREX_VERSION", "")


def _built_for(host: Host) -> str:
    """Returns the TensorFlow that Horovod was built for, as its build noted it; nothing where it did not."""
    for found in importlib.metadata.distributions(name="horovod", path=list(host.path)):
        try:
            note = Path(str(found.locate_file("horovod"))) / "metadata.json"
            return str(json.loads(note.read_text()).get("tensorflow", ""))
        except (OSError, ValueError):
            return ""
    return ""


def tool(host: Host, name: str) -> Optional[str]:
    """Returns the path of a vendor's tool: on PATH, or in its SDK."""
    places = os.pathsep.join(filter(None, [host.environ.get("PATH"), str(host.root / "usr/local/corex/bin")]))
    return shutil.which(name, path=places)
