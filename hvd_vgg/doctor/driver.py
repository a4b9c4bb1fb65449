"""A host's devices as its kernel and its vendor's tool report them, and whether the driver fits the software.

Nothing here asks TensorFlow. What is known of Iluvatar hosts comes from public sources and was tried on none; each rule
says what it rests on.
"""

import contextlib
import os
import re
from collections import Counter
from typing import Iterator, List, NamedTuple, Optional, Tuple

from hvd_vgg.doctor.packages import TOOLS, HostView, device_nodes, find_tool, find_vendor, parse_version, sdk_version
from hvd_vgg.doctor.system import run_tool
from hvd_vgg.environment import DEVICE_MASKS
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.text import plural

_PCI_VENDORS = {"Iluvatar": "0x1e3e", "NVIDIA": "0x10de"}
# Fraction of a device's memory in use before the job starts that is more than a driver takes for itself.
_IN_USE = 0.1
# With a rank on each of 16 devices, 16 run the tool at once.
_TOOL_SECONDS = 15


class Listing(NamedTuple):
    """What the vendor's tool reports: driver and CUDA version as it prints them, and the devices in order.

    mebibytes: (used, total) of each device; empty if the tool does not say.
    """

    driver: str
    cuda: str
    names: List[str]
    mebibytes: List[Tuple[int, int]]


class Accelerators(NamedTuple):
    """A host's accelerators: the vendor (Iluvatar, NVIDIA or CPU), the evidence for it, and its tool's report, if any."""

    host: HostView
    vendor: str
    evidence: List[str]
    listing: Optional[Listing]


def find_accelerators(host: HostView) -> Accelerators:
    """Returns a host's accelerators; ixsmi or nvidia-smi has 15 s per call to answer."""
    vendor, evidence = find_vendor(host)
    listing = _list_devices(host, TOOLS[vendor]) if vendor != "CPU" else None
    return Accelerators(host, vendor, evidence, listing)


def _list_devices(host: HostView, tool: str) -> Optional[Listing]:
    # There is no query for the newest CUDA version that the driver supports; both tools print it in the head of their table.
    table = _run(host, tool)
    head = re.search(r"Driver Version:\s*(\S+)(?:\s+CUDA Version:\s*(\S+))?", table)
    if tool == "nvidia-smi":
        query = _run(host, tool, "--query-gpu=memory.used,memory.total,name", "--format=csv,noheader,nounits")
        names = re.findall(r"^.+?, .+?, (.+)$", query, re.MULTILINE)
        memory = re.findall(r"^(\d+), (\d+), ", query, re.MULTILINE)
    else:  # all public transcripts show this table; --query-gpu is only known to support index and uuid
        names = re.findall(r"^\|\s*\d+\s+(\S.*?)\s*\|\s*[0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f.]+\s*\|", table, re.MULTILINE)
        memory = re.findall(r"(\d+)MiB\s*/\s*(\d+)MiB", table)
    if len(memory) < len(names):
        memory = []  # [N/A], as for parts of a device
    return Listing(head[1], head[2] or "", names, [(int(used), int(total)) for used, total in memory]) if head else None


def check_device_nodes(accelerators: Accelerators) -> Iterator[Finding]:
    """Checks device nodes, memory in use and number of cards, before TensorFlow is imported."""
    host, vendor, _, listing = accelerators
    if vendor == "CPU":
        return
    nodes = device_nodes(host, vendor)
    if not nodes:
        on_bus = _count_on_bus(host, vendor)
        text = f"no {vendor} device node in /dev"
        text += f", although the PCI bus has {plural(on_bus, 'device')}" if on_bus else ""
        iluvatar = "--runtime iluvatar -e IX_VISIBLE_DEVICES=all, or --device /dev/iluvatar0 ..."
        fix = f"load the driver on the host; in a container: docker run {iluvatar if vendor == 'Iluvatar' else '--gpus all'}"
        # NVIDIA's tool without a device is normal on login nodes; Iluvatar's software is in no image without a reason.
        yield (failure if on_bus or vendor == "Iluvatar" else warning)("devices", text, fix)
        return
    closed = [path.name for path in nodes if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        fix = "join the group that owns them (docker run --group-add)"
        yield failure("devices", f"this user may not open {', '.join(closed)}", fix)
    if listing is None:
        tool = TOOLS[vendor]
        text = f"{len(nodes)} nodes; {tool} is missing, fails or prints something unknown: the driver is not checked"
        yield warning("devices", text, f"{tool} must work by hand; it needs the vendor's libraries on LD_LIBRARY_PATH")
        return
    if vendor == "Iluvatar" and parse_version(listing.driver) >= (4, 4) and not (host.root / "dev/itrctl").exists():
        yield warning("devices", "/dev/itrctl is missing, which drivers since 4.4.0 have", "docker run --device /dev/itrctl")
    mask = next((host.environ[name] for name in DEVICE_MASKS if host.environ.get(name)), "")
    busy = _busy_devices(listing, mask)
    if busy:
        fix = "end the other job there, or exclude the device by CUDA_VISIBLE_DEVICES"
        yield warning("devices", f"memory is in use: {', '.join(busy)}", fix)
    yield assess_listing(listing, len(nodes))


def _busy_devices(listing: Listing, mask: str) -> List[str]:
    """Returns the devices with memory in use, among those that `mask` (of environment.DEVICE_MASKS) lets this job use."""
    allowed = mask.split(",") if re.fullmatch(r"\d+(,\d+)*", mask) else None
    return [
        f"device {number}: {used} of {total} MiB"
        for number, (used, total) in enumerate(listing.mebibytes)
        if used > _IN_USE * total and (allowed is None or str(number) in allowed)
    ]


def assess_listing(listing: Listing, nodes: int) -> Finding:
    """Returns what the vendor's tool lists, compared with the number of device nodes."""
    devices = len(listing.names)
    text = ", ".join(f"{count} {name}" for name, count in Counter(listing.names).items()) or "no device"
    sizes = sorted({total for _, total in listing.mebibytes})
    text += f" with {' and '.join(map(str, sizes))} MiB" if sizes else ""
    halves = len(re.findall(r"BI-?V?150(?!S)", " ".join(listing.names)))  # a BI-V150 is two devices, a BI-V150S is one
    if halves > 1:
        cards = devices - halves // 2
        text += f": {cards} cards, if each shows up as two devices; one rank per device, {devices} in all"
    fix = "expected if a scheduler assigned these; otherwise "
    if devices != nodes:
        fix += "start the container with all devices, or reset the missing ones"
        return warning("devices", f"{text}; but {nodes} nodes in /dev", fix)
    if halves % 2:
        fix += "see dmesg and ixsmi on the host, and reset the card"
        return warning("devices", f"{text}; an odd number: one device of a card is missing", fix)
    return ok("devices", text)


def check_driver(accelerators: Accelerators, cuda: str = "", computed: bool = False) -> Iterator[Finding]:
    """Checks that driver and software fit.

    cuda: the CUDA version that TensorFlow was built with; "" if none, or if TensorFlow cannot be asked.
    computed: every device that was tried computed correctly, which decides in doubt.
    """
    host, vendor, _, listing = accelerators
    if listing is None:
        return
    nvidia = vendor == "NVIDIA"
    text, problem, fix = _assess_nvidia(listing, cuda) if nvidia else _assess_iluvatar(listing, sdk_version(host))
    if not problem:
        yield ok("driver", text)
    elif computed:
        yield warning("driver", f"{text}: {problem}; the devices computed correctly all the same", fix)
    else:
        fails = "" if nvidia else "; devices are then listed but fail to allocate (errors 801, 803)"
        yield failure("driver", f"{text}: {problem}{fails}", fix)


def _assess_nvidia(listing: Listing, cuda: str) -> Tuple[str, str, str]:
    """Returns the versions, what is wrong with them, and a fix.

    A driver runs what was built with any CUDA of its own major version or an older one (NVIDIA, CUDA Compatibility).
    """
    text = f"NVIDIA {listing.driver}, supports CUDA up to {listing.cuda or 'an unknown version'}"
    text += f"; TensorFlow was built with {cuda}" if cuda else ""
    built, supported = parse_version(cuda)[:1], parse_version(listing.cuda)[:1]
    if not (built and supported) or supported >= built:
        return text, "", ""
    fix = f"a driver for CUDA {built[0]} on the host, or a TensorFlow built with CUDA {supported[0]}"
    return text, "the driver is too old", fix


def _assess_iluvatar(listing: Listing, sdk: str) -> Tuple[str, str, str]:
    """Returns the versions, what is wrong with them, and a fix.

    Reported by others: driver 3.2.3 with SDK 4.4 or 4.5 ends in error 803; driver 4.4 with SDK 4.5 lists the devices and
    fails with 801 at the first allocation; ixsmi then prints CUDA Version: N/A. SDK 4.3.0 was shipped with driver 4.3.8,
    so the third number may differ.
    """
    text = f"Iluvatar {listing.driver}, SDK {sdk or 'unknown'}, CUDA {listing.cuda}"
    driver = parse_version(listing.driver)
    fix = f"install the driver of SDK {sdk or 'that the image has'} on the host, or use the image of SDK {listing.driver}"
    if sdk and driver[:2] < parse_version(sdk)[:2]:
        return text, "the driver is older than the SDK", fix
    if listing.cuda == "N/A":
        return text, "ixsmi does not know the CUDA version", fix
    needed = f"; at least {'.'.join(sdk.split('.')[:2])} is needed" if sdk and driver != parse_version(sdk) else ""
    return text + needed, "", ""


def _count_on_bus(host: HostView, vendor: str) -> int:
    """Returns the number of the vendor's displays and accelerators on the PCI bus, without its audio devices and bridges."""
    count = 0
    for path in (host.root / "sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            displays = path.with_name("class").read_text().startswith(("0x03", "0x12"))
            count += displays and path.read_text().strip() == _PCI_VENDORS[vendor]
    return count


def _run(host: HostView, name: str, *arguments: str) -> str:
    """Returns what a vendor's tool prints; "" if it is missing, fails or takes too long."""
    path = find_tool(host, name)
    if path is None:
        return ""
    # An empty entry would mean the current directory.
    libraries = [host.environ.get("LD_LIBRARY_PATH"), str(host.root / "usr/local/corex/lib64")]
    environ = {**host.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    done = run_tool([path, *arguments], environ, _TOOL_SECONDS)
    return done.stdout if done and done.returncode == 0 else ""
