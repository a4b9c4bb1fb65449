"""Draws docs/layers.svg from the imports of the package: folders as boxes, one row a layer, arrows for imports.

    python docs/scripts/layers.py [--out=docs/layers.svg]

A folder's layer is the longest chain of imports below it. An arrow is left out where a longer chain of arrows implies it.
Folders that import each other in a circle share a layer and have red arrows. The modules of the top folder are one box, but
for `__main__`; its `__init__`, which only names what users import, is left out.
"""

import argparse
import ast
import textwrap
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple
from xml.sax.saxutils import escape

PACKAGE = Path(__file__).resolve().parents[2] / "hvd_vgg"
ROOT_BOX, MAIN = "", "__main__"

Graph = Dict[str, Set[str]]  # what each box imports from
Arrow = Tuple[str, str]  # the importing box and the imported one
Slot = Tuple[str, ...]  # a box alone, or an arrow and the layer that it passes through
Place = Tuple[int, int, int]  # left, top, height

_BOX_WIDTH, _LANE_WIDTH, _GAP, _ROW_GAP, _MARGIN = 216, 12, 28, 46, 16
_LINE, _TITLE, _COLUMNS = 15, 26, 28  # pixels of a text line and of a box's title; characters of a text line
_STYLE = """
  text { font: 12px monospace; fill: #333 } .title { font: bold 14px sans-serif; fill: #111 } .note { font: 12px sans-serif }
  rect { fill: #f6f8fa; stroke: #57606a } path { fill: none; stroke: #57606a } .circle { stroke: #cf222e }
""".strip("\n")


def modules_of(package: Path) -> Dict[str, List[str]]:
    """Returns the names of the modules of each box: the folders of the package, its root, and `__main__`."""
    found: Dict[str, List[str]] = {}
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            found.setdefault(_box(package, path.relative_to(package).with_suffix("").parts), []).append(path.stem)
    return found


def imports_of(package: Path) -> Graph:
    """Returns which boxes the modules of each box import from, wherever in a module the import stands."""
    graph: Graph = {box: set() for box in modules_of(package)}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        own = _box(package, parts)
        for name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name.split(".")[0] == package.name:
                box = _box(package, tuple(name.split(".")[1:]))
                if box != own and box in graph:
                    graph.setdefault(own, set()).add(box)
    return graph


def _box(package: Path, parts: Tuple[str, ...]) -> str:
    """Returns the box of a module, or of a name in one, by its path below the package."""
    if parts[:1] == (MAIN,):
        return MAIN
    return parts[0] if parts and (package / parts[0]).is_dir() else ROOT_BOX


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reachable(graph: Graph, start: str) -> Set[str]:
    """Returns every box that `start` imports from, directly or not; `start` itself only if it is in a circle."""
    found: Set[str] = set()
    left = list(graph[start])
    while left:
        box = left.pop()
        if box not in found:
            found.add(box)
            left.extend(graph[box])
    return found


def layers_of(graph: Graph) -> Dict[str, int]:
    """Returns the layer of each box, from 0 at the bottom; boxes in a circle share one."""
    below = {box: reachable(graph, box) for box in graph}
    circle = {box: frozenset({box} | {other for other in below[box] if box in below[other]}) for box in graph}
    layers: Dict[str, int] = {}
    for box in sorted(graph, key=lambda each: (len(below[each] | {each}), each)):  # what is below a box comes before it
        layers[box] = 1 + max((layers.get(other, -1) for other in below[box] - circle[box]), default=-1)
    return {box: max(layers[other] for other in circle[box]) for box in graph}


def arrows_of(graph: Graph) -> List[Arrow]:
    """Returns the pairs (importer, imported) to draw: those that no longer chain implies, and those in a circle."""
    below = {box: reachable(graph, box) for box in graph}

    def implied(box: str, target: str) -> bool:
        others = (other for other in graph[box] - {target} if target in below[other])
        return any(box not in below[other] and other not in below[target] for other in others)

    return [
        (box, target)
        for box in sorted(graph)
        for target in sorted(graph[box])
        if box in below[target] or not implied(box, target)
    ]


def draw(package: Path = PACKAGE) -> str:
    """Returns the picture as the text of an SVG file; a function of the package's imports and module names."""
    modules, graph = modules_of(package), imports_of(package)
    layers, arrows = layers_of(graph), arrows_of(graph)
    rows = _rows(layers, arrows)
    texts = {box: textwrap.wrap(" ".join(modules[box]), _COLUMNS) if box != MAIN else [] for box in graph}
    width = 2 * _MARGIN + max(sum(_width(each) + _GAP for each in row) - _GAP for row in rows)
    places: Dict[Slot, Place] = {}
    top = _MARGIN
    for row in rows:
        height = max(_TITLE + _LINE * len(texts.get(each[0], [])) for each in row if len(each) == 1) + 8
        left = (width - sum(_width(each) + _GAP for each in row) + _GAP) // 2
        for each in row:
            places[each] = (left, top, height)
            left += _width(each) + _GAP
        top += height + _ROW_GAP
    body = [_path(places, arrows, arrow, layers) for arrow in arrows]
    for each, place in places.items():
        if len(each) == 1:
            body += _box_lines(_title(package, each[0]), texts[each[0]], place)
    height = top - _ROW_GAP + 30
    note = "An arrow: modules above import from below. Left out: arrows that a longer chain implies."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
            f"<title>The layers of {escape(package.name)}, drawn from its imports</title>",
            f"<style>\n{_STYLE}\n</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<polygon points="0,0 8,4 0,8" fill="#57606a"/></marker></defs>',
            f'<rect width="{width}" height="{height}" style="fill: #fff; stroke: none"/>',
            *body,
            f'<text class="note" x="{_MARGIN}" y="{height - 8}">{note}</text>',
            "</svg>\n",
        ]
    )


def _width(slot: Slot) -> int:
    return _BOX_WIDTH if len(slot) == 1 else _LANE_WIDTH


def _rows(layers: Dict[str, int], arrows: Sequence[Arrow]) -> List[List[Slot]]:
    """Returns the slots of each layer, the top one first, each near the boxes above that import from it.

    A slot is a box, or a lane for an arrow that passes through the layer.
    """
    rows: List[List[Slot]] = []
    place: Dict[Slot, float] = {}

    def wanted(slot: Slot) -> float:
        if len(slot) > 1:
            return place[slot[:1]]
        above = [place[(importer,)] for importer, imported in arrows if imported == slot[0] and (importer,) in place]
        return sum(above) / len(above) if above else 0.5

    for layer in sorted(set(layers.values()), reverse=True):
        slots: List[Slot] = [(box,) for box in layers if layers[box] == layer]
        slots += [(*arrow, str(layer)) for arrow in arrows if layers[arrow[1]] < layer < layers[arrow[0]]]
        slots.sort(key=lambda slot: (wanted(slot), slot))
        place.update({slot: (number + 0.5) / len(slots) for number, slot in enumerate(slots)})
        rows.append(slots)
    return rows


def _path(places: Dict[Slot, Place], arrows: Sequence[Arrow], arrow: Arrow, layers: Dict[str, int]) -> str:
    """Returns an arrow through its lanes; those that leave or reach one box are spread over its edge."""
    left, top, height = places[arrow[:1]]
    left_below, top_below, _ = places[arrow[1:]]
    leaving = sorted((each for each in arrows if each[0] == arrow[0]), key=lambda each: places[each[1:]])
    reaching = sorted((each for each in arrows if each[1] == arrow[1]), key=lambda each: places[each[:1]])
    x, y = left + _BOX_WIDTH * (leaving.index(arrow) + 1) // (len(leaving) + 1), top + height
    x_below = left_below + _BOX_WIDTH * (reaching.index(arrow) + 1) // (len(reaching) + 1)
    if layers[arrow[0]] == layers[arrow[1]]:
        return f'<path class="circle" d="M{x},{y} C{x},{y + 30} {x_below},{y + 30} {x_below},{y}"/>'
    lanes = [places[(*arrow, str(layer))] for layer in range(layers[arrow[0]] - 1, layers[arrow[1]], -1)]
    drawn = f"M{x},{y}"
    for lane_left, lane_top, lane_height in [*lanes, (x_below - _LANE_WIDTH // 2, top_below, 0)]:
        x_next, bend = lane_left + _LANE_WIDTH // 2, (y + lane_top) // 2
        drawn += f" C{x},{bend} {x_next},{bend} {x_next},{lane_top}" + (f" V{lane_top + lane_height}" if lane_height else "")
        x, y = x_next, lane_top + lane_height
    return f'<path d="{drawn}" marker-end="url(#head)"/>'


def _box_lines(title: str, texts: List[str], place: Place) -> List[str]:
    left, top, height = place
    lines = [
        f'<rect x="{left}" y="{top}" width="{_BOX_WIDTH}" height="{height}" rx="4"/>',
        f'<text class="title" x="{left + 8}" y="{top + 18}">{escape(title)}</text>',
    ]
    return lines + [
        f'<text x="{left + 8}" y="{top + _TITLE + _LINE * number + 9}">{escape(text)}</text>'
        for number, text in enumerate(texts)
    ]


def _title(package: Path, box: str) -> str:
    return {ROOT_BOX: f"{package.name}/*.py", MAIN: f"{MAIN}.py"}.get(box, f"{box}/")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description="Draws the layers of the package from its imports.")
    parser.add_argument("--out", type=Path, default=PACKAGE.parent / "docs" / "layers.svg")
    options = parser.parse_args(argv)
    options.out.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
