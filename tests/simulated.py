"""SIMULATED hosts of vendors, for tests only: directory trees, and tools that print what public transcripts show.

There is no device, driver or SDK behind them, and the package knows nothing of them. What such a host has is from public
sources.
"""

from pathlib import Path

from hvd_vgg.doctor.packages import HostView

PACKAGES = {"absl": "absl-py", "cv2": "opencv-python", "PIL": "pillow", "yaml": "PyYAML", "dllogger": "DLLogger"}
PACKAGES.update({name: name for name in ("tensorflow", "horovod", "numpy", "crc32c", "safetensors", "cloudpickle")})
PACKAGES.update({name: name for name in ("psutil", "packaging", "mpi4py", "tensorboard")})


def write_tool(path, text, **answers):
    """Writes a script that prints `text`, or one of `answers` if its first argument is that name, with dashes before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
    cases = "".join(f"--{name}* | -{name}) cat <<'END'\n{answer}\nEND\n;;\n" for name, answer in answers.items())
    path.write_text(f"#!/bin/sh\ncase \"$1\" in\n{cases}*) cat <<'END'\n{text}\nEND\n;;\nesac\n")
    path.chmod(0o755)


def ixsmi_table(names, driver, cuda):
    """Returns what ixsmi prints, as seen for drivers 3.1.0 to 4.4.0."""
    rows = [
        f"| {number:<4d} {name:24s} | 00000000:{number + 16:02X}:00.0     | 1500MHz   1600MHz    |\n"
        "| N/A  34C   P0    N/A / N/A    | 64MiB / 32768MiB     | 0%        Default    |"
        for number, name in enumerate(names)
    ]
    head = f"|  IX-ML: {driver}       Driver Version: {driver}       CUDA Version: {cuda:12s}|"
    return "\n".join(["Timestamp    Wed Nov 12 14:01:27 2025", head, *rows])


def write_packages(folder, versions, missing=(), built_for=""):
    """Writes packages of these versions (others: 1.0) but for `missing`; returns the folder."""
    for module, name in PACKAGES.items():
        if module in missing:
            continue
        version = versions.get(module, "1.0")
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").touch()
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if built_for:
        (folder / "horovod" / "metadata.json").write_text(f'{{"tensorflow": "{built_for}"}}')
    return str(folder)


def iluvatar(
    root: Path,
    names=("Iluvatar BI-V150",) * 16,
    nodes=None,
    sdk="4.3.0",
    driver="4.3.8",
    cuda="10.2",
    tensorflow="2.16.2+corex.4.3.0",
    horovod="0.27.0+corex.4.3.0",
    built_for="2.16.2",
    missing=(),
    libraries=("libnccl.so.2",),
    **environ,
):
    """Returns a simulated Iluvatar host; nodes: device nodes, as many as names by default; libraries: more of the SDK's."""
    prefix = root / "usr/local" / f"corex-{sdk}"
    versions = {"tensorflow": tensorflow, "horovod": horovod}
    packages = write_packages(prefix / "lib64/python3/dist-packages", versions, missing, built_for)
    (prefix.parent / "corex").symlink_to(prefix.name)
    for name in ("libcudart.so.10.2", *libraries):
        (prefix / "lib64" / name).touch()
    (root / "dev").mkdir()
    for number in range(len(names) if nodes is None else nodes):
        (root / f"dev/iluvatar{number}").touch()
    write_tool(prefix / "bin/ixsmi", ixsmi_table(names, driver, cuda))
    corex = f"{prefix.parent}/corex"
    variables = {"PATH": f"{corex}/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": f"{corex}/lib64", "COREX_VERSION": sdk}
    return HostView(root, {**variables, **environ}, [packages])


def nvidia(root: Path, cuda="12.8", used=1, tensorflow="2.16.2"):
    """Returns a simulated host with two H200; cuda: the newest that its driver runs; used: MiB in use on the second."""
    packages = write_packages(root / "site", {"tensorflow": tensorflow, "horovod": "0.28.1"}, built_for=tensorflow)
    rows = [f"{each}, 143771, NVIDIA H200" for each in (1, used)]
    head = f"| NVIDIA-SMI 570.124.06             Driver Version: 570.124.06     CUDA Version: {cuda:9s}|"
    write_tool(root / "bin/nvidia-smi", head, query_gpu="\n".join(rows))
    (root / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (root / "dev" / name).touch()
    return HostView(root, {"PATH": f"{root}/bin:/usr/bin:/bin"}, [packages])


def findings(host, computed=False, cuda=""):
    """Returns the accelerators of a host, and what doctor finds without TensorFlow; cuda: what TensorFlow was built with."""
    from hvd_vgg.doctor import driver, packages

    accelerators = driver.find_accelerators(host)
    found = [
        *packages.check_packages(host),
        *packages.check_tensorflow(host, accelerators.vendor),
        *driver.check_device_nodes(accelerators),
        *driver.check_driver(accelerators, cuda, computed),
    ]
    return accelerators, found


def only(found, verdict):
    """Returns the one finding of a verdict."""
    (one,) = [finding for finding in found if finding.verdict == verdict]
    return one
