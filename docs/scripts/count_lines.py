"""Counts lines of Python: all of them, and code alone, without blank lines, comments and docstrings.

    python docs/scripts/count_lines.py [--files] hvd_vgg [PATH ...]

A PATH is a file or a folder, whose `*.py` are counted at any depth. Prints a line for each PATH and the total; with
--files a line for each file as well. A line with part of a token on it is code: a string over three lines is three of them.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Set

_LAYOUT = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
)


class Lines(NamedTuple):
    """Lines of a file, or of several: all of them, and those with code."""

    total: int
    code: int


def count(source: str) -> Lines:
    """Returns the lines of a module. Raises SyntaxError if it is not Python."""
    code: Set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    for docstring in _docstrings(ast.parse(source)):
        code.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return Lines(len(source.splitlines()), len(code))


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                yield first


def add(counts: Sequence[Lines]) -> Lines:
    """Returns the sum of several counts."""
    return Lines(sum(each.total for each in counts), sum(each.code for each in counts))


def files_of(path: Path) -> List[Path]:
    """Returns the Python files of a folder at any depth, sorted, or the file itself."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Prints the counts of the paths on the command line."""
    parser = argparse.ArgumentParser(description="Counts lines of Python: all of them, and code alone.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--files", action="store_true", help="a line for each file too")
    options = parser.parse_args(argv)
    print(f"{'lines':>7s} {'code':>7s}")
    sums = []
    for path in options.paths:
        counts = {file: count(file.read_text(encoding="utf-8")) for file in files_of(path)}
        if options.files and path.is_dir():
            for file, lines in counts.items():
                print(f"{lines.total:7d} {lines.code:7d}  {file}")
        sums.append(add(list(counts.values())))
        print(f"{sums[-1].total:7d} {sums[-1].code:7d}  {path}")
    if len(sums) > 1:
        total = add(sums)
        print(f"{total.total:7d} {total.code:7d}  total")


if __name__ == "__main__":
    main()
