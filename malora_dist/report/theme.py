"""Colours and styles of the page. A colour is a CSS variable, so that pictures follow light and dark mode too.

matplotlib knows no CSS variables: a picture is drawn with a stand-in colour for each, which `use_variables` replaces.
"""

import re

INK = "#010101"
MUTED = "#020202"
GRID = "#030303"
ACCENT = "#040404"
ON_ACCENT = "#050505"
SURFACE = "#060606"

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    ACCENT: "accent",
    ON_ACCENT: "on-accent",
    SURFACE: "surface",
}
_TASK_STAND_IN = re.compile("#0a0a([0-9a-f]{2})")

# (light, dark) pairs, told apart by people with the common colour-vision deficiencies when neighbours.
_TASK_COLOURS = (
    ("#2f6db3", "#6ea8e6"),
    ("#d1741f", "#f0a25a"),
    ("#2a8a6a", "#5cc4a0"),
    ("#b8455a", "#ea8394"),
    ("#7458b0", "#ab93e3"),
    ("#8a6a35", "#c9a76a"),
    ("#1c93a8", "#5bc5d8"),
    ("#c05a9c", "#e594c6"),
    ("#6c8326", "#a9c25c"),
    ("#66758a", "#9caabd"),
)

_LIGHT = {
    "ink": "#1d2229",
    "muted": "#646d79",
    "grid": "#e4e7eb",
    "surface": "#ffffff",
    "panel": "#f6f7f9",
    "accent": "#2f6db3",
    "on-accent": "#ffffff",
    "good": "#1f7a55",
    "bad": "#b0364b",
}
_DARK = {
    "ink": "#e6e9ed",
    "muted": "#98a2af",
    "grid": "#2c333c",
    "surface": "#14181d",
    "panel": "#1b2027",
    "accent": "#4d8fd8",
    "on-accent": "#ffffff",
    "good": "#5cc49a",
    "bad": "#ee8797",
}


def task_colour(index: int) -> str:
    """Return the stand-in colour of the task at `index`; after ten tasks the colours come again."""
    return f"#0a0a{index % len(_TASK_COLOURS):02x}"


def task_variable(index: int) -> str:
    """Return the CSS value of the colour of `task_colour`, for HTML."""
    return f"var(--task-{index % len(_TASK_COLOURS)})"


def use_variables(svg: str) -> str:
    """Replace stand-in colours by CSS variables."""
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return _TASK_STAND_IN.sub(lambda match: f"var(--task-{int(match[1], 16)})", svg)


def stylesheet() -> str:
    """Return the page's CSS: variables for both modes, then the rules."""
    light, dark = (_declarations(colours, mode) for mode, colours in enumerate((_LIGHT, _DARK)))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_RULES}"


def _declarations(colours: dict[str, str], mode: int) -> str:
    tasks = {f"task-{index}": pair[mode] for index, pair in enumerate(_TASK_COLOURS)}
    return " ".join(f"--{name}: {value};" for name, value in {**colours, **tasks}.items())


_RULES = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--surface); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
header .run { color: var(--muted); margin: 0 0 .4rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.55rem, 4.2vw, 2.3rem); line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .8rem; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 3.75rem 0 1.1rem; padding-top: 1.1rem;
  border-top: 1px solid var(--grid); }
p { max-width: 68ch; margin: .5rem 0; }
.lead { font-size: 1.06rem; }
.note, figcaption, .tiles dt, th, .small { color: var(--muted); }
.note, figcaption, .small { font-size: .88rem; line-height: 1.45; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 2rem 0 0;
  background: var(--grid); border: 1px solid var(--grid); border-radius: 10px; overflow: hidden; }
.tiles div { background: var(--surface); padding: .85rem 1.1rem; }
.tiles dt { font-size: .82rem; }
.tiles dd { margin: .1rem 0 0; font-size: 1.25rem; font-weight: 600; letter-spacing: -.01em; }
.tiles dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .55rem; vertical-align: baseline; white-space: nowrap; }
th { font-weight: 500; font-size: .85rem; }
tbody tr, tfoot tr { border-top: 1px solid var(--grid); }
tbody th { font-size: 1rem; color: var(--ink); font-weight: 600; }
tr > :first-child { text-align: left; padding-left: 0; }
tr > :last-child { padding-right: 0; }
tfoot th, tfoot td { font-weight: 600; color: var(--ink); font-size: 1rem; }
.err { display: inline-block; min-width: 3.2em; text-align: right; color: var(--muted);
  font-size: .85em; font-weight: 400; }
.verdict { display: block; font-size: .82rem; font-weight: 400; color: var(--muted); }
.good { color: var(--good); } .bad { color: var(--bad); }
table.counts { width: auto; font-size: .92rem; }
table.counts th { white-space: normal; vertical-align: bottom; min-width: 4.6rem; }
table.counts th:first-child { white-space: nowrap; }
.task { display: inline-block; position: relative; padding-left: 1.1em; overflow-wrap: anywhere; }
.task::before { content: ""; position: absolute; left: 0; top: .47em; width: .62em; height: .62em; border-radius: 50%;
  background: var(--c); }

.beside { display: grid; grid-template-columns: minmax(0, 1.75fr) minmax(0, 1fr); gap: 2.25rem; align-items: start; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2.25rem 3rem; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 1.2rem 1.5rem;
  margin-top: .9rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .5rem; }
figcaption strong { display: block; color: var(--ink); font-size: 1rem; font-weight: 600; }
.many figcaption strong { font-size: .88rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .2rem 0 .9rem; padding: 0; list-style: none;
  font-size: .88rem; }
h3 { font-size: 1rem; line-height: 1.45; margin: 2.4rem 0 0; }
.pair h3 { margin: 0; }
.pair .many { grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); }
h3 + .note { margin-top: 0; }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: .9rem 2.5rem;
  margin: 0; }
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1.6rem; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--panel); border-radius: 8px; padding: 1rem 1.2rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 4rem; }

@media (max-width: 900px) { .beside, .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) {
  main { padding: 1.75rem 1.1rem 3rem; }
  .results th, .results td { padding: .5rem .22rem; font-size: .86rem; }
  .results thead th { white-space: normal; font-size: .78rem; vertical-align: bottom; }
  .results tr > :first-child { padding-left: 0; white-space: normal; }
  .results .err { display: block; }
  .results .verdict { font-size: .78rem; }
}
"""
