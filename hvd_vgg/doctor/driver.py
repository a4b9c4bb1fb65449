"""A host's devices as its kernel and its vendor's tool tell of them, and whether the driver fits the software.

Nothing here asks TensorFlow. What is known of Iluvatar's hosts is from public sources and was tried on none: each rule
below says what it rests on.
"""

import os
import re
import subprocess
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from hvd_vgg.doctor.packages import Host, nodes, numbers, sdk, tool
from hvd_vgg.reporting.findings import Finding, failure, ok, warning

_PCI_VENDORS = {"0x1e3e": "Iluvatar", "0x10de": "NVIDIA"}
# Iluvatar's, by the vendor's own guide to its containers.
_PCI_NAMES = {"0x0001": "BI-V100", "0x0002": "MR-V100", "0x0003": "BI-V150"}
# More of a device's memory in use before a job begins than a driver itself takes.
_IN_USE = 0.1
# With a rank on each of 16 devices as many ask at once.
_TOOL_SECONDS = 15


class Listing(NamedTuple):
    """What a vendor's tool says: driver and CUDA version as it writes them, and of each device in order its name and MiB.

    mebibytes: (in use, in all), empty where it does not say.
    """

    driver: str
    cuda: str
    names: List[str]
    mebibytes: List[Tuple[int, int]]


def pci_functions(host: Host, whose: str) -> Dict[str, int]:
    """Returns how many PCI functions the vendor's accelerators are, by product where that is known, in the kernel's list."""
    counted: Dict[str, int] = {}
    for place in sorted((host.root / "sys/bus/pci/devices").glob("*")):
        try:
            maker = _PCI_VENDORS.get((place / "vendor").read_text().strip())
            kind = (place / "class").read_text().strip()
            product = (place / "device").read_text().strip()
        except OSError:
            continue
        if maker == whose and kind[:4] in ("0x03", "0x12"):  # displays, processing accelerators; not audio, bridges
            name = f"{whose} {_PCI_NAMES.get(product, product)}" if whose == "Iluvatar" else f"{whose} {product}"
            counted[name] = counted.get(name, 0) + 1
    return counted


def listing(host: Host, whose: str) -> Optional[Listing]:
    """Returns what ixsmi or nvidia-smi says within 15 s a question; None where it is not there or fails."""
    if whose == "NVIDIA":
        # What it gives no column for is the newest CUDA that the driver can run.
        cuda = re.search(r"CUDA Version:\s*(\S+)", _run(host, "nvidia-smi"))
        told = _run(
            host, "nvidia-smi", "--query-gpu=driver_version,memory.used,memory.total,name", "--format=csv,noheader,nounits"
        )
        rows = [row for row in (line.split(", ", 3) for line in told.splitlines()) if len(row) == 4]
        mebibytes = [(int(used), int(total)) for _, used, total, _ in rows if (used + total).isdigit()]
        mebibytes = mebibytes if len(mebibytes) == len(rows) else []  # [N/A], as of parts of a device
        return Listing(rows[0][0], cuda[1] if cuda else "", [row[3] for row in rows], mebibytes) if rows else None
    # Its table is what all public transcripts show; --query-gpu is known for index and uuid alone.
    told = _run(host, "ixsmi")
    head = re.search(r"Driver Version:\s*(\S+)\s+CUDA Version:\s*(\S+)", told)
    names = re.findall(r"^\|\s*\d+\s+(\S.*?)\s*\|\s*[0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f.]+\s*\|", told, re.MULTILINE)
    mebibytes = [(int(used), int(total)) for used, total in re.findall(r"(\d+)MiB\s*/\s*(\d+)MiB", told)]
    if not names:  # a table of another shape
        names = re.findall(r"^GPU\s+\d+:\s*(\S.*?)\s*(?:\(UUID.*)?$", _run(host, "ixsmi", "-L"), re.MULTILINE)
    return Listing(head[1] if head else "", head[2] if head else "", names, mebibytes) if head or names else None


def cards(names: Sequence[str]) -> int:
    """Returns how many cards these devices are: a BI-V150 is two devices, a BI-V150S or any other one."""
    return len(names) - _halves(names) + -(-_halves(names) // 2)


def _halves(names: Sequence[str]) -> int:
    return sum(bool(re.search(r"BI-?V?150(?!S)", name)) for name in names)


def check_devices(host: Host, whose: str, said: Optional[Listing]) -> List[Finding]:
    """Looks at device nodes, the vendor's tool and cards, before TensorFlow is asked."""
    if whose == "CPU":
        return []
    there = nodes(host, whose)
    if not there:
        device = (
            "--runtime iluvatar -e IX_VISIBLE_DEVICES=all, or --device /dev/iluvatar0 ..."
            if whose == "Iluvatar"
            else "--gpus all"
        )
        on_bus = ", ".join(f"{count} {name}" for name, count in pci_functions(host, whose).items())
        text = f"no device node of {whose} in /dev" + (f", though its PCI bus has {on_bus}" if on_bus else "")
        fix = f"load the driver on the host; in a container: docker run {device}"
        # A tool without a device is how login nodes are; the vendor's software is in no image for nothing.
        return [(failure if on_bus or whose == "Iluvatar" else warning)("devices", text, fix)]
    found = []
    closed = [path.name for path in there if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        text = f"this user may not open {', '.join(closed)}"
        found.append(failure("devices", text, "join the group that owns them (docker run --group-add)"))
    if said is None:
        asked = {"Iluvatar": "ixsmi", "NVIDIA": "nvidia-smi"}[whose]
        fix = "driver and devices were not asked; it needs the vendor's libraries in LD_LIBRARY_PATH"
        return [*found, warning("devices", f"{len(there)} nodes; {asked} is missing or does not answer", fix)]
    if whose == "Iluvatar" and numbers(said.driver) >= (4, 4) and not (host.root / "dev/itrctl").exists():
        text = "/dev/itrctl is missing, which drivers from 4.4.0 on have"
        found.append(warning("devices", text, "docker run --device /dev/itrctl"))
    mask = host.environ.get("CUDA_VISIBLE_DEVICES", "")
    taken = {int(each) for each in mask.split(",")} if re.fullmatch(r"\d+(,\d+)*", mask) else None
    busy = [
        f"device {number}: {used} of {total} MiB"
        for number, (used, total) in enumerate(said.mebibytes)
        if used > _IN_USE * total and (taken is None or number in taken)
    ]
    if busy:
        text = f"memory is in use: {', '.join(busy)}"
        found.append(warning("devices", text, "end the other job there, or leave the device out by CUDA_VISIBLE_DEVICES"))
    names = {name: said.names.count(name) for name in said.names}
    text = ", ".join(f"{count} {name}" for name, count in names.items()) or "no device"
    sizes = sorted({total for _, total in said.mebibytes})
    text += f" of {' and '.join(map(str, sizes))} MiB" if sizes else ""
    boards = cards(said.names)
    if boards != len(said.names):
        text += f": {boards} cards if each shows as two devices, a rank each ({len(said.names)} in all)"
    if len(said.names) != len(there):
        text += f"; but {len(there)} nodes in /dev"
        fix = "right where a scheduler gave you these; else start the container with all devices, or reset the missing ones"
        return [*found, warning("devices", text, fix)]
    if _halves(said.names) % 2:
        text += "; an odd number: one device of a card is not there"
        fix = "right where a scheduler gave you these; else see dmesg and ixsmi on the host, and reset the card"
        return [*found, warning("devices", text, fix)]
    return [*found, ok("devices", text)]


def check_driver(host: Host, whose: str, said: Optional[Listing], cuda: str, computed: bool) -> List[Finding]:
    """Looks whether driver and software fit.

    cuda: the CUDA that TensorFlow was built with, nothing where it was built without, or cannot be asked.
    computed: every device tried has computed right, which decides in doubt.
    """
    if said is None or whose == "CPU":
        return []
    return _check_nvidia(said, cuda, computed) if whose == "NVIDIA" else _check_iluvatar(host, said, computed)


def _check_nvidia(said: Listing, cuda: str, computed: bool) -> List[Finding]:
    """A driver runs what was built with any CUDA of its own major version or an older one (NVIDIA, CUDA Compatibility)."""
    text = f"NVIDIA {said.driver}, for CUDA to {said.cuda or 'unknown'}"
    text += f"; TensorFlow is built with {cuda}" if cuda else ""
    if not cuda or not said.cuda or numbers(said.cuda)[:1] >= numbers(cuda)[:1]:
        return [ok("driver", text)]
    fix = f"a driver for CUDA {numbers(cuda)[0]} on the host, or a TensorFlow built with CUDA {numbers(said.cuda)[0]}"
    if computed:
        return [warning("driver", f"{text}: the driver is older; the devices computed right all the same", fix)]
    return [failure("driver", f"{text}: the driver is older", fix)]


def _check_iluvatar(host: Host, said: Listing, computed: bool) -> List[Finding]:
    """Seen by others: driver 3.2.3 under SDK 4.4 or 4.5 ends in error 803; driver 4.4 under SDK 4.5 lists the devices and
    fails with 801 at the first allocation; ixsmi then writes CUDA Version: N/A. SDK 4.3.0 came with driver 4.3.8, so that
    the third number may differ.
    """
    with_sdk = sdk(host)
    text = f"Iluvatar {said.driver or 'unknown'}, SDK {with_sdk or 'unknown'}, CUDA {said.cuda or 'unknown'}"
    if not said.driver:
        fix = "read the driver's version in what ixsmi prints: it must be that of the SDK, or newer"
        return [warning("driver", f"{text}: ixsmi's table is of a shape that is not known here", fix)]
    older = bool(with_sdk) and numbers(said.driver)[:2] < numbers(with_sdk)[:2]
    if not older and said.cuda != "N/A":
        inexact = bool(with_sdk) and numbers(said.driver) != numbers(with_sdk)
        return [ok("driver", f"{text}; the SDK's first two numbers are what it must have" if inexact else text)]
    why = "the driver is older than the SDK" if older else "ixsmi does not know the CUDA version"
    fix = f"install the driver of SDK {with_sdk or 'that the image has'} on the host, or take the image of SDK {said.driver}"
    if computed:
        return [warning("driver", f"{text}: {why}; the devices computed right all the same", fix)]
    return [failure("driver", f"{text}: {why}; devices are then listed but fail to allocate (errors 801, 803)", fix)]


def _run(host: Host, name: str, *arguments: str) -> str:
    """Returns what a vendor's tool prints; nothing where it is missing, fails or takes longer."""
    path = tool(host, name)
    if path is None:
        return ""
    # An empty part would be the current directory.
    libraries = os.pathsep.join(
        filter(None, [host.environ.get("LD_LIBRARY_PATH"), str(host.root / "usr/local/corex/lib64")])
    )
    environ = {**host.environ, "LD_LIBRARY_PATH": libraries}
    try:
        ended = subprocess.run(  # noqa: S603
            [path, *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""
