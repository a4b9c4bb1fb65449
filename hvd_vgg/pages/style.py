"""The style of the pages: light and dark by the reader's setting, one column on a phone, black on white on paper."""

from typing import Mapping

SERIES = 6  # colours of curves: --c1 to --c6

# Text, lines and curves have a contrast of 4.5 or more to ground and panel.
_LIGHT = {
    "ground": "#ffffff",
    "panel": "#f6f8fa",
    "ink": "#1f2328",
    "faint": "#59636e",
    "line": "#d1d9e0",
    "link": "#0550ae",
    "good": "#116329",
    "bad": "#a40e26",
    "c1": "#0a58ca",
    "c2": "#a83a08",
    "c3": "#146c2e",
    "c4": "#7a45d6",
    "c5": "#a5115f",
    "c6": "#5c5f00",
}
_DARK = {
    "ground": "#0d1117",
    "panel": "#161b22",
    "ink": "#e6edf3",
    "faint": "#9da7b1",
    "line": "#3d444d",
    "link": "#79b8ff",
    "good": "#56d364",
    "bad": "#ff8e86",
    "c1": "#6cb6ff",
    "c2": "#f69d50",
    "c3": "#6bc46d",
    "c4": "#d2a8ff",
    "c5": "#ff9bce",
    "c6": "#d4d44e",
}
_PAPER = {**_LIGHT, "panel": "#ffffff", "ink": "#000000", "faint": "#333333", "line": "#999999", "link": "#000000"}
# Of the parts of a run's time, `reporting.goodput`.
_PARTS = {
    "training": "c3",
    "recomputed": "bad",
    "starting": "c1",
    "evaluation": "c4",
    "saving": "c6",
    "rewinding": "c2",
    "suspended": "faint",
    "restarting": "c5",
    "stopped": "faint",
}


def _variables(colours: Mapping[str, str]) -> str:
    return f":root {{ {' '.join(f'--{name}: {colour};' for name, colour in colours.items())} }}"


CSS = (
    f"""
{_variables(_LIGHT)}
{_variables({f"part-{part}": f"var(--{name})" for part, name in _PARTS.items()})}
@media (prefers-color-scheme: dark) {{ {_variables(_DARK)} }}
@media print {{ {_variables(_PAPER)} }}
"""
    + """
@media print {
  nav, .skip, .axis, input, details:not([open]) { display: none !important; } figure, tr { break-inside: avoid; }
  .scroll { overflow: visible !important; background: none !important; } h2, h3, summary { break-after: avoid; }
  table { font-size: .75rem !important; } .parts { min-width: 5rem !important; }
  th, td { padding: .2rem .4rem !important; } table:not(.loose) :is(th, td) { white-space: normal !important; }
  table:not(.loose) td { overflow-wrap: anywhere !important; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
a { color: var(--link); } p { margin: .5rem 0; max-width: 70ch; overflow-wrap: anywhere; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
input:focus-visible + label { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; } .skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .75rem 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
.about, .note { color: var(--faint); } .missing { border-left: 4px solid var(--bad); padding-left: .75rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 2rem; }
figure svg { display: block; width: 100%; height: auto; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; margin: .75rem 0; }
.sheet img { display: block; width: 7rem; height: 7rem; } .pixels { image-rendering: pixelated; }
.title { margin: 0 0 .25rem; font-weight: 600; }
figcaption { font-size: .875rem; color: var(--faint); overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .25rem 0; padding: 0; list-style: none; color: var(--ink); }
.legend svg { display: inline-block; width: 1.75rem; height: .7rem; vertical-align: middle; margin-right: .35rem; }
/* Where scroll bars are hidden until used, a shade at its edge says that a table goes on. */
.scroll { overflow-x: auto; margin: .75rem 0;
  background: no-repeat local 0 0 / 2rem 100% linear-gradient(to right, var(--ground) 50%, transparent),
    no-repeat local 100% 0 / 2rem 100% linear-gradient(to left, var(--ground) 50%, transparent),
    no-repeat 0 0 / 1rem 100% linear-gradient(to right, var(--faint), transparent),
    no-repeat 100% 0 / 1rem 100% linear-gradient(to left, var(--faint), transparent); }
table { border-collapse: collapse; font-size: .875rem; }
.scroll::-webkit-scrollbar { height: .5rem; }
.scroll::-webkit-scrollbar-thumb { background: var(--line); border-radius: 4px; }
caption { text-align: left; color: var(--faint); padding-bottom: .25rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  max-width: 34rem; overflow-wrap: break-word; }
thead th { border-color: var(--faint); } tbody th { white-space: nowrap; }
.loose td { white-space: nowrap; } .loose td:last-child { white-space: normal; overflow-wrap: anywhere; max-width: 60rem; }
.tight td, .tight th { white-space: nowrap; }
@media (max-width: 30rem) { th, td { padding: .25rem .35rem; }
  thead th { white-space: normal !important; }
  table:not(.tight, .loose) :is(td, tbody th):not(.number) { white-space: normal; overflow-wrap: anywhere;
    min-width: 5rem; } }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: .25rem 1rem; margin: .5rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl { display: block; }
  dd { margin: 0 0 .5rem; } }
code { font: .9em ui-monospace, "Liberation Mono", monospace; overflow-wrap: anywhere; }
.figure-of { font-size: 2rem; font-weight: 650; line-height: 1.2; margin: .25rem 0; }
details { margin: .75rem 0; } summary { cursor: pointer; padding: .25rem 0; }
.axis { margin-right: 1rem; padding: .35rem .25rem; display: inline-block; } .time { display: none; }
#by-time:checked ~ .figures .time { display: block; } #by-time:checked ~ .figures .epochs { display: none; }
.parts { display: flex; min-width: 9rem; height: .9rem; border: 1px solid var(--line); } .parts span { display: block; }
.parts, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.key { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -.1rem; }
ul { padding-left: 1.25rem; } li { overflow-wrap: anywhere; }
"""
)
