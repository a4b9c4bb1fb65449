"""Whether the interfaces that MPI, Gloo and NCCL are configured to use can reach another host."""

from typing import List, Mapping

from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import Finding, failure, ok, warning


def check_interfaces(
    environ: Mapping[str, str], interfaces: Mapping[str, str], several: bool, devices: bool
) -> List[Finding]:
    """Checks the variables that select interfaces, before the ranks join.

    interfaces: this host's, with their IPv4 addresses; several: whether the job is known to have several hosts; devices:
    whether there are any, so that NCCL may be used. A bad value for a library that is not used, or may not be, is a warning.
    """
    here, example = f"this host has {network.format_interfaces(interfaces)}", network.example_interface(interfaces)
    used = {network.INCLUDE[2]: "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ, network.INCLUDE[3]: devices}
    routes = network.routes()
    bridges = network.idle_bridges(environ, interfaces, routes)
    excluded = network.exclude_bridges(environ, interfaces, network.mpi_parameter_files(environ), routes)
    outward = [name for name, address in interfaces.items() if not network.is_loopback(address)]
    found = []
    for variable in (each for each in network.INCLUDE if environ.get(each)):
        chosen = network.matching_interfaces(environ[variable], interfaces, prefixes=variable.startswith("NCCL"))
        problem = "" if chosen else ": no such interface with an address"
        if several and chosen and not set(chosen) & set(outward):
            problem = " never leaves this host, but the job has several"
        if problem:
            fix = f"name an interface that leads to the other hosts: {variable}={example}"
            severity = failure if used.get(variable, True) else warning
            found.append(severity("interfaces", f"{variable}={environ[variable]}{problem}; {here}", fix))
    for variable in (each for each in network.EXCLUDE if environ.get(each) and several):
        if not {"lo", "127.0.0.0/8", "127.0.0.1/8"} & set(environ[variable].split(",")):
            text = f"{variable}={environ[variable]} replaces the default, which excludes lo: MPI may now try lo"
            found.append(warning("interfaces", text, "add lo to it"))
    include, exclude = environ.get(network.INCLUDE[0]), environ.get(network.EXCLUDE[0])
    told = include or (f"^{exclude}" if exclude else "")
    allowed = [name for name in network.matching_interfaces(told, interfaces) if name in bridges]
    if several and allowed:
        text = f"MPI is allowed to use {', '.join(allowed)}: bridges lead to no other host; {here}"
        fix = f"hvd-vgg launch --network={example}, or mpirun --mca btl_tcp_if_include {example}"
        found.append(warning("interfaces", text, fix))
    text = ", ".join(name for name in outward if not (excluded and name in bridges)) or "none but lo"
    return found or [ok("interfaces", text + (f"; MPI leaves out {', '.join(bridges)}" if excluded else ""))]
