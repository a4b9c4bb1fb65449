"""The names of TensorFlow that the package uses, and whether a TensorFlow has them, found without importing either.

    pip download --no-deps --only-binary :all: --python-version 3.8 --platform manylinux2010_x86_64 tensorflow-cpu==2.6.5
    python tests/programs/tensorflow_names.py tensorflow_cpu-2.6.5-cp38-cp38-manylinux2010_x86_64.whl

writes those that the wheel has to tests/unit/tensorflow-2.6.txt, which tests/unit/test_versions.py holds the package
against, and lists the others with the places that use them; the exit code is then 1.
"""

import ast
import sys
import zipfile
from pathlib import Path
from typing import Dict, List, Optional, Tuple

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "tests" / "unit" / "tensorflow-2.6.txt"


def dotted(node: ast.AST) -> str:
    """Returns `a.b.c` for the expression a.b.c of names alone, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    before = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if before else ""


def used(source: str) -> List[Tuple[str, int]]:
    """Returns each name `tf.a.b` in Python source, as long as it goes, with its line."""
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in attributes}
    return [(dotted(node), node.lineno) for node in attributes if id(node) not in inner and dotted(node).startswith("tf.")]


def used_by_package() -> Dict[str, List[str]]:
    """Returns the places `file:line` of each name that hvd_vgg uses."""
    found: Dict[str, List[str]] = {}
    for path in sorted((ROOT / "hvd_vgg").rglob("*.py")):
        for name, line in used(path.read_text()):
            found.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{line}")
    return found


def origin(wheel: zipfile.ZipFile, name: str) -> Optional[str]:
    """Returns the module and name that `tf.a.b` is in a wheel of TensorFlow, read from its sources; None: it is not there.

    TensorFlow's public modules are made of imports alone (`from tensorflow.python.ops.math_ops import cast`), which this
    follows; what lies within a class is not looked up.
    """
    files = set(wheel.namelist())
    package = ["tensorflow"]
    parts = name.split(".")[1:]
    while parts:
        tree = ast.parse(wheel.read("/".join([*package, "__init__.py"])))
        part = parts.pop(0)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        found = [(node, alias) for node in imports for alias in node.names if (alias.asname or alias.name) == part]
        if not found:
            return None
        node, alias = found[-1]
        module = [*package, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")
        module = [each for each in module if each]
        if "/".join([*module, alias.name, "__init__.py"]) in files:
            package = [*module, alias.name]
        else:
            return None if parts else ".".join([*module, alias.name])
    return ".".join(package)


def known() -> List[str]:
    """Returns the names in the committed list."""
    return [line.split()[0] for line in KNOWN.read_text().splitlines() if line.startswith("tf.")]


def main(path: str) -> int:
    """Writes the list from the wheel at `path`; returns the exit code."""
    places = used_by_package()
    with zipfile.ZipFile(path) as wheel:
        found = {name: origin(wheel, name) for name in sorted(places)}
    lines = [f"# What hvd_vgg uses and {Path(path).name} has, and where; written by tests/programs/tensorflow_names.py."]
    KNOWN.write_text("\n".join([*lines, *(f"{name} {where}" for name, where in found.items() if where)]) + "\n")
    missing = [name for name, where in found.items() if not where]
    for name in missing:
        print(f"{name} is not in {Path(path).name}: {', '.join(places[name])}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
