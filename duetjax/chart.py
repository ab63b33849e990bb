"""Charts as SVG text: panels of lines and bars over axes, with one legend for all of them.

The standard library alone. Colours for light and for dark surroundings; series are told apart by
shapes and dashes too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, isfinite, isnan

from duetjax.chart_axis import Axis, axis_for, number
from duetjax.chart_svg import (
    LARGE,
    LEADING,
    MOST_SERIES,
    NORMAL,
    SMALL,
    TITLE,
    Vertex,
    cut,
    path,
    plain,
    px,
    shapes,
    style_sheet,
    text_at,
    text_width,
    texts_at,
    wrapped,
)

_EDGE, _GAP, _KEY = 16, 24, 36
"""Around everything, between panels, and for a sample in the legend before its name."""
_MOST_SHAPES = 40
"""A line of more points is told by its colour and dashes."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y), ascending in x, joined by a line; y None or NaN: a gap.

    step: a value holds until the next point's x.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    step: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar in each of the panel's groups; None or NaN: none."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Mark:
    """A value to compare with, as an objective: a line across, or upright at an x.

    Upright in a panel with groups it is a band behind one of them.
    """

    value: float
    label: str
    upright: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A pair of axes and what is over them; values up to 0 are left out where one is logarithmic.

    groups: names of the places 0, 1, ... along x, in place of numbers.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = ()
    bars: Sequence[Bars] = ()
    groups: Sequence[str] = ()
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False


def picture(title: str, subtitle: str, panels: Sequence[Panel], columns: int = 1) -> str:
    """The text of an SVG with all panels, row by row; the same for the same arguments.

    A name has one colour and shape in all panels. Raises `ValueError` for more than eight names,
    a panel in which nothing is to be seen, and what is not finite.
    """
    if not panels or columns < 1:
        raise ValueError(f"{len(panels)} panels in {columns} columns are no picture")
    styles = _styles(panels)
    columns = min(columns, len(panels))
    width, height = (640, 260) if columns == 1 else (330, 190)
    plots = [_plot(panel, styles, width, height) for panel in panels]
    left, right, above, below = (max(plot.margins[side] for plot in plots) for side in range(4))
    across, down = left + width + right, above + height + below
    lined = {line.name for panel in panels for line in panel.lines}
    parts, top = _head(title, subtitle, styles, lined, across * columns)
    for index, plot in enumerate(plots):
        x, y = left + index % columns * across, top + index // columns * down + above
        parts.append(f'<g class="panel" transform="translate({px(x)},{px(y)})">')
        parts += [*plot.parts, "</g>"]
    size = f"{px(across * columns)} {px(top + ceil(len(plots) / columns) * down)}"
    start = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img"'
        f' font-family="sans-serif" font-size="{NORMAL}">',
        f"<title>{plain(title)}</title>",
        f"<style>{style_sheet(len(styles))}</style>",
        '<rect class="back" width="100%" height="100%"/>',
    ]
    return "\n".join([*start, *parts, "</svg>\n"])


def _styles(panels: Sequence[Panel]) -> dict[str, int]:
    """The style of each series by its name, in the order in which they appear."""
    names: dict[str, None] = {}
    for panel in panels:
        names |= dict.fromkeys(line.name for line in panel.lines)
        names |= dict.fromkeys(bars.name for bars in panel.bars)
    if len(names) > MOST_SERIES:
        raise ValueError(f"{len(names)} series; a picture has at most {MOST_SERIES}")
    return {name: index for index, name in enumerate(names)}


def _head(
    title: str, subtitle: str, styles: dict[str, int], lined: set[str], width: float
) -> tuple[list[str], float]:
    """Title and legend over all panels, and where those begin."""
    parts, y, room = [], 10.0, width - 2 * _EDGE
    for content, size in ((title, LARGE), (subtitle, NORMAL)):
        for line in wrapped(content, room, size):
            y += size + 5
            parts.append(text_at(_EDGE, y, line, f'font-size="{size}"'))
    x, y, taken = float(_EDGE), y + LEADING + 6, 0
    for name, style in styles.items():
        lines = wrapped(name, room - _KEY) or [""]
        end = x + _KEY + max(text_width(line, NORMAL) for line in lines)
        if taken and end > width - _EDGE:
            x, y, end = _EDGE, y + LEADING * taken + 2, end - x + _EDGE
        parts += [
            f'<g class="s{style}">',
            *([path([(x, y - 4), (x + 28, y - 4)], width)] if name in lined else []),
            shapes(style, [(x + 14, y - 4)]),
            "</g>",
            *texts_at(x + _KEY, y, lines),
        ]
        x, taken = end + _GAP, len(lines)
    return parts, y + LEADING * (taken - 1) + 4


@dataclass(frozen=True, slots=True)
class _Plot:
    """What draws a panel, from the upper left corner between its axes; room around that.

    margins: left, right, above, below.
    """

    parts: list[str]
    margins: tuple[float, float, float, float]


def _plot(panel: Panel, styles: dict[str, int], width: float, height: float) -> _Plot:
    panel = _drawable(panel)
    x, y = _x_axis(panel, width), _y_axis(panel, height)
    beside, left = _beside(panel, x, y)
    over, above = _over(panel, x)
    under, below = _under(panel, x, y)
    series = [*_bars(panel, x, y, styles), *_lines(panel, x, y, styles)]
    parts = [*_bands(panel, x, y), *beside, *over, *under, *series, *_marks(panel, x, y)]
    right = max(_GAP, text_width(number(x.ticks[-1])) / 2 + 8)
    return _Plot(parts, (left, right, above, below))


def _drawable(panel: Panel) -> Panel:
    """Without what cannot be seen; `ValueError` where the rest is nothing, or makes no sense."""

    def seen(value: float | None) -> float | None:
        return None if value is None or isnan(value) or (panel.log_y and value <= 0) else value

    def points(line: Line) -> list[Vertex]:
        return [(x, seen(y)) for x, y in line.points if not (panel.log_x and x <= 0)]

    def is_seen(mark: Mark) -> bool:
        return not (mark.value <= 0 and (panel.log_x if mark.upright else panel.log_y))

    found = replace(
        panel,
        lines=[replace(line, points=points(line)) for line in panel.lines],
        bars=[replace(each, values=[seen(value) for value in each.values]) for each in panel.bars],
        marks=[mark for mark in panel.marks if is_seen(mark)],
    )
    if fault := _fault(found):
        raise ValueError(f"panel {panel.title!r}: {fault}")
    return found


def _fault(panel: Panel) -> str | None:
    """What is wrong with a panel, if anything."""
    places, heights = _places(panel), _heights(panel)
    for value in (*places, *heights, *(mark.value for mark in panel.marks)):
        if not isfinite(value):
            return f"{value} is not finite"
    if not heights:
        return "nothing to draw"
    for line in panel.lines:
        if any(after < before for (before, _), (after, _) in pairwise(line.points)):
            return f"the points of {line.name!r} are not in ascending order of x"
    most = len(panel.groups) - 1
    if any(len(each.values) != len(panel.groups) for each in panel.bars):
        return f"bars need a value for each of {len(panel.groups)} groups"
    if panel.groups and (panel.log_x or not all(0 <= x <= most for x in places)):
        return f"groups are at 0 to {most} on a linear axis, and so is what belongs to them"
    return None


def _places(panel: Panel) -> list[float]:
    """Of points and upright marks along x."""
    marks = [mark.value for mark in panel.marks if mark.upright]
    return [x for line in panel.lines for x, _ in line.points] + marks


def _heights(panel: Panel) -> list[float]:
    """Of points and bars along y."""
    lines = [y for line in panel.lines for _, y in line.points]
    bars = [value for each in panel.bars for value in each.values]
    return [y for y in (*lines, *bars) if y is not None]


def _x_axis(panel: Panel, width: float) -> Axis:
    if panel.groups:
        return Axis((-0.5, len(panel.groups) - 0.5), 0.0, width)
    return axis_for(_places(panel), 0.0, width, panel.log_x)


def _y_axis(panel: Panel, height: float) -> Axis:
    """A linear one begins at 0 unless something is below that."""
    values = [*_heights(panel), *(mark.value for mark in panel.marks if not mark.upright)]
    if not panel.log_y and (panel.bars or min(values) >= 0):
        values += [0.0] if any(values) else [0.0, 1.0]
    return axis_for(values, height, 0.0, panel.log_y)


def _beside(panel: Panel, x: Axis, y: Axis) -> tuple[list[str], float]:
    """The grid, labels of the axis upwards, and their room."""
    parts, wide = [], max(text_width(number(tick)) for tick in y.ticks)
    for tick in y.ticks:
        at = y.at(tick)
        parts += [
            f'<line class="grid" x1="0" x2="{x.end:g}" y1="{px(at)}" y2="{px(at)}"/>',
            text_at(-8, at + 4, number(tick), f'text-anchor="end" font-size="{SMALL}"'),
        ]
    label = wrapped(panel.y_label, y.start)
    for index, line in enumerate(label):
        at = (index - len(label)) * LEADING - wide + 2
        turned = f"translate({px(at)},{px(y.start / 2)}) rotate(-90)"
        parts.append(text_at(0, 0, line, f'text-anchor="middle" transform="{turned}"'))
    return parts, wide + len(label) * LEADING + _EDGE


def _under(panel: Panel, x: Axis, y: Axis) -> tuple[list[str], float]:
    """Labels of the axis along x, and their room."""
    parts, down = [], y.start + LEADING
    if panel.groups:
        step = x.end / len(panel.groups)
        words = [word for name in panel.groups for word in name.split()]
        every = ceil(min(max((text_width(word) for word in words), default=0) + 3, 51) / step)
        names = [wrapped(name, every * step - 3, SMALL) for name in panel.groups]
        labels = [(float(index), lines) for index, lines in enumerate(names) if index % every == 0]
    else:
        labels = [(tick, [number(tick)]) for tick in x.ticks]
        parts = [
            f'<line class="grid" x1="{at}" x2="{at}" y1="{y.start:g}" y2="{y.start + 4:g}"/>'
            for at in (px(x.at(tick)) for tick in x.ticks)
        ]
    for place, lines in labels:
        parts += texts_at(x.at(place), down, lines, f'text-anchor="middle" font-size="{SMALL}"')
    down += LEADING * max(len(lines) for _, lines in labels) + 6
    label = wrapped(panel.x_label, x.end)
    parts += texts_at(x.end / 2, down, label, 'text-anchor="middle"')
    return parts, down + LEADING * len(label) - y.start


def _over(panel: Panel, x: Axis) -> tuple[list[str], float]:
    """The title, labels of upright marks in rows beneath it, and their room."""
    parts: list[str] = []
    ends: list[float] = []  # of the rows, from the lowest one
    for mark in _upright(panel):
        label = cut(mark.label, x.end)
        half = text_width(label, NORMAL) / 2
        at = min(max(x.at(mark.value), half), x.end - half)
        row = next((row for row, end in enumerate(ends) if end + 8 <= at - half), len(ends))
        ends[row : row + 1] = [at + half]
        parts.append(text_at(at, -6 - row * LEADING, label, 'text-anchor="middle"'))
    title = wrapped(panel.title, x.end, TITLE)
    up = LEADING * len(ends) + 8
    parts += texts_at(0, LEADING - up - LEADING * len(title), title, f'font-size="{TITLE}"')
    return parts, up + LEADING * len(title) + _EDGE


def _upright(panel: Panel) -> list[Mark]:
    return sorted((mark for mark in panel.marks if mark.upright), key=lambda mark: mark.value)


def _bands(panel: Panel, x: Axis, y: Axis) -> list[str]:
    """Behind everything, groups that are marked."""
    if not panel.groups:
        return []
    lefts = [x.at(mark.value - 0.5) for mark in _upright(panel)]
    size = f'width="{px(x.end / len(panel.groups))}" height="{y.start:g}"'
    return [f'<rect class="band" x="{px(left)}" y="0" {size}/>' for left in lefts]


def _marks(panel: Panel, x: Axis, y: Axis) -> list[str]:
    """Upright lines; lines across, each with its label above its right end."""
    upright = [] if panel.groups else [px(x.at(mark.value)) for mark in _upright(panel)]
    across = sorted((y.at(mark.value), mark.label) for mark in panel.marks if not mark.upright)
    downs = _apart([at - 6 for at, _ in across], NORMAL, y.start - 6)
    lines = [
        *(f'x1="{at}" x2="{at}" y1="0" y2="{y.start:g}"' for at in upright),
        *(f'x1="0" x2="{x.end:g}" y1="{px(at)}" y2="{px(at)}"' for at, _ in across),
    ]
    return [
        *(f'<line class="mark" {line}/>' for line in lines),
        *(
            text_at(x.end, down, cut(label, x.end), 'class="halo" text-anchor="end"')
            for down, (_, label) in zip(downs, across, strict=True)
        ),
    ]


def _apart(wanted: Sequence[float], first: float, last: float) -> list[float]:
    """Baselines a line apart at least, from first to last, otherwise where they are wanted."""
    found: list[float] = []
    for at in wanted:
        found.append(max(at, found[-1] + LEADING if found else first))
    return [min(at, last - LEADING * after) for after, at in enumerate(reversed(found))][::-1]


def _bars(panel: Panel, x: Axis, y: Axis, styles: dict[str, int]) -> list[str]:
    """Groups of bars, each with its shape on its end, which shows a bar of 0 too."""
    parts = []
    base = y.start if panel.log_y else y.at(0.0)
    for index, each in enumerate(panel.bars):
        wide = 0.8 / len(panel.bars)
        ends = [
            (x.at(group - 0.4 + index * wide), y.at(value))
            for group, value in enumerate(each.values)
            if value is not None
        ]
        size = 0.9 * wide * x.end / len(panel.groups)
        style = styles[each.name]
        parts += [
            f'<g class="s{style}"><title>{plain(each.name)}</title>',
            *(
                f'<rect class="fill" x="{px(left)}" y="{px(min(end, base))}"'
                f' width="{px(size)}" height="{px(abs(end - base))}"/>'
                for left, end in ends
            ),
            shapes(
                style, [(left + size / 2, end + (8 if end > base else -8)) for left, end in ends]
            ),
            "</g>",
        ]
    return parts


def _lines(panel: Panel, x: Axis, y: Axis, styles: dict[str, int]) -> list[str]:
    """Lines, with the shapes at their points unless those are many."""
    parts = []
    for line in panel.lines:
        style = styles[line.name]
        points = [(x.at(at), y.at(value)) for at, value in line.points if value is not None]
        parts += [
            f'<g class="s{style}"><title>{plain(line.name)}</title>',
            path(_vertices(line, x, y), x.end),
            *([shapes(style, points)] if len(points) <= _MOST_SHAPES else []),
            "</g>",
        ]
    return parts


def _vertices(line: Line, x: Axis, y: Axis) -> list[Vertex]:
    """Of a line, corners of its steps among them; None: a gap."""
    found: list[Vertex] = []
    for place, value in line.points:
        at = x.at(place)
        if line.step and found:
            found.append((at, found[-1][1]))
        found.append((at, None if value is None else y.at(value)))
    return found
