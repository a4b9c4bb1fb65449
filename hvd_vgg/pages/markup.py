"""HTML of the pages: everything from files is escaped here, once, and a page is one file that loads nothing.

What is markup has the type Markup; whatever else is put into a page becomes text, of whatever type and bytes it is.
"""

import base64
import html
import stat
from pathlib import Path
from typing import Any, Iterable, Sequence, Tuple

from hvd_vgg.pages.style import CSS
from hvd_vgg.run_dir import atomic_write_text, writing

# Nothing from any host, no script, no form: whatever a file may have smuggled in, a browser does not act on it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Markup(str):
    """Text that is markup."""


def escape(value: Any) -> Markup:
    """Returns a value as text of a page; what cannot be printed, such as control characters, as Python escapes it."""
    if isinstance(value, Markup):
        return value
    text = str(value)
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return Markup(html.escape(shown))


def join(parts: Iterable[Any], between: str = "") -> Markup:
    """Returns parts one after another; `between` is markup."""
    return Markup(between.join(map(escape, parts)))


def tag(name: str, content: Any, attributes: str = "") -> Markup:
    """Returns an element; attributes: markup, such as `class="note"`."""
    return Markup(f"<{name}{' ' if attributes else ''}{attributes}>{escape(content)}</{name}>")


def paragraph(*content: Any, kind: str = "") -> Markup:
    """Returns a paragraph; kind: its class."""
    return tag("p", join(content), f'class="{kind}"' if kind else "")


def code(value: Any) -> Markup:
    """Returns text in a fixed width, such as a command."""
    return tag("code", value)


def bullets(rows: Iterable[Any]) -> Markup:
    """Returns a list of points; nothing for none."""
    items = join(tag("li", row) for row in rows)
    return tag("ul", items) if items else Markup()


def table(
    headings: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str, numbers: Sequence[int] = (), kind: str = ""
) -> Markup:
    """Returns a table that scrolls by itself where it is wider than the screen; the first cell of a row is its heading.

    numbers: of the columns that are aligned to the right; kind: its class, `tight` for cells that stay on one line.
    """

    def cells(name: str, row: Sequence[Any]) -> Markup:
        def one(column: int, value: Any) -> Markup:
            right = ' class="number"' if column in numbers else ""
            if name == "th":
                return tag("th", value, f'scope="col"{right}')
            return tag("th", value, f'scope="row"{right}') if not column else tag("td", value, right.strip())

        return tag("tr", join(one(column, value) for column, value in enumerate(row)))

    head = tag("thead", cells("th", headings))
    body = tag("tbody", join(cells("td", row) for row in rows))
    inner = tag("table", join([tag("caption", tag("span", caption)), head, body]), f'class="{kind}"' if kind else "")
    return tag("div", inner, f'class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"')


def pairs(rows: Iterable[Tuple[Any, Any]]) -> Markup:
    """Returns names with their values."""
    return tag("dl", join(join([tag("dt", name), tag("dd", value)]) for name, value in rows))


def image(media: str, data: bytes, alt: Any) -> Markup:
    """Returns an encoded picture, inside the page; media: its type, a PNG is shown pixel by pixel; alt: what it shows."""
    source, kind = base64.b64encode(data).decode(), ' class="pixels"' if media == "image/png" else ""
    return Markup(f'<img src="data:{media};base64,{source}" alt="{escape(alt)}"{kind}>')


def details(summary: Any, content: Any) -> Markup:
    """Returns content that is shown when asked for."""
    return tag("details", join([tag("summary", summary), content]))


def section(anchor: str, title: Any, *content: Any, level: int = 2) -> Markup:
    """Returns a section with its heading; anchor: letters, digits and `-`."""
    heading = tag(f"h{level}", title, f'id="{anchor}-title"')
    return tag("section", join([heading, *content]), f'id="{anchor}" aria-labelledby="{anchor}-title"')


def page(title: str, about: Any, links: Sequence[Tuple[str, str]], content: Any, refresh_seconds: float = 0) -> str:
    """Returns a page; links: anchors of its sections with their names.

    refresh_seconds: after which a browser reads it again; 0: never.
    """
    refresh = f'<meta http-equiv="refresh" content="{max(1, round(refresh_seconds))}">\n' if refresh_seconds else ""
    items = join(tag("li", tag("a", name, f'href="#{anchor}"')) for anchor, name in links)
    navigation = tag("nav", tag("ul", items), 'aria-label="Sections"')
    header = tag("header", join([tag("h1", title), paragraph(about, kind="about"), navigation]))
    main = tag("main", content, 'id="content"')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n{refresh}'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#content">To the content</a>\n{header}\n{main}\n'
        "</body>\n</html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Writes a page, whole or not at all, with the mode of any file of the user's, or its own where it was there before.

    Raises Failure(NOT_WRITTEN).
    """
    with writing(path):
        atomic_write_text(path, text, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666)
