"""The network interfaces of this host, and those that MPI, Gloo and NCCL are configured to use.

A wrong one hangs a job silently: Open MPI, configured to use `lo` between two hosts, waits in MPI_Init forever.
"""

import contextlib
import ipaddress
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

import psutil

from hvd_vgg.parallel.mpi import loaded_mpi_libraries

# Variables that name the interfaces to use, or not to use. mpirun --mca NAME VALUE sets OMPI_MCA_NAME for its ranks.
INCLUDE = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME")
EXCLUDE = ("OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_oob_tcp_if_exclude")
# Bridges of containers and virtual machines: they exist on all hosts and lead to none. Docker names those of its networks
# br- and 12 digits; any other, such as br-lan, may well be a host's way out.
_BRIDGE = re.compile(r"docker|virbr|br-[0-9a-f]{12}$|cni|flannel|podman|lxcbr|lxdbr")
_SET_IN_FILE = re.compile(r"^[^#\n]*\bbtl_tcp_if_(include|exclude)\b", re.MULTILINE)


def is_this_host(name: str) -> bool:
    """Returns whether a host name means this host."""
    return name == socket.gethostname() or is_local_address(name)


def is_local_address(name: str) -> bool:
    """Returns whether a host name resolves to an address of this host, which is one that a socket can be bound to."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as end:
                end.bind(address)
                return True
    return False


def interfaces() -> Dict[str, str]:
    """Returns the IPv4 address of each interface that has one; of several addresses the first."""
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in reversed(addresses)
        if address.family == socket.AF_INET and ":" not in name  # eth0:1 is another address of eth0
    }


def format_interfaces(interfaces: Mapping[str, str]) -> str:
    """Returns `eth0 10.0.0.2, lo 127.0.0.1`."""
    return ", ".join(f"{name} {address}" for name, address in interfaces.items()) or "none"


def exclude_bridges(
    environ: Mapping[str, str], interfaces: Mapping[str, str], parameter_files: Sequence[str], routes: str
) -> Dict[str, str]:
    """Returns the variable that makes Open MPI leave out this host's idle bridges, and lo as it does by default.

    Every host with docker has a docker0 with the same address: Open MPI mistakes those of other hosts for its own network,
    connects to itself and waits forever. Each rank leaves out its own host's, because a rank only advertises what it uses.

    Returns nothing if there are none, or if Open MPI is already configured by a variable or in one of `parameter_files`: it
    refuses an include beside an exclude. parameter_files, routes: as the functions of these names return them.
    """
    idle = idle_bridges(environ, interfaces, routes)
    if not idle or INCLUDE[0] in environ or EXCLUDE[0] in environ or any(map(_SET_IN_FILE.search, parameter_files)):
        return {}
    return {EXCLUDE[0]: ",".join(["127.0.0.0/8", *idle])}


def mpi_parameter_files(environ: Mapping[str, str]) -> List[str]:
    """Returns the contents of the files in which this process's Open MPI, or mpirun's, looks for parameters."""
    binaries = [*loaded_mpi_libraries(), shutil.which("mpirun", path=environ.get("PATH"))]
    prefixes = {Path(environ.get("OPAL_PREFIX", "/")), *(Path(binary).parent.parent for binary in binaries if binary)}
    folders = [*(prefix / "etc" for prefix in prefixes), *Path("/etc").glob("openmpi*")]  # Debian's, Red Hat's

    def listed(*names: str) -> List[Path]:
        values = ",".join(environ.get(f"OMPI_MCA_{name}", "") for name in names)
        return [Path(path) for path in re.split("[:,]", values) if path]

    files = listed("mca_base_param_files", "mca_param_files")
    if not files:
        files = [folder / "openmpi-mca-params.conf" for folder in folders]
        files.append(Path(environ.get("HOME", "/"), ".openmpi/mca-params.conf"))
    files += [folder / "openmpi-mca-params-override.conf" for folder in folders]
    files += listed("mca_base_param_file_prefix", "mca_base_envar_file_prefix")  # mpirun --am FILE and --tune FILE
    return [file.read_text(errors="replace") for file in files if os.access(file, os.R_OK) and file.is_file()]


def routes() -> str:
    """Returns the kernel's table of IPv4 routes; "" if there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/net/route").read_text()
    return ""


def idle_bridges(environ: Mapping[str, str], interfaces: Mapping[str, str], routes: str) -> List[str]:
    """Returns the bridges of containers and virtual machines that lead to no other host.

    A host's only way out may be a bridge, whatever its name: if a network card is a port of it, the bridge has the host's
    address and routes. So a bridge is not idle if it has the default route, or if it alone leads to mpirun's host; and none
    is if nothing but lo would remain.
    """
    default = {line.split()[0] for line in routes.splitlines() if re.match(r"\S+\s+0{8}\s", line)}
    used = {*default, interface_toward_launcher(environ, interfaces)}
    idle = [name for name in interfaces if _BRIDGE.match(name) and name not in used]
    remaining = [name for name, address in interfaces.items() if name not in idle and not is_loopback(address)]
    return idle if remaining else []


def chosen_addresses(environ: Mapping[str, str], interfaces: Mapping[str, str]) -> List[str]:
    """Returns the addresses that MPI is configured to use, or those of all interfaces that may lead to another host."""
    if environ.get(INCLUDE[0]):
        return [interfaces[name] for name in matching_interfaces(environ[INCLUDE[0]], interfaces)]
    idle = idle_bridges(environ, interfaces, routes())
    return [address for name, address in interfaces.items() if not is_loopback(address) and name not in idle]


def network_flag_error(network: str, interfaces: Mapping[str, str]) -> str:
    """Returns why no job can use --network=`network` on this host; "" if it names an interface that exists."""
    if not network or matching_interfaces(network, interfaces):
        return ""
    here = format_interfaces(interfaces)
    return f"--network={network}: no interface has this name or an address in this network; here are: {here}"


def interface_toward_launcher(environ: Mapping[str, str], interfaces: Mapping[str, str]) -> str:
    """Returns the interface through which this host reaches mpirun's; "" if unknown, or if this is mpirun's host.

    mpirun passes the addresses it listens at to its ranks; connecting a UDP socket sends nothing but shows which of this
    host's addresses it would use. An address that this host has too proves nothing: docker0 has the same on all hosts. Of
    several interfaces one that is not a bridge is preferred.
    """
    uris = re.findall(r"tcp4?://([\d.,]+):", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    remote = [address for uri in uris for address in uri.split(",") if address not in interfaces.values()]
    sources = [_source_address(address) for address in remote]
    names = [name for source in sources for name, own in interfaces.items() if own == source and not is_loopback(own)]
    return min(names, key=lambda name: bool(_BRIDGE.match(name)), default="")


def _source_address(destination: str) -> Optional[str]:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect((destination, 9))
        return str(one.getsockname()[0])
    return None


def matching_interfaces(pattern: str, interfaces: Mapping[str, str], prefixes: bool = False) -> List[str]:
    """Returns the interfaces that a comma-separated list of names and networks picks; with a leading ^, all others.

    prefixes: names match interfaces that begin with them, as NCCL has it unless the list begins with =.
    """
    parts = [part.strip().lstrip("=") for part in pattern.lstrip("^").split(",") if part.strip()]
    exact = pattern.startswith(("=", "^=")) or not prefixes
    picked = {name for name, address in interfaces.items() if any(_matches(part, name, address, exact) for part in parts)}
    return [name for name in interfaces if (name in picked) != pattern.startswith("^")]


def _matches(part: str, name: str, address: str, exact: bool) -> bool:
    if "/" in part:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(address) in ipaddress.ip_network(part, strict=False)
        return False
    return name == part if exact else name.startswith(part)


def is_loopback(address: str) -> bool:
    """Returns whether an IP address is a loopback address."""
    return ipaddress.ip_address(address).is_loopback


def example_interface(interfaces: Mapping[str, str]) -> str:
    """Returns an interface that may lead to other hosts, or an example of a network, for a message."""
    outward = (name for name, address in interfaces.items() if not is_loopback(address) and not _BRIDGE.match(name))
    return next(outward, "NETWORK/BITS, such as 10.0.0.0/24")
