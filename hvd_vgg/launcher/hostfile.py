"""Open MPI host files."""

import re
from pathlib import Path
from typing import Dict, List, NamedTuple

from hvd_vgg.errors import CONFIGURATION, Failure

# A host's name ends up on the remote shell's command line, so it must not look like an option: -oProxyCommand=...
_LINE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)((?:\s+(?:slots|max[_-]slots)\s*=\s*\d+)*)")


class Host(NamedTuple):
    """A host by the name mpirun uses for it, and the number of ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: str) -> List[Host]:
    """Returns the hosts of an Open MPI host file: one a line, `name slots=N`, with 1 slot by default.

    Slots of a host that is listed again add up; # starts a comment. Raises Failure(CONFIGURATION) naming file and line.
    """
    slots: Dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Failure(CONFIGURATION, f"--hostfile={path}, byte {error.start}: expected text in UTF-8") from error
    except OSError as error:
        raise Failure(CONFIGURATION, f"--hostfile={path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        settings = dict(re.findall(r"([\w-]+)\s*=\s*(\d+)", match[2])) if match else {}
        count = int(settings.get("slots", 1))
        if not match or count < 1:
            expected = "expected `host slots=N` with N of at least 1 (not host:N, user@host or an IPv6 address)"
            raise Failure(CONFIGURATION, f"{path}, line {number}: {line!r}: {expected}")
        slots[match[1]] = slots.get(match[1], 0) + count
    if not slots:
        raise Failure(CONFIGURATION, f"--hostfile={path} names no host: expected a line `host slots=N` for each")
    return [Host(name, count) for name, count in slots.items()]
