"""Copies the training loop from the source into the README, between its two markers.

    python docs/scripts/quote_loop.py

tests/unit/test_docs.py fails while the README's copy differs from the source.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README, SOURCE, FUNCTION = ROOT / "README.md", ROOT / "hvd_vgg" / "training" / "loop.py", "fit"
BEGIN, END = "<!-- loop: begin -->\n```python\n", "\n```\n<!-- loop: end -->"


def loop_in_source(path: Path = SOURCE) -> str:
    """Returns the source text of the loop, docstring and comments included; empty if the module has no such function."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == FUNCTION:
            return ast.get_source_segment(text, node) or ""
    return ""


def loop_in_readme(text: str) -> str:
    """Returns the loop as the README has it. Raises ValueError if a marker is missing."""
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def main() -> None:
    """Rewrites the README with the loop of the source."""
    text, loop = README.read_text(encoding="utf-8"), loop_in_source()
    if not loop:
        raise SystemExit(f"{SOURCE} has no function {FUNCTION}")
    README.write_text(text.replace(BEGIN + loop_in_readme(text) + END, BEGIN + loop + END), encoding="utf-8")


if __name__ == "__main__":
    main()
