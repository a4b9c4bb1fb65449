"""Prometheus' text format, version 0.0.4, as strictly as its definition has it."""

import re

NAME, LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r"[a-zA-Z_][a-zA-Z0-9_]*"
VALUE = r"[+-]?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|Inf)|NaN"
HELP = re.compile(rf"# HELP ({NAME}) ((?:[^\\\n]|\\\\|\\n)+)")
TYPE = re.compile(rf"# TYPE ({NAME}) (gauge|counter)")
PAIR = rf'({LABEL})="((?:[^\\"\n]|\\\\|\\"|\\n)*)"'
SAMPLE = re.compile(rf"({NAME})\{{({PAIR}(?:,{PAIR})*)\}} ({VALUE})")


def parse(text):
    """Returns {(name, labels): value}; fails for what is not the format, or metadata that are not before their samples."""
    assert text.endswith("\n")
    lines, samples, current = text.splitlines(), {}, None
    while lines:
        line = lines.pop(0)
        if line.startswith("#"):
            current = HELP.fullmatch(line)[1]
            assert current not in {name for name, _ in samples}  # all of a family are together
            assert TYPE.fullmatch(lines.pop(0))[1] == current
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert match[1] == current
        labels = tuple(re.findall(PAIR, match[2]))
        assert (current, labels) not in samples
        samples[current, labels] = float(match[match.re.groups])
    return samples
