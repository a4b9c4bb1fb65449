"""The vendor of a host's accelerators, and whether the packages that training needs are installed and fit each other.

Imports none of them. Checks look at a `HostView`, which in tests is a simulated directory tree. What is known of Iluvatar
hosts comes from public sources and was tried on none; each rule says what it rests on.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.reporting.findings import Finding, failure, ok, warning

# Supported versions: both ends were tried, or are what a vendor ships.
_PYTHON, _TENSORFLOW, _HOROVOD = ((3, 8), (3, 13)), ((2, 6), (2, 21)), ((0, 27), (0, 28))
# The distributions that provide a module, where it is not the one of the same name.
_DISTRIBUTIONS = {
    "absl": ("absl-py",),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "dllogger": ("DLLogger",),
    "PIL": ("pillow",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu"),
    "yaml": ("PyYAML",),
}
# Modules besides TensorFlow and Horovod. Horovod imports the last four, of which a vendor's image may lack some: the one
# public list of its packages lacks cloudpickle.
_REQUIRED = ("numpy", "absl", "crc32c", "safetensors", "cv2", "cloudpickle", "psutil", "yaml", "packaging")
# Without one of the first two something is lost; without the others nothing is.
_LOSS, _OPTIONAL = ("mpi4py", "PIL"), ("mpi4py", "PIL", "dllogger", "tensorboard")
# How to install those for which plain `pip install --no-deps` is not enough.
_FIXES = {
    "numpy": "pip install numpy, in the version that TensorFlow was built for",
    "cv2": 'pip install --no-deps "opencv-python-headless<4.12"',
    "PIL": "without it --resize=pillow is refused; pip install --no-deps pillow",
    "mpi4py": "without it mpirun may exit with another rank's code; build it with this MPI's mpicc",
}
# What each vendor's tool is called.
TOOLS = {"Iluvatar": "ixsmi", "NVIDIA": "nvidia-smi"}
# What Iluvatar's collective library is called: the first in most reports on its images, the second in two.
_COLLECTIVES = ("libnccl.so.2", "libixccl.so")
_COREX = re.compile(r"\+corex\.(\d+(?:\.\d+)*)")


class HostView(NamedTuple):
    """The host to check: the file system below `root`, environment variables, and Python's module search path."""

    root: Path
    environ: Mapping[str, str]
    path: Sequence[str]


def this_host() -> HostView:
    """Returns the host that this process runs on."""
    return HostView(Path("/"), os.environ, sys.path)


def is_installed(host: HostView, module: str) -> bool:
    """Returns whether Python would find `module`, without importing it."""
    return importlib.machinery.PathFinder.find_spec(module, list(host.path)) is not None


def installed_version(host: HostView, module: str) -> str:
    """Returns the version of the distribution that provides `module`, with its local part; "" if it is not installed.

    A module's own `__version__` may lack the vendor's `+corex...`; the distribution's has it.
    """
    found = _distribution(host, module)
    return found.version if found else ""


def parse_version(text: str) -> Tuple[int, ...]:
    """Returns (2, 16, 2) for `2.16.2+corex.4.3.0`."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def find_vendor(host: HostView) -> Tuple[str, List[str]]:
    """Returns Iluvatar, NVIDIA or CPU, and the evidence for it."""
    tensorflow, prefix = installed_version(host, "tensorflow"), host.root / "usr/local/corex"
    evidence = [f"TensorFlow {tensorflow}"] if _COREX.search(tensorflow) else []
    evidence += ["/usr/local/corex"] if prefix.exists() or prefix.is_symlink() else []
    for vendor, tool in TOOLS.items():
        nodes = device_nodes(host, vendor)
        evidence += [f"{len(nodes)} /dev/{vendor.lower()}*"] if nodes else []
        evidence += [tool] if find_tool(host, tool) else []
        if evidence:
            return vendor, evidence
    return "CPU", ["no NVIDIA or Iluvatar device, nor software for one"]


def device_nodes(host: HostView, vendor: str) -> List[Path]:
    """Returns the vendor's device nodes in /dev, one per device."""
    found = (host.root / "dev").glob(f"{vendor.lower()}[0-9]*") if vendor != "CPU" else []
    return sorted(found, key=lambda path: parse_version(path.name))


def check_packages(host: HostView) -> Iterator[Finding]:
    """Checks Python and each package that training imports, except TensorFlow and Horovod."""
    python = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    if _PYTHON[0] <= sys.version_info[:2] <= _PYTHON[1]:
        yield ok("python", python)
    else:
        yield warning("python", f"{python} is not known to work", "use Python 3.8 to 3.13")
    for module in (each for each in (*_REQUIRED, *_LOSS) if not is_installed(host, each)):
        name = _names(module)[0]
        fix = _FIXES.get(module, f"pip install --no-deps {name}")
        yield (failure if module in _REQUIRED else warning)("packages", f"{name} is not installed", fix)
    modules = ("tensorflow", "horovod", *_REQUIRED, *_OPTIONAL)
    versions = {_names(each)[0]: installed_version(host, each) for each in modules}
    yield ok("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))


def check_tensorflow(host: HostView, vendor: str) -> Iterator[Finding]:
    """Checks that TensorFlow and Horovod are installed, of supported versions, the vendor's own, and built to match."""
    fix, lacking = "launch/environment.sh installs both (docs/compatibility.md)", ""
    rebuild = "rebuild it against this TensorFlow: pip install --force-reinstall --no-deps --no-cache-dir "
    rebuild += "--no-build-isolation horovod"
    if vendor == "Iluvatar":
        fix = rebuild = "use the vendor's image with its own TensorFlow and Horovod; pip must install neither"
        # By its own pages an image may lack them: of SDK 4.3.0 and 4.4.0 users are told to ask for TensorFlow's wheel.
        python, sdk = "cp{}{}".format(*sys.version_info), sdk_version(host) or "VERSION of /usr/local/corex"
        lacking = f"an image without it: ask the vendor for the wheel NAME-...+corex.{sdk}-{python} and build with "
        lacking += "--build-arg=COREX_WHEELS (docs/iluvatar.md); from an index pip must install neither"
    tensorflow, horovod = installed_version(host, "tensorflow"), installed_version(host, "horovod")
    built_for = _built_for(host)
    for name, version, (low, high) in (("tensorflow", tensorflow, _TENSORFLOW), ("horovod", horovod, _HOROVOD)):
        if not version:
            text = "not installed, or not on this Python's search path"
            yield failure(name, text, lacking.replace("NAME", name) if lacking else fix)
        elif low <= parse_version(version)[:2] <= high:
            built = f", built for TensorFlow {built_for or 'of unknown version'}" if name == "horovod" else ""
            yield ok(name, f"{version}{built}, in {_folders(host, name)[0]}")
        else:
            supported = f"use {'.'.join(map(str, low))} to {'.'.join(map(str, high))}"
            yield warning(name, f"{version} is not known to work", supported)
    yield from _check_duplicates(host)
    if tensorflow and built_for and parse_version(built_for) != parse_version(tensorflow):
        text = f"Horovod was built for TensorFlow {built_for}, but {tensorflow} is installed: it warns, and may not load"
        yield warning("horovod", text, rebuild)
    if vendor == "Iluvatar":
        yield from _check_corex(host, tensorflow, horovod, fix)


def _check_duplicates(host: HostView) -> Iterator[Finding]:
    """Checks that there is one TensorFlow and one Horovod: of several, Python imports that of the first folder."""
    for name in ("tensorflow", "horovod"):
        folders = _folders(host, name)
        if len(folders) > 1:
            fix = "uninstall one; PYTHONNOUSERSITE=1 leaves out ~/.local, and PYTHONPATH comes before both"
            yield warning(name, f"{folders[0]} is where it is imported from; {', '.join(folders[1:])} has one too", fix)


def _check_corex(host: HostView, tensorflow: str, horovod: str, fix: str) -> Iterator[Finding]:
    """Checks that Iluvatar's software stack is complete and is the one in use."""
    prefix = host.root / "usr/local/corex"
    wheel, around = _COREX.search(tensorflow), _prefix_version(host)
    if tensorflow and not wheel:
        text = f"TensorFlow {tensorflow} is not the vendor's (+corex): it sees no Iluvatar device"
        if sorted((prefix / "lib64/python3/dist-packages").glob("tensorflow-*corex*.dist-info")):
            text += "; the vendor's is in /usr/local/corex/lib64/python3/dist-packages"
            fix = "PYTHONPATH was lost: mpirun -x PYTHONPATH -x LD_LIBRARY_PATH, or `source /usr/local/corex/enable`"
        yield failure("vendor", text, fix)
    if wheel and horovod and not _COREX.search(horovod):
        text = f"Horovod {horovod} is not the vendor's (+corex)"
        yield warning("vendor", text, "fine if it was built on this host against this TensorFlow")
    if not prefix.is_dir() or not sorted(prefix.glob("lib64/libcudart.so*")):
        text = "no SDK: /usr/local/corex is missing, a dangling link, or has no lib64/libcudart.so"
        yield failure("vendor", text, "take the SDK from the image (corex:<version>), not from the host's directory")
    else:
        if "corex" not in host.environ.get("LD_LIBRARY_PATH", ""):
            text = "LD_LIBRARY_PATH does not contain /usr/local/corex/lib64"
            yield warning("vendor", text, "export it, and forward it to all ranks: mpirun -x LD_LIBRARY_PATH")
        yield _find_collectives(prefix)
    if "COREX_VISIBLE_DEVICES" in host.environ:
        yield ok("vendor", f"COREX_VISIBLE_DEVICES={host.environ['COREX_VISIBLE_DEVICES']}")
    if wheel and around and parse_version(wheel[1])[:2] != parse_version(around)[:2]:
        text = f"TensorFlow was built for SDK {wheel[1]}, but /usr/local/corex is SDK {around}"
        yield warning("vendor", text, "take both from one image")


def _find_collectives(prefix: Path) -> Finding:
    """Looks for the vendor's collective library, without which a Horovod with NCCL cannot be loaded."""
    found = sorted({path.name for name in _COLLECTIVES for path in prefix.glob(f"lib64/{name}*")})
    if found:
        return ok("vendor", f"collective library: {', '.join(found)}")
    text = f"no collective library: /usr/local/corex/lib64 has neither {' nor '.join(_COLLECTIVES)}"
    return warning("vendor", text, "take the SDK from the vendor's image; without it devices exchange through the host")


def sdk_version(host: HostView) -> str:
    """Returns the version of Iluvatar's SDK: the one that TensorFlow's wheel names, or that of /usr/local/corex."""
    wheel = _COREX.search(installed_version(host, "tensorflow"))
    return wheel[1] if wheel else _prefix_version(host)


def find_tool(host: HostView, name: str) -> Optional[str]:
    """Returns the path of a vendor's tool, on PATH or in its SDK; None if there is none."""
    folders = os.pathsep.join(filter(None, [host.environ.get("PATH"), str(host.root / "usr/local/corex/bin")]))
    return shutil.which(name, path=folders)


def _names(module: str) -> Sequence[str]:
    return _DISTRIBUTIONS.get(module, (module,))


def _distribution(host: HostView, module: str) -> Optional[importlib.metadata.Distribution]:
    return next(_distributions(host, module), None)


def _distributions(host: HostView, module: str) -> Iterator[importlib.metadata.Distribution]:
    """Yields what provides `module`, in the order in which Python looks for it."""
    for folder in host.path:
        for name in _names(module):
            yield from importlib.metadata.distributions(name=name, path=[folder])


def _folders(host: HostView, module: str) -> List[str]:
    """Returns the folders in which `module` is installed, that from which it is imported first."""
    return list(dict.fromkeys(os.path.realpath(str(each.locate_file(""))) for each in _distributions(host, module)))


def _prefix_version(host: HostView) -> str:
    found = re.search(r"corex-(\d[\d.]*)", os.path.realpath(host.root / "usr/local/corex"))
    return found[1] if found else host.environ.get("COREX_VERSION", "")


def _built_for(host: HostView) -> str:
    """Returns the TensorFlow that Horovod was built for, as its build recorded it; "" if it did not."""
    found = _distribution(host, "horovod")
    try:
        record = Path(str(found.locate_file("horovod"))) / "metadata.json" if found else Path()
        return str(json.loads(record.read_text()).get("tensorflow", ""))
    except (OSError, ValueError):
        return ""
