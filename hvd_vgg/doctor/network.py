"""Whether the interfaces that MPI, Gloo and NCCL were told to use can reach another host."""

from typing import List, Mapping

from hvd_vgg.parallel import network
from hvd_vgg.reporting.findings import Finding, failure, ok, warning


def check_interfaces(environ: Mapping[str, str], there: Mapping[str, str], hosts: int, devices: bool) -> List[Finding]:
    """Looks at what launchers were told, before anybody is met.

    hosts: 1, or more where the job has several; devices: there are some, so that NCCL may carry something. What a variable
    says of a library that is not used, or perhaps not, is a warning.
    """
    used = {network.INCLUDE[2]: "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ, network.INCLUDE[3]: devices}
    found = []
    for variable in network.INCLUDE:
        if not environ.get(variable):
            continue
        told = f"{variable}={environ[variable]}"
        say = failure if used.get(variable, True) else warning
        chosen = network.matching_interfaces(environ[variable], there, prefixes=variable.startswith("NCCL"))
        if not chosen:
            text = f"{told}: no such interface with an address; here are: {network.format_interfaces(there)}"
            found.append(
                say(
                    "interfaces",
                    text,
                    f"name one that leads to the other hosts: {variable}={network.example_interface(there)}",
                )
            )
        elif hosts > 1 and all(network.is_loopback(there[name]) for name in chosen):
            text = f"{told} never leaves this host, and the job has several; here are: {network.format_interfaces(there)}"
            found.append(say("interfaces", text, f"{variable}={network.example_interface(there)}"))
    for variable in network.EXCLUDE:
        if (
            environ.get(variable)
            and hosts > 1
            and not {"lo", "127.0.0.0/8", "127.0.0.1/8"} & set(environ[variable].split(","))
        ):
            text = f"{variable}={environ[variable]} takes the place of the default, which leaves out lo: MPI may now try it"
            found.append(warning("interfaces", text, "add lo to it"))
    bridges = network.idle_bridges(environ, there, network.routes())
    left_out = network.exclude_bridges(environ, there, network.mpi_parameter_files(environ), network.routes())
    kept = [name for name in bridges if name in network.told_interfaces(environ, there)]
    if hosts > 1 and kept:
        here, example = network.format_interfaces(there), network.example_interface(there)
        text = f"as told, Open MPI may use {', '.join(kept)}: bridges lead to no other host; here are: {here}"
        fix = f"hvd-vgg launch --network={example}, or mpirun --mca btl_tcp_if_include {example}"
        found.append(warning("interfaces", text, fix))
    outward = [name for name, address in there.items() if not network.is_loopback(address)]
    names = ", ".join(name for name in outward if not (left_out and name in bridges))
    apart = f"; MPI leaves out {', '.join(bridges)}" if left_out else ""
    return found or [ok("interfaces", (names or "none but lo") + apart)]
