"""Flags from dataclasses: one field is one flag. Parsing, flag files and --help; all errors are reported in one message.

A dataclass of flags may inherit from others (the sections of `hvd_vgg.config`), and each may define `conflicts(self)`, which
yields one line for every combination of its values that cannot run.
"""

import dataclasses
import difflib
import math
import operator
import os
import re
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Sequence, Set, Tuple

from absl import flags

from hvd_vgg import storage
from hvd_vgg.errors import USAGE, Failure

# What a value of each type is called in messages.
_EXPECTED: Dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    Tuple[int, ...]: "integers separated by commas",
    Tuple[float, ...]: "numbers separated by commas",
    Tuple[str, ...]: "names separated by commas",
}
_LIMITS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
# The order of groups in --help and in flag files; others follow.
_GROUPS = ("Data", "Model", "Recipe", "Run", "Device")


def flag(default: Any, group: str, text: str, unit: str = "", **limits: Any) -> Any:
    """Declares a dataclass field that is a flag.

    `limits`: `choices`, `at_least`, `above`, `at_most`, `below`.
    """
    return dataclasses.field(default=default, metadata={"group": group, "text": text, "unit": unit, **limits})


def hyperparameter(default: Any, group: str, text: str, unit: str = "", **limits: Any) -> Any:
    """Declares a flag that decides what is learned: a checkpoint is continued only under the same value."""
    return flag(default, group, text, unit, hyperparameter=True, **limits)


def same_flag(section: Any, name: str, default: Any = None) -> Any:
    """Declares the flag `name` of another section, for a command that needs that flag but not the section.

    default: in place of the other section's.
    """
    field = section.__dataclass_fields__[name]
    return dataclasses.field(default=field.default if default is None else default, metadata=field.metadata)


def words(group: str, text: str, name: str) -> Any:
    """Declares a dataclass field, Tuple[str, ...], that is no flag: the words of the command line that are none.

    They are taken as they are, whatever bytes they have; name: of one of them, in --help.
    """
    return dataclasses.field(default=(), metadata={"group": group, "text": text, "unit": "", "words": name})


def _words_field(kind: Any) -> str:
    """Returns the name of the field that `words` declares; "" where there is none."""
    return next((field.name for field in dataclasses.fields(kind) if "words" in field.metadata), "")


class _Parser(flags.ArgumentParser):
    """Converts text to a field's type. Text that cannot be converted is kept, for `validate` to report with all else."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        try:
            if self.kind is bool:
                return flags.BooleanParser().parse(argument)
            if self.kind in (int, float, str):
                return self.kind(argument)
            return tuple(self.kind.__args__[0](part.strip()) for part in argument.split(",") if part.strip())
        except ValueError:
            return argument


def parse_flags(kind: Any, argv: Sequence[str], defaults: Any = None, shared: Any = None) -> Any:
    """Returns a `kind` (a dataclass of flags) from `argv`, which has no program name and may name flag files.

    defaults: an instance of any dataclass of flags, whose values take the place of the defaults of the flags of that name;
    or anything else with such attributes.
    shared: a dataclass of flags; those that `kind` lacks are passed over in flag files, so that one file serves several
    commands, and refused elsewhere. Raises Failure(USAGE) that lists every unknown flag, invalid value and conflict.
    """
    values, free = flags.FlagValues(), _words_field(kind)
    for field in dataclasses.fields(kind):
        default: Any = getattr(defaults, field.name, field.default)
        text = field.metadata["text"]
        if field.name == free:
            continue
        if field.type is bool:
            switch: Any = flags.BooleanFlag(field.name, default, text)
            switch.parser = _Parser(bool)
            flags.DEFINE_flag(switch, values)
        else:
            flags.DEFINE(_Parser(field.type), field.name, default, text, flag_values=values)
    names = [field.name for field in dataclasses.fields(kind) if field.name != free]
    unused = {field.name for field in dataclasses.fields(shared or kind)}.difference(names)
    cut = argv.index("--") if free and "--" in argv else len(argv)  # behind it are words alone
    values.set_gnu_getopt(bool(free))  # flags may follow words
    try:
        unknown = values([""] + _expand_flag_files(argv[:cut], unused), known_only=True)[1:]
    except flags.Error as error:
        raise Failure(USAGE, f"flags: {error}") from error
    given: Dict[str, Any] = {name: values[name].value for name in names}
    if free:
        given[free] = (*(word for word in unknown if not word.startswith("-")), *argv[cut + 1 :])
        unknown = [word for word in unknown if word.startswith("-")]
    config = expand_home(kind(**given))
    errors = [_unknown_flag(word, names) for word in unknown] + validate(config)
    if errors:
        raise Failure(USAGE, f"{len(errors)} illegal flag(s):\n" + "\n".join(f"  {error}" for error in errors))
    return config


def expand_home(config: Any) -> Any:
    """Returns `config` with the home directory in the place of ~ in its paths: a shell leaves --flag=~/x as it is."""
    paths = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if _is_path(field)}
    # Path would cut s3:// to s3:/, and raises where there is no such home.
    homes = {name: os.path.expanduser(path) for name, path in paths.items() if isinstance(path, str)}  # noqa: PTH111
    return dataclasses.replace(config, **homes)


def _is_path(field: Any) -> bool:
    return bool(field.metadata["unit"] == "path")


def _path_error(path: str) -> str:
    """Returns what was expected where a path cannot be one of a file here; "" if it can."""
    if path.startswith("~"):
        return "the home directory of a user of this host, or ./ in front of a name that begins with ~"
    scheme, _, rest = path.partition("://")
    if not rest or not scheme.isalnum():
        return ""
    if scheme == "file":
        return f"a path without file://, as {rest}"
    return f"a path on this host: files are not read from {scheme}:// storage; mount it, or copy them to a disk first"


def _expand_flag_files(argv: Sequence[str], unused: Set[str]) -> List[str]:
    """Returns `argv` with the flags of each flag file in its place, without those in `unused`.

    Raises Failure(USAGE) for a file that cannot be read, and for one that names another: whoever sends one would choose what
    else is read here.
    """
    expanded: List[str] = []
    words = iter(argv)
    for word in words:
        name, equals, path = word.partition("=")
        if name not in ("-flagfile", "--flagfile"):
            expanded.append(word)
            continue
        path = os.path.expanduser(path if equals else next(words, ""))  # noqa: PTH111
        if _path_error(path):
            raise Failure(USAGE, f"--flagfile={path}: expected {_path_error(path)}")
        try:
            lines = storage.read_bytes(Path(path)).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise Failure(USAGE, f"--flagfile={path}, byte {error.start}: expected text in UTF-8") from error
        except OSError as error:
            raise Failure(USAGE, f"--flagfile={path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text or text.startswith(("#", "//")):
                continue
            if re.match(r"--?flagfile\b", text):
                text = (
                    f"--flagfile={path}, line {number}: a flag file cannot name another; pass each with its own --flagfile"
                )
                raise Failure(USAGE, text)
            name = text.lstrip("-").split("=")[0]
            if name not in unused and not (name.startswith("no") and name[2:] in unused):
                expanded.append(text)
    return expanded


def _unknown_flag(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lstrip("-").split("=")[0], names, n=1)
    bare = "where a command takes a word that is no flag, it comes first, before all flags"
    hint = f"did you mean --{close[0]}?" if close else "--help lists the flags" if word.startswith("-") else bare
    return f"{word}: no such flag of this command; {hint}"


def validate(config: Any) -> List[str]:
    """Returns one line for every value out of range and every conflict; empty when `config` can run."""
    errors, untyped = [], {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _has_type(value, field.type):
            expected = _EXPECTED[field.type]
            untyped[field.name] = field.default
        elif field.type is str and not _is_utf8(value):
            expected = "text in UTF-8; for a file or directory of another name, make a link to it that has such a name"
        elif _is_path(field) and _path_error(value):
            expected = _path_error(value)
        elif field.type is str and field.default and "choices" not in field.metadata and not value.strip():
            expected = f"a {field.metadata['unit'] or 'value'}, found nothing"
        else:
            numbers = value if isinstance(value, tuple) else (value,)
            expected = next(filter(None, (_range_error(number, field.metadata) for number in numbers)), "")
        if expected:
            errors.append(f"--{field.name}={format_value(value)}: expected {expected}")
    config = dataclasses.replace(config, **untyped)
    for section in reversed(type(config).__mro__):
        errors += vars(section).get("conflicts", lambda _: [])(config)
    return errors


def _is_utf8(text: str) -> bool:
    """Returns whether a word of the command line was text: other bytes are kept in a form that cannot be encoded again."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _has_type(value: Any, kind: Any) -> bool:
    """Returns whether a field's value is of its type: a command line always gives one, a Python script may not."""
    if kind in (bool, str):
        return type(value) is kind
    numbers = (int,) if kind is int else (int, float)
    if kind in (int, float):
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, tuple) and all(_has_type(each, kind.__args__[0]) for each in value)


def _range_error(value: Any, limits: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if "choices" in limits and value not in limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    for limit, (holds, words) in _LIMITS.items():
        if limit in limits and not holds(value, limits[limit]):
            return f"{words} {limits[limit]}"
    return ""


def to_flag_file(config: Any) -> str:
    """Returns `config` as the text of a flag file with every flag, by group; parsing it gives `config` again."""
    lines = []
    for group, fields in _groups(type(config)):
        lines.append(f"# {group}")
        lines.extend(f"--{field.name}={format_value(getattr(config, field.name))}" for field in fields)
    return "\n".join(lines) + "\n"


def describe_flags(kind: Any, usage: str) -> str:
    """Returns the text of --help: `usage`, then every flag by group with its default, unit and meaning."""
    free = [field.metadata for field in dataclasses.fields(kind) if "words" in field.metadata]
    lines = [usage.rstrip(), *(f"\n{each['words']} ...: {each['text']}" for each in free), ""]
    lines += ["Flags (--flagfile=FILE reads more of them from a file; a later one wins):"]
    for group, fields in _groups(kind):
        lines += ["", f"{group}:"]
        for field in fields:
            unit = f"  [{field.metadata['unit']}]" if field.metadata["unit"] else ""
            choices = f"  ({'|'.join(field.metadata['choices'])})" if "choices" in field.metadata else ""
            lines.append(f"  --{field.name}={format_value(field.default)}{unit}{choices}")
            lines.extend(textwrap.wrap(field.metadata["text"], 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"


def _groups(kind: Any) -> List[Tuple[str, List[Any]]]:
    groups: Dict[str, List[Any]] = {name: [] for name in _GROUPS}
    for field in dataclasses.fields(kind):
        if "words" not in field.metadata:
            groups.setdefault(field.metadata["group"], []).append(field)
    return [(name, fields) for name, fields in groups.items() if fields]


def format_value(value: Any) -> str:
    """Returns a flag's value as a command line has it."""
    if isinstance(value, tuple):
        return ",".join(format_value(part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return text[:-2] if text.endswith(".0") else text
    return str(value)
