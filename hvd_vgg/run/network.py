"""The interfaces of this host, and whether those that MPI, Gloo and NCCL were told to use can reach another one.

A wrong one is the hang that says nothing: Open MPI, told to use `lo` between two hosts, waits in MPI_Init for ever.
"""

import fcntl
import ipaddress
import re
import socket
import struct
from typing import Dict, List, Mapping, Optional

from hvd_vgg.run.findings import Finding, failure, ok, warning

_SIOCGIFADDR = 0x8915  # linux/sockios.h
# Variables that name what to use, or what not to. mpirun --mca NAME VALUE sets OMPI_MCA_NAME for its ranks.
INCLUDE = ("OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME")
_EXCLUDE = ("OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_oob_tcp_if_exclude")
# Bridges of containers and virtual machines: alike on all hosts, routed to none.
_BRIDGE = re.compile(r"docker|virbr|br-|cni|flannel|podman|lxcbr|lxdbr")


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
    bridges = [name for name in there if _BRIDGE.match(name)]
    if hosts > 1 and bridges and not any(environ.get(name) for name in (*INCLUDE[:1], *_EXCLUDE[:1])):
        text = f"Open MPI may try {', '.join(bridges)}, which lead to no other host; here are: {spoken(there)}"
        found.append(warning("interfaces", text, f"mpirun --mca btl_tcp_if_include {_example(there)}"))
    names = ", ".join(name for name, address in there.items() if not _loopback(address)) or "none but lo"
    return found or [ok("interfaces", names)]


def chosen(environ: Mapping[str, str], there: Mapping[str, str]) -> List[str]:
    """Returns the addresses that MPI was told to use, or those of all interfaces that may lead to another host."""
    told = environ.get(INCLUDE[0])
    names = _matching(told, there) if told else [n for n in there if not _loopback(there[n]) and not _BRIDGE.match(n)]
    return [there[name] for name in names]


def none_chosen(told: str, there: Mapping[str, str]) -> str:
    """Returns why --network, as `told`, can be no job's; nothing where there is an interface that it names."""
    if not told or chosen({INCLUDE[0]: told}, there):
        return ""
    return f"--network={told}: no interface with an address is so called or in it; here are: {spoken(there)}"


def toward_launcher(environ: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Returns the interface by which this host reaches mpirun's, as `eth0 (10.0.0.2)`; nothing where that is unknown.

    mpirun tells its ranks where it listens; connecting a UDP socket sends nothing and shows which address would.
    """
    for address in re.findall(r"tcp4?://([\d.,]+):", environ.get("OMPI_MCA_orte_hnp_uri", "")):
        for each in address.split(","):
            source = _source(each)
            for name, mine in there.items():
                if mine == source and not _loopback(mine):
                    return f"{name} ({mine})"
    return ""


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
