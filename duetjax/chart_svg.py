"""What charts are written with: colours, text and what it takes of the room, paths."""

from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap
from xml.sax.saxutils import escape

SMALL, NORMAL, TITLE, LARGE = 11, 12, 13, 15
"""Sizes of fonts; pixels, as all lengths."""
LEADING = 16
"""From one line of text to the next."""
_CHARACTER = 0.6
"""Mean width of one, in sizes of its font."""
_COLUMNS, _MOST_VERTICES = 240, 960
"""A path of more vertices is thinned to four in each column at most."""

# On light, on dark, dashes, shape around a point. Any two colours, the text's too, are 19 apart in
# CIELAB for eyes of every kind, by the matrices of Machado, Oliveira and Fernandes (2009).
_SERIES = (
    ("#0a5fa8", "#6cb6ff", "none", "m-4.5,0a4.5,4.5 0 1 0 9,0a4.5,4.5 0 1 0-9,0z"),
    ("#b4451f", "#f69d50", "9 5", "m-4,-4h8v8h-8z"),
    ("#31a75a", "#95fea3", "1 5", "m0,-5.5l5,9h-10z"),
    ("#cf7c0e", "#c9481d", "9 5 1 5", "m0,-5.5l5.5,5.5l-5.5,5.5l-5.5,-5.5z"),
    ("#7d3967", "#a749a4", "5 5", "m0,5.5l5,-9h-10z"),
    ("#9483ea", "#7779fc", "16 5", "m-1.5,-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z"),
    ("#646951", "#9dc29e", "1 5 1 10", "m-5-3l2-2l3,3l3-3l2,2l-3,3l3,3l-2,2l-3-3l-3,3l-2-2l3-3z"),
    ("#9f8894", "#7a8488", "16 5 5 5", "m-5,-4.5l10,9v-9l-10,9z"),
)  # fmt: skip
MOST_SERIES = len(_SERIES)
_LIGHT = """
.back { fill: #ffffff } text { fill: #24292f } .grid { stroke: #d8dee4 } .band { fill: #f3e2b8 }
.mark { stroke: #24292f } .halo { stroke: #ffffff }
"""
_DARK = """
.back { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d } .band { fill: #4a3d12 }
.mark { stroke: #e6edf3 } .halo { stroke: #0d1117 }
"""
_STROKES = """
.line { stroke: currentColor; fill: none; stroke-width: 2; stroke-linecap: round;
stroke-linejoin: round } .fill { fill: currentColor } .mark { stroke-width: 1.5;
stroke-dasharray: 7 5 } .halo { stroke-width: 4; paint-order: stroke }
"""

type Vertex = tuple[float, float | None]
"""A place in a picture; None: a gap in the line."""


def style_sheet(series: int) -> str:
    """Of a picture with so many series, `.s0` and on, in light and in dark surroundings."""
    light, dark, dashes = (
        " ".join(
            f".s{index} {{ {name}: {each[column]} }}" for index, each in enumerate(_SERIES[:series])
        )
        for column, name in enumerate(("color", "color", "stroke-dasharray"))
    )
    media = f"@media (prefers-color-scheme: dark) {{{_DARK}{dark}\n}}\n"
    return f"{_STROKES}{dashes}{_LIGHT}{light}\n{media}"


def text_at(x: float, y: float, content: str, attributes: str = "") -> str:
    """One line of text, its baseline at y."""
    space = " " if attributes else ""
    return f'<text x="{px(x)}" y="{px(y)}"{space}{attributes}>{plain(content)}</text>'


def texts_at(x: float, y: float, lines: Sequence[str], attributes: str = "") -> list[str]:
    """Lines of text beneath each other."""
    return [text_at(x, y + index * LEADING, line, attributes) for index, line in enumerate(lines)]


def text_width(content: str, size: float = SMALL) -> float:
    """What a text takes, more or less: fonts differ."""
    return len(content) * size * _CHARACTER


def wrapped(content: str, room: float, size: float = NORMAL) -> list[str]:
    """Lines that fit; words that do not are broken."""
    return wrap(content, max(1, int(room / size / _CHARACTER)))


def cut(content: str, room: float) -> str:
    """What fits of a text of normal size, with an ellipsis where that is not all."""
    most = int(room / NORMAL / _CHARACTER)
    return content if len(content) <= most else content[: most - 1] + "…"


def plain(content: str) -> str:
    """A text as XML may hold it: no control characters, the others escaped."""
    return escape("".join(each if each.isprintable() else " " for each in content))


def shapes(series: int, points: Sequence[tuple[float, float]]) -> str:
    """The shape of a series at each of the points."""
    shape = _SERIES[series][3]
    return f'<path class="fill" d="{"".join(f"M{px(x)},{px(y)}{shape}" for x, y in points)}"/>'


def path(vertices: Sequence[Vertex], width: float) -> str:
    """A line through vertices, ascending in x from 0 to width; one alone between gaps is a dot."""
    runs = [
        [f"{px(x)},{px(y)}" for x, y in run if y is not None]
        for is_gap, run in groupby(_thinned(vertices, width), key=lambda vertex: vertex[1] is None)
        if not is_gap
    ]
    d = "".join("M" + " ".join(run) + ("h0" if len(run) == 1 else "") for run in runs)
    return f'<path class="line" d="{d}"/>'


def _thinned(vertices: Sequence[Vertex], width: float) -> Sequence[Vertex]:
    """Of each column the first and the last vertex, the highest and the lowest."""
    if len(vertices) <= _MOST_VERTICES:
        return vertices
    kept: list[Vertex] = []
    columns = groupby(enumerate(vertices), key=lambda each: int(each[1][0] / width * _COLUMNS))
    for _, column in columns:
        run = list(column)
        heights = [(y, index) for index, (_, y) in run if y is not None]
        ends = {run[0][0], run[-1][0]}
        if heights:
            ends |= {min(heights)[1], max(heights)[1]}
        kept += [vertices[index] for index in sorted(ends)]
    return kept


def px(value: float) -> str:
    """A length rounded to a tenth, without zeros at the end."""
    return f"{round(value, 1) + 0.0:g}"
