"""The interfaces of this host, and whether those that MPI, Gloo and NCCL were told to use can reach another one.

A wrong one is the hang that says nothing: Open MPI, told to use `lo` between two hosts, waits in MPI_Init for ever.
"""

import fcntl
import ipaddress
import os
import re
import shutil
import socket
import struct
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

from hvd_vgg.run import mpi
from hvd_vgg.run.findings import Finding, failure, ok, warning

_SIOCGIFADDR = 0x8915  # linux/sockios.h
# Variables that name what to use, or what not to. mpirun --mca NAME VALUE sets OMPI_MCA_NAME for its ranks.
INCLUDE = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME")
_EXCLUDE = ("OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_oob_tcp_if_exclude")
# Bridges of containers and virtual machines: alike on all hosts, routed to none. Docker calls those of its own networks br-
# and 12 digits; another br-lan may well be a host's way out.
_BRIDGE = re.compile(r"docker|virbr|br-[0-9a-f]{12}$|cni|flannel|podman|lxcbr|lxdbr")
_IN_A_FILE = re.compile(r"^[^#\n]*\bbtl_tcp_if_(include|exclude)\b", re.MULTILINE)


def interfaces() -> Dict[str, str]:
    """Returns the interfaces that have an IPv4 address, with it."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(one.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def spoken(there: Mapping[str, str]) -> str:
    """Returns `eth0 10.0.0.2, lo 127.0.0.1`."""
    return ", ".join(f"{name} {address}" for name, address in there.items()) or "none"


def check_interfaces(environ: Mapping[str, str], there: Mapping[str, str], hosts: int, devices: bool) -> List[Finding]:
    """Looks at what launchers were told, before anybody is met.

    hosts: 1, or more where the job has several; devices: there are some, so that NCCL may carry something. What a variable
    says of a library that is not used, or perhaps not, is a warning.
    """
    used = {INCLUDE[2]: "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ, INCLUDE[3]: devices}
    found = []
    for variable in INCLUDE:
        if not environ.get(variable):
            continue
        told = f"{variable}={environ[variable]}"
        say = failure if used.get(variable, True) else warning
        chosen = _matching(environ[variable], there, prefixes=variable.startswith("NCCL"))
        if not chosen:
            text = f"{told}: no such interface with an address; here are: {spoken(there)}"
            found.append(say("interfaces", text, f"name one that leads to the other hosts: {variable}={_example(there)}"))
        elif hosts > 1 and all(_loopback(there[name]) for name in chosen):
            text = f"{told} never leaves this host, and the job has several; here are: {spoken(there)}"
            found.append(say("interfaces", text, f"{variable}={_example(there)}"))
    for variable in _EXCLUDE:
        if (
            environ.get(variable)
            and hosts > 1
            and not {"lo", "127.0.0.0/8", "127.0.0.1/8"} & set(environ[variable].split(","))
        ):
            text = f"{variable}={environ[variable]} takes the place of the default, which leaves out lo: MPI may now try it"
            found.append(warning("interfaces", text, "add lo to it"))
    bridges = _idle_bridges(environ, there, routes())
    left_out = without_bridges(environ, there, mpi_texts(environ), routes())
    kept = [name for name in bridges if name in _told(environ, there)]
    if hosts > 1 and kept:
        text = f"as told, Open MPI may use {', '.join(kept)}: bridges lead to no other host; here are: {spoken(there)}"
        todo = f"hvd-vgg launch --network={_example(there)}, or mpirun --mca btl_tcp_if_include {_example(there)}"
        found.append(warning("interfaces", text, todo))
    outward = [name for name, address in there.items() if not _loopback(address)]
    names = ", ".join(name for name in outward if not (left_out and name in bridges))
    apart = f"; MPI leaves out {', '.join(bridges)}" if left_out else ""
    return found or [ok("interfaces", (names or "none but lo") + apart)]


def without_bridges(
    environ: Mapping[str, str], there: Mapping[str, str], texts: Sequence[str], routed: str
) -> Dict[str, str]:
    """Returns the variable that tells Open MPI to leave out this host's idle bridges, and lo as it does by itself.

    Every host with docker has a docker0 of the same address: Open MPI takes the other hosts' for its own network, connects
    to itself and waits for ever. Each rank leaves out its own host's, for a rank tells the others only of what it uses.

    Nothing where there are none, or where somebody has told MPI what to use: by a variable, or in `texts` (`mpi_texts`).
    Open MPI refuses an include beside an exclude. routed: as `routes` returns it.
    """
    idle = _idle_bridges(environ, there, routed)
    if not idle or INCLUDE[0] in environ or _EXCLUDE[0] in environ or any(map(_IN_A_FILE.search, texts)):
        return {}
    return {_EXCLUDE[0]: ",".join(["127.0.0.0/8", *idle])}


def mpi_texts(environ: Mapping[str, str]) -> List[str]:
    """Returns the texts of the files in which Open MPI of this process, or mpirun's, looks for parameters."""
    mpirun = shutil.which("mpirun", path=environ.get("PATH"))
    prefixes = {Path(each).parent.parent for each in (*mpi.loaded(), mpirun) if each} | {
        Path(environ.get("OPAL_PREFIX", "/"))
    }
    folders = [prefix / "etc" for prefix in prefixes] + list(Path("/etc").glob("openmpi*"))  # Debian's, Red Hat's
    told = ",".join(environ.get(f"OMPI_MCA_{name}", "") for name in ("mca_base_param_files", "mca_param_files")).strip(",")
    files = [Path(each) for each in told.split(",")]
    if not told:
        home = Path(environ.get("HOME", "/"))
        files = [home / ".openmpi" / "mca-params.conf", *(folder / "openmpi-mca-params.conf" for folder in folders)]
    files += [folder / "openmpi-mca-params-override.conf" for folder in folders]
    for name in ("mca_base_param_file_prefix", "mca_base_envar_file_prefix"):  # mpirun --am FILE and --tune FILE
        files += map(Path, re.split("[:,]", environ.get(f"OMPI_MCA_{name}", "")))
    return [file.read_text(errors="replace") for file in files if os.access(file, os.R_OK) and file.is_file()]


def routes() -> str:
    """Returns the kernel's table of IPv4 routes."""
    try:
        return Path("/proc/net/route").read_text()
    except OSError:
        return ""


def _idle_bridges(environ: Mapping[str, str], there: Mapping[str, str], routed: str) -> List[str]:
    """Returns the bridges of containers and virtual machines that lead to no other host.

    A host's only way out may be one, whatever it is called: where a network card is a port of it, the host's address and
    routes are the bridge's. So one that has the default route is none of these, nor one by which this host reaches
    mpirun's and no other interface does; nor is any where nothing would be left but lo.
    """
    out = {line.split()[0] for line in routed.splitlines() if re.match(r"\S+\s+0{8}\s", line)} | {_toward(environ, there)}
    idle = [name for name in there if _BRIDGE.match(name) and name not in out]
    return idle if any(name not in idle and not _loopback(address) for name, address in there.items()) else []


def _told(environ: Mapping[str, str], there: Mapping[str, str]) -> List[str]:
    """Returns the interfaces that variables tell Open MPI to use, or do not tell it to leave out; none where none is set."""
    if environ.get(INCLUDE[0]):
        return _matching(environ[INCLUDE[0]], there)
    if environ.get(_EXCLUDE[0]):
        return [name for name in there if name not in _matching(environ[_EXCLUDE[0]], there)]
    return []


def chosen(environ: Mapping[str, str], there: Mapping[str, str]) -> List[str]:
    """Returns the addresses that MPI was told to use, or those of all interfaces that may lead to another host."""
    told = environ.get(INCLUDE[0])
    idle = _idle_bridges(environ, there, routes())
    names = _matching(told, there) if told else [n for n in there if not _loopback(there[n]) and n not in idle]
    return [there[name] for name in names]


def none_chosen(told: str, there: Mapping[str, str]) -> str:
    """Returns why --network, as `told`, can be no job's; nothing where there is an interface that it names."""
    if not told or chosen({INCLUDE[0]: told}, there):
        return ""
    return f"--network={told}: no interface with an address is so called or in it; here are: {spoken(there)}"


def toward_launcher(environ: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Returns the interface by which this host reaches mpirun's, as `eth0 (10.0.0.2)`; nothing where that is unknown."""
    name = _toward(environ, there)
    return f"{name} ({there[name]})" if name else ""


def _toward(environ: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Returns the name of the interface by which this host reaches mpirun's; "" where that is unknown, or this is the host.

    mpirun tells its ranks where it listens; connecting a UDP socket sends nothing and shows which address would. One of
    this host's own says nothing: docker0 has the same on all hosts. Of several ways one that is no bridge is taken.
    """
    by = []
    for address in re.findall(r"tcp4?://([\d.,]+):", environ.get("OMPI_MCA_orte_hnp_uri", "")):
        for each in address.split(","):
            source = None if each in there.values() else _source(each)
            by += [name for name, mine in there.items() if mine == source and not _loopback(mine)]
    return min(by, key=lambda name: bool(_BRIDGE.match(name)), default="")


def _source(address: str) -> Optional[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))
            return str(one.getsockname()[0])
        except OSError:
            return None


def _matching(text: str, there: Mapping[str, str], prefixes: bool = False) -> List[str]:
    """Returns the interfaces that a list of names (or, as NCCL has it, prefixes) and networks picks; ^ picks all others."""
    parts = [part.strip() for part in text.lstrip("^").split(",") if part.strip()]
    exact = text.startswith(("=", "^=")) or not prefixes
    picked = [name for name, address in there.items() if any(_is_meant(p.lstrip("="), name, address, exact) for p in parts)]
    return [name for name in there if name not in picked] if text.startswith("^") else picked


def _is_meant(part: str, name: str, address: str, exact: bool) -> bool:
    if "/" in part:
        try:
            return ipaddress.ip_address(address) in ipaddress.ip_network(part, strict=False)
        except ValueError:
            return False
    return name == part if exact else name.startswith(part)


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _example(there: Mapping[str, str]) -> str:
    outward = [name for name, address in there.items() if not _loopback(address) and not _BRIDGE.match(name)]
    return outward[0] if outward else "NETWORK/BITS, such as 10.0.0.0/24"
