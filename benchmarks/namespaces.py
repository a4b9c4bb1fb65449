"""Hosts on one machine: network namespaces on a bridge, each with a link, an address, a name; needs root, iproute2."""

import contextlib
import os
import shutil
import signal
import subprocess

NETWORK, DEAD_END, BRIDGED = "10.213.77", "10.213.78", "172.17.0"


def missing(programs=("ip",)):
    """Returns what hosts need and this machine lacks; "" for nothing. Hosts of a given rate need `tc` too."""
    absent = ["root"] * (os.getuid() != 0) + [program for program in programs if not shutil.which(program)]
    if absent:
        return f"{' and '.join(absent)} (Debian: apt-get install iproute2)"
    name = f"hvgg{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return "" if made else "permission to make network namespaces"


class Hosts:
    """`count` hosts at `addresses` until the end of a `with`, which ends what runs on them too.

    mbit: the rate of each host's link, both ways; 0: as fast as it goes. `agent`, written into `folder`, takes the place of
    ssh: `agent HOST COMMAND`.
    """

    def __init__(self, count, folder, mbit=0):
        self.prefix, self.count, self.mbit = f"hvgg{os.getpid()}", count, mbit
        self.addresses = [f"{NETWORK}.{host}" for host in range(1, count + 1)]
        self.spaces = [f"{self.prefix}h{host}" for host in range(1, count + 1)]
        self.agent = folder / "agent.sh"
        names = folder / "names"
        names.write_text("".join(f"{address} host{host}\n" for host, address in enumerate(self.addresses, start=1)))
        # `ip netns exec` gives each command a mount namespace of its own; the last number of an address is its namespace's.
        self.named = f'hostname "host$1" && mount --bind "{names}" /etc/hosts && shift && exec "$@"'
        self.agent.write_text(
            f'#!/bin/bash\nhost="$1" number="${{1##*.}}"; shift\nspace="{self.prefix}h$number"\n'
            'ip -n "$space" link show eth0 up | grep -q "state UP" || '
            '{ echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255; }\n'
            f'exec ip netns exec "$space" unshare --uts sh -c \'{self.named}\' sh "$number" bash -c "$*"\n'
        )
        self.agent.chmod(0o755)

    def __enter__(self):
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self):
        ip("link", "add", f"{self.prefix}b", "type", "bridge")
        ip("link", "set", f"{self.prefix}b", "up")
        for host, space in enumerate(self.spaces, start=1):
            outside = f"{self.prefix}v{host}"
            ip("netns", "add", space)
            ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", outside, "master", f"{self.prefix}b", "up")
            ip("-n", space, "addr", "add", f"{NETWORK}.{host}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            if self.mbit:
                self.slow(host, self.mbit)

    def __exit__(self, *error):
        for host, space in enumerate(self.spaces, start=1):
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", space, check=False)
            ip("link", "delete", f"{self.prefix}v{host}", check=False)
        ip("link", "delete", f"{self.prefix}b", check=False)

    def on(self, host, command):
        """Returns what starts `command` on host `host`, from 1."""
        inside = ["ip", "netns", "exec", self.spaces[host - 1], "unshare", "--uts"]
        return [*inside, "sh", "-c", self.named, "sh", str(host), *command]

    def mpirun(self, interface=f"{NETWORK}.0/24"):
        """Returns the beginning of a command on one rank of each host; MPI's messages take `interface`."""
        settings = {"plm_rsh_agent": self.agent, "plm_rsh_no_tree_spawn": 1, "btl": "self,tcp", "pml": "ob1"}
        settings.update(oob_tcp_if_include=f"{NETWORK}.0/24", btl_tcp_if_include=interface)
        words = ["mpirun", "-np", str(self.count), "--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH"]
        words += ["-H", ",".join(f"{address}:1" for address in self.addresses)]
        return self.on(1, words + [word for name, value in settings.items() for word in ("--mca", name, str(value))])

    def add_dead_end(self, name):
        """Gives each host an interface `name` of another network, the same on all, which leads to none of them."""
        for number, space in enumerate(self.spaces, start=1):
            ip("-n", space, "link", "add", name, "type", "veth", "peer", "name", f"{name}x")
            ip("-n", space, "addr", "add", f"{DEAD_END}.{number}/24", "dev", name)
            for end in (name, f"{name}x"):
                ip("-n", space, "link", "set", end, "up")

    def add_bridge(self, name):
        """Gives each host an empty bridge `name` of the same address, as docker's docker0 is."""
        for space in self.spaces:
            ip("-n", space, "link", "add", name, "type", "bridge")
            ip("-n", space, "addr", "add", f"{BRIDGED}.1/16", "dev", name)
            ip("-n", space, "link", "set", name, "up")

    def slow(self, host, mbit):
        """Gives the link of host `host` a rate, both ways."""
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "1mb", "latency", "50ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", f"{self.prefix}v{host}", *shape], check=True)
        subprocess.run(["tc", "-n", f"{self.prefix}h{host}", "qdisc", "add", "dev", "eth0", *shape], check=True)

    def cut(self, host):
        """Takes the link of host `host` down."""
        ip("-n", f"{self.prefix}h{host}", "link", "set", "eth0", "down")


def ip(*words, check=True):
    """Runs one `ip` command; without `check` it may fail, in silence."""
    subprocess.run(["ip", *words], check=check, stderr=None if check else subprocess.DEVNULL)
