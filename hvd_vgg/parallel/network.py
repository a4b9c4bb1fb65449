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

from hvd_vgg.parallel.mpi import loaded_mpi_libraries


def is_this_host(name: str) -> bool:
    """Says whether a host is the one that this runs on."""
    return name == socket.gethostname() or is_local_address(name)


def is_local_address(name: str) -> bool:
    """Says whether a name leads to an address of this host: one that a socket can be bound to."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as end:
                end.bind(address)
            return True
        except OSError:
            continue
    return False


_SIOCGIFADDR = 0x8915  # linux/sockios.h
# Variables that name what to use, or what not to. mpirun --mca NAME VALUE sets OMPI_MCA_NAME for its ranks.
INCLUDE = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME")
EXCLUDE = ("OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_oob_tcp_if_exclude")
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


def format_interfaces(there: Mapping[str, str]) -> str:
    """Returns `eth0 10.0.0.2, lo 127.0.0.1`."""
    return ", ".join(f"{name} {address}" for name, address in there.items()) or "none"


def exclude_bridges(
    environ: Mapping[str, str], there: Mapping[str, str], texts: Sequence[str], routed: str
) -> Dict[str, str]:
    """Returns the variable that tells Open MPI to leave out this host's idle bridges, and lo as it does by itself.

    Every host with docker has a docker0 of the same address: Open MPI takes the other hosts' for its own network, connects
    to itself and waits for ever. Each rank leaves out its own host's, for a rank tells the others only of what it uses.

    Nothing where there are none, or where somebody has told MPI what to use: by a variable, or in `texts` (`mpi_texts`).
    Open MPI refuses an include beside an exclude. routed: as `routes` returns it.
    """
    idle = idle_bridges(environ, there, routed)
    if not idle or INCLUDE[0] in environ or EXCLUDE[0] in environ or any(map(_IN_A_FILE.search, texts)):
        return {}
    return {EXCLUDE[0]: ",".join(["127.0.0.0/8", *idle])}


def mpi_parameter_files(environ: Mapping[str, str]) -> List[str]:
    """Returns the texts of the files in which Open MPI of this process, or mpirun's, looks for parameters."""
    mpirun = shutil.which("mpirun", path=environ.get("PATH"))
    prefixes = {Path(each).parent.parent for each in (*loaded_mpi_libraries(), mpirun) if each} | {
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


def idle_bridges(environ: Mapping[str, str], there: Mapping[str, str], routed: str) -> List[str]:
    """Returns the bridges of containers and virtual machines that lead to no other host.

    A host's only way out may be one, whatever it is called: where a network card is a port of it, the host's address and
    routes are the bridge's. So one that has the default route is none of these, nor one by which this host reaches
    mpirun's and no other interface does; nor is any where nothing would be left but lo.
    """
    out = {line.split()[0] for line in routed.splitlines() if re.match(r"\S+\s+0{8}\s", line)} | {_toward(environ, there)}
    idle = [name for name in there if _BRIDGE.match(name) and name not in out]
    return idle if any(name not in idle and not is_loopback(address) for name, address in there.items()) else []


def told_interfaces(environ: Mapping[str, str], there: Mapping[str, str]) -> List[str]:
    """Returns the interfaces that variables tell Open MPI to use, or do not tell it to leave out; none where none is set."""
    if environ.get(INCLUDE[0]):
        return matching_interfaces(environ[INCLUDE[0]], there)
    if environ.get(EXCLUDE[0]):
        return [name for name in there if name not in matching_interfaces(environ[EXCLUDE[0]], there)]
    return []


def chosen_addresses(environ: Mapping[str, str], there: Mapping[str, str]) -> List[str]:
    """Returns the addresses that MPI was told to use, or those of all interfaces that may lead to another host."""
    told = environ.get(INCLUDE[0])
    idle = idle_bridges(environ, there, routes())
    names = matching_interfaces(told, there) if told else [n for n in there if not is_loopback(there[n]) and n not in idle]
    return [there[name] for name in names]


def network_flag_error(told: str, there: Mapping[str, str]) -> str:
    """Returns why --network, as `told`, can be no job's; nothing where there is an interface that it names."""
    if not told or chosen_addresses({INCLUDE[0]: told}, there):
        return ""
    return f"--network={told}: no interface with an address is so called or in it; here are: {format_interfaces(there)}"


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
            by += [name for name, mine in there.items() if mine == source and not is_loopback(mine)]
    return min(by, key=lambda name: bool(_BRIDGE.match(name)), default="")


def _source(address: str) -> Optional[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))
            return str(one.getsockname()[0])
        except OSError:
            return None


def matching_interfaces(text: str, there: Mapping[str, str], prefixes: bool = False) -> List[str]:
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


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def example_interface(there: Mapping[str, str]) -> str:
    outward = [name for name, address in there.items() if not is_loopback(address) and not _BRIDGE.match(name)]
    return outward[0] if outward else "NETWORK/BITS, such as 10.0.0.0/24"
