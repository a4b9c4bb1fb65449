"""The host file of a job."""

import re
from pathlib import Path
from typing import Dict, List, NamedTuple

from hvd_vgg.errors import CONFIGURATION, Failure

_LINE = re.compile(r"^(\S+?)((?:\s+\w+\s*=\s*\d+)*)$")


class Host(NamedTuple):
    """A host as mpirun names it, and how many ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: str) -> List[Host]:
    """Returns the hosts of an Open MPI host file: a line a host, `name slots=N`, 1 slot where it says none.

    A host that occurs again adds slots; # begins a comment. Raises Failure(CONFIGURATION) naming file and line.
    """
    slots: Dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(CONFIGURATION, f"--hostfile={path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        # A name goes into a command line of the remote shell: -oProxyCommand=... is none.
        if not match or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", match[1]):
            raise Failure(CONFIGURATION, f"{path}, line {number}: {line!r}: expected `host slots=N`")
        given = dict(re.findall(r"(\w+)\s*=\s*(\d+)", match[2]))
        count = int(given.pop("slots", 1))
        given.pop("max_slots", given.pop("max-slots", None))
        if given or count < 1:
            raise Failure(CONFIGURATION, f"{path}, line {number}: {line!r}: expected `host slots=N`, N of 1 or more")
        slots[match[1]] = slots.get(match[1], 0) + count
    if not slots:
        raise Failure(CONFIGURATION, f"--hostfile={path} names no host: expected a line `host slots=N` for each")
    return [Host(name, count) for name, count in slots.items()]
