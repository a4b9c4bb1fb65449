"""SIMULATED hosts of vendors, for tests alone: directory trees and tools that print what public transcripts show.

No device, driver or SDK is behind them; the package knows nothing of this. What such a host has is from public sources.
"""

from pathlib import Path

from hvd_vgg.doctor.packages import Host

MODULES = {
    "tensorflow": "tensorflow",
    "horovod": "horovod",
    "numpy": "numpy",
    "absl": "absl-py",
    "crc32c": "crc32c",
    "safetensors": "safetensors",
    "cv2": "opencv-python",
    "cloudpickle": "cloudpickle",
    "psutil": "psutil",
    "yaml": "PyYAML",
    "packaging": "packaging",
    "mpi4py": "mpi4py",
    "dllogger": "DLLogger",
    "tensorboard": "tensorboard",
}


def tool(path, text, **answers):
    """Writes a script that prints `text`, or what is given for its first argument up to a =, without dashes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = "".join(f"--{name}* | -{name}) cat <<'END'\n{told}\nEND\n;;\n" for name, told in answers.items())
    path.write_text(
        f"#!/bin/sh\ncase \"$1\" in\n{cases}*) cat <<'END'\n{text}\nEND\n;;\nesac\n".replace("query_gpu", "query-gpu")
    )
    path.chmod(0o755)


def listed(names):
    """Returns what `ixsmi -L` prints, by its likeness to NVIDIA's; seen in no public transcript."""
    return "\n".join(f"GPU {number}: {name} (UUID: GPU-{number:08x}-0000)" for number, name in enumerate(names))


def table(names, driver, cuda):
    """Returns what ixsmi prints, as seen for drivers 3.1.0 to 4.4.0."""
    rows = [
        f"| {number:<4d} {name:24s} | 00000000:{number + 16:02X}:00.0     | 1500MHz   1600MHz    |\n"
        "| N/A  34C   P0    N/A / N/A    | 64MiB / 32768MiB     | 0%        Default    |"
        for number, name in enumerate(names)
    ]
    head = f"|  IX-ML: {driver}       Driver Version: {driver}       CUDA Version: {cuda:12s}|"
    return "\n".join(["Timestamp    Wed Nov 12 14:01:27 2025", head, *rows])


def site(folder, versions, missing=(), built_for="", requires=()):
    """Writes packages of these versions (1.0 where none is given) but for `missing`; requires: what TensorFlow asks for."""
    for module, name in MODULES.items():
        if module in missing:
            continue
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text("")
        info = folder / f"{name.replace('-', '_')}-{versions.get(module, '1.0')}.dist-info"
        info.mkdir()
        asks = "".join(f"Requires-Dist: {each}\n" for each in requires if module == "tensorflow")
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions.get(module, '1.0')}\n{asks}"
        (info / "METADATA").write_text(text)
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
    requires=(),
    **environ,
):
    """Returns a simulated host of Iluvatar's; nodes: device nodes, as many as names unless given."""
    prefix = root / "usr/local" / f"corex-{sdk}"
    packages = site(
        prefix / "lib64/python3/dist-packages", {"tensorflow": tensorflow, "horovod": horovod}, missing, built_for, requires
    )
    (prefix.parent / "corex").symlink_to(prefix.name)
    (prefix / "lib64/libcudart.so.10.2").touch()
    (root / "dev").mkdir()
    for number in range(len(names) if nodes is None else nodes):
        (root / f"dev/iluvatar{number}").touch()
    tool(prefix / "bin/ixsmi", table(names, driver, cuda), L=listed(names))
    variables = {
        "PATH": f"{prefix.parent}/corex/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": f"{prefix.parent}/corex/lib64",
        "COREX_VERSION": sdk,
    }
    return Host(root, {**variables, **environ}, [packages])


def nvidia(root: Path, cuda="12.8", used=1, tensorflow="2.16.2"):
    """Returns a simulated host of two H200; cuda: the newest that its driver runs; used: MiB of the second one's memory."""
    packages = site(root / "site", {"tensorflow": tensorflow, "horovod": "0.28.1"}, built_for=tensorflow)
    rows = [f"570.124.06, {each}, 143771, NVIDIA H200" for each in (1, used)]
    head = f"| NVIDIA-SMI 570.124.06             Driver Version: 570.124.06     CUDA Version: {cuda:9s}|"
    tool(root / "bin/nvidia-smi", head, query_gpu="\n".join(rows))
    (root / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (root / "dev" / name).touch()
    return Host(root, {"PATH": f"{root}/bin:/usr/bin:/bin"}, [packages])
