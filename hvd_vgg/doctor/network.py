"""Whether the interfaces that MPI, Gloo and NCCL are configured to use can reach another host."""

from typing import List, Mapping

from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import Finding, failure, ok, warning


def check_interfaces(environ: Mapping[str, str], interfaces: Mapping[str, str], hosts: int, devices: bool) -> List[Finding]:
    """Checks the variables that select interfaces, before the ranks join.

    interfaces: this host's, with their IPv4 addresses; hosts: of the job, 1 for one or unknown; devices: whether there are
    any, so that NCCL may be used. A bad value for a library that is not used, or may not be, is a warning.
    """
    this_host, example = network.format_interfaces(interfaces), network.example_interface(interfaces)
    used = {network.INCLUDE[2]: "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ, network.INCLUDE[3]: devices}
    found = []
    for variable in (each for each in network.INCLUDE if environ.get(each)):
        chosen = network.matching_interfaces(environ[variable], interfaces, prefixes=variable.startswith("NCCL"))
        text = f"{variable}={environ[variable]}"
        if not chosen:
            text += f": no such interface with an address; this host has {this_host}"
        elif hosts > 1 and all(network.is_loopback(interfaces[name]) for name in chosen):
            text += f" never leaves this host, but the job has several; this host has {this_host}"
        else:
            continue
        fix = f"name an interface that leads to the other hosts: {variable}={example}"
        found.append((failure if used.get(variable, True) else warning)("interfaces", text, fix))
    for variable in (each for each in network.EXCLUDE if environ.get(each) and hosts > 1):
        if not {"lo", "127.0.0.0/8", "127.0.0.1/8"} & set(environ[variable].split(",")):
            text = f"{variable}={environ[variable]} replaces the default, which excludes lo: MPI may now try lo"
            found.append(warning("interfaces", text, "add lo to it"))
    routes = network.routes()
    bridges = network.idle_bridges(environ, interfaces, routes)
    allowed = [name for name in bridges if name in network.told_interfaces(environ, interfaces)]
    if hosts > 1 and allowed:
        text = f"MPI is allowed to use {', '.join(allowed)}: bridges lead to no other host; this host has {this_host}"
        fix = f"hvd-vgg launch --network={example}, or mpirun --mca btl_tcp_if_include {example}"
        found.append(warning("interfaces", text, fix))
    excluded = network.exclude_bridges(environ, interfaces, network.mpi_parameter_files(environ), routes)
    outward = [name for name, address in interfaces.items() if not network.is_loopback(address)]
    text = ", ".join(name for name in outward if not (excluded and name in bridges)) or "none but lo"
    return found or [ok("interfaces", text + (f"; MPI leaves out {', '.join(bridges)}" if excluded else ""))]
