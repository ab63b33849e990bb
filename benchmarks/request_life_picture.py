"""One request's life as a picture: its stages, the launches, and everybody's tokens, as SVG."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from duetjax.chart_axis import Axis, axis_for, number
from duetjax.chart_svg import (
    LARGE,
    NORMAL,
    SMALL,
    plain,
    px,
    style_sheet,
    text_at,
    text_width,
)
from duetjax.timeline import Launch, Request

LANES = {"decode lane": 0, "prefill lane": 1, "whole device": 2}
"""Styles by names of threads."""
EDGE, LEFT, WIDTH, ROW, BAR = 16, 136, 860, 22, 14
BOX, LEADERS, GAP = 66, 46, 10
"""Heights of a stage's box, and of the lines from it to when it was; between groups of rows."""
STYLE = """.box { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-dasharray: none }
.tick { fill: none; stroke: currentColor; stroke-dasharray: none } .faint { opacity: 0.5 }
"""


@dataclass(frozen=True)
class Stage:
    """A part of the life. begin, end: seconds of the trace. where: who does it."""

    name: str
    where: str
    begin: float
    end: float


@dataclass(frozen=True)
class Life:
    """One request and the others. Times are seconds of the trace; sent, seen, ended: by a client.

    launches: those around it, its chunks among them, as no other prompt is being computed then.
    """

    sent: float
    seen: float
    ended: float
    stages: tuple[Stage, ...]
    launches: tuple[Launch, ...]
    chunks: tuple[Launch, ...]
    own: Request
    others: tuple[Request, ...]


type Row = list[str]
"""What draws it, from its upper end."""


def draw(life: Life, where: str) -> str:
    """The text of the picture. where: on what it ran."""
    took, around = 1e3 * (life.ended - life.sent), 50 * (life.ended - life.sent)
    axis = axis_for([-around, took + around], float(LEFT), float(LEFT + WIDTH), log=False)
    sheet = _Sheet(axis, life)
    title = f"The life of a request: {life.own.args['prompt_tokens']:,} tokens of prompt"
    worst = 1e3 * max(gap for each in life.others for gap in _gaps(each, life.sent, life.seen))
    parts = [
        text_at(EDGE, 26, title, f'font-size="{LARGE}"'),
        text_at(EDGE, 46, f"{where}; {len(life.others)} others, gaps up to {worst:.0f} ms"),
        *sheet.stages(62),
    ]
    top = y = 62 + BOX + LEADERS
    for group in (sheet.lanes(), sheet.own(), sheet.others()):
        for row in group:
            parts += [f'<g transform="translate(0,{y})">', *row, "</g>"]
            y += ROW
        y += GAP
    size = f"{LEFT + WIDTH + 2 * EDGE} {y + 40}"
    start = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img"'
        f' font-family="sans-serif" font-size="{NORMAL}">',
        f"<title>{plain(title)}</title>",
        f"<style>{style_sheet(len(LANES))}{STYLE}</style>",
        '<rect class="back" width="100%" height="100%"/>',
        *sheet.grid(top, y),
    ]
    return "\n".join([*start, *parts, "</svg>\n"])


def _gaps(request: Request, low: float, high: float) -> list[float]:
    """Seconds between its tokens that came between two times."""
    return [after - at for at, after in pairwise(request.tokens) if low <= at and after <= high]


class _Sheet:
    """The parts of the picture over one axis: ms since the client sent its request."""

    def __init__(self, axis: Axis, life: Life) -> None:
        self._axis = axis
        self._life = life
        self._low, self._high = (life.sent + tick / 1e3 for tick in (axis.ticks[0], axis.ticks[-1]))

    def _at(self, seconds: float) -> float:
        shown = min(max(seconds, self._low), self._high)
        return self._axis.at(1e3 * (shown - self._life.sent))

    def grid(self, top: float, bottom: float) -> Iterator[str]:
        """Upright lines, their labels, and what the axis is."""
        where = 'text-anchor="middle"'
        for tick in self._axis.ticks:
            x = self._axis.at(tick)
            ends = f'x1="{px(x)}" x2="{px(x)}" y1="{px(top)}" y2="{px(bottom)}"'
            yield f'<line class="grid" {ends}/>'
            yield text_at(x, bottom + 14, number(tick), f'{where} font-size="{SMALL}"')
        yield text_at(LEFT + WIDTH / 2, bottom + 32, "ms since the client sent it", where)

    def stages(self, y: float) -> Iterator[str]:
        """A box for each, as wide as the others however short it was, and lines to when it was."""
        count = len(self._life.stages)
        wide = (LEFT + WIDTH - EDGE - GAP * (count - 1)) / count
        for index, stage in enumerate(self._life.stages):
            left = EDGE + index * (wide + GAP)
            size = f'width="{px(wide)}" height="{BOX}" rx="4"'
            yield f'<g class="s0"><rect class="box" x="{px(left)}" y="{px(y)}" {size}/></g>'
            took = f"{1e3 * (stage.end - stage.begin):,.1f} ms"
            yield text_at(left + 10, y + 19, f"{index + 1}. {stage.name}")
            yield text_at(left + 10, y + 40, took, f'font-size="{LARGE}"')
            yield text_at(left + 10, y + 58, stage.where, f'font-size="{SMALL}"')
            for corner, at in ((left, stage.begin), (left + wide, stage.end)):
                end = f"L{px(self._at(at))},{px(y + BOX + LEADERS - 4)}"
                line = f"M{px(corner)},{px(y + BOX)}{end}"
                yield f'<g class="s0 faint"><path class="tick" d="{line}"/></g>'

    def lanes(self) -> Iterator[Row]:
        """Launches; those that computed the prompt stand out."""
        for lane, style in LANES.items():
            own = [each for each in self._life.launches if each.lane == lane]
            own = [each for each in own if self._low < each.end and each.begin < self._high]
            if own:
                side = lane.split()[0]
                shares = {each.args["split"][side] for each in own if each.args["split"]}
                name = f"{lane}, {max(shares)} SMs" if len(shares) == 1 else lane
                yield [_name(name), *(self._bar(each, style) for each in own)]

    def _bar(self, launch: Launch, style: int) -> str:
        left, right = self._at(launch.begin), self._at(launch.end)
        faint = "" if launch in self._life.chunks else " faint"
        args = launch.args
        said = f"{args['program']}, k {args['k']}, {args['measured_ms']:.4g} ms"
        size = f'width="{px(max(right - left - 0.6, 0.4))}" height="{BAR}"'
        bar = f'<rect class="fill" x="{px(left)}" y="4" {size}><title>{plain(said)}</title></rect>'
        return f'<g class="s{style}{faint}">{bar}</g>'

    def own(self) -> Iterator[Row]:
        """Of its prompt how many tokens each launch computed; its answer; what its client saw."""
        yield [_name("its prompt"), *map(self._chunk, self._life.chunks)]
        yield [_name("its answer"), _ticks([self._at(at) for at in self._life.own.tokens])]
        yield [_name("its client"), *self._seen()]

    def _chunk(self, launch: Launch) -> str:
        left, right = self._at(launch.begin), self._at(launch.end)
        tokens = f"{launch.args['prompt_tokens']:,}"
        where = f'text-anchor="middle" font-size="{SMALL}"'
        fits = text_width(tokens) < right - left
        return text_at((left + right) / 2, 15, tokens, where) if fits else ""

    def _seen(self) -> Iterator[str]:
        life = self._life
        marks = (life.sent, "sent", "end"), (life.seen, "first token", "end")
        for at, said, anchor in (*marks, (life.ended, "end", "start")):
            x = self._at(at)
            yield f'<line class="mark" x1="{px(x)}" x2="{px(x)}" y1="2" y2="{ROW - 2}"/>'
            where = f'text-anchor="{anchor}" font-size="{SMALL}"'
            yield text_at(x + (6 if anchor == "start" else -6), 15, said, where)

    def others(self) -> Iterator[Row]:
        """A row for each of the other answers."""
        for index, each in enumerate(self._life.others, start=1):
            shown = [self._at(at) for at in each.tokens if self._low <= at <= self._high]
            yield [_name(f"stream {index}"), _ticks(shown, " faint")]


def _ticks(places: Sequence[float], faint: str = "") -> str:
    marks = "".join(f"M{px(x)},4v{BAR}" for x in places)
    return f'<g class="s0{faint}"><path class="tick" d="{marks}"/></g>'


def _name(name: str) -> str:
    return text_at(LEFT - 10, 15, name, f'text-anchor="end" font-size="{SMALL}"')
