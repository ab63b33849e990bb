"""`duetjax trace-plot`: a trace as a picture of lanes, splits and requests over time, as SVG.

The standard library alone, in the style of charts. It reads what `duetjax serve` writes; of other
programs' traces it knows nothing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from duetjax.chart_axis import Axis, axis_for, number
from duetjax.chart_svg import (
    LARGE,
    LEADING,
    NORMAL,
    SMALL,
    cut,
    plain,
    px,
    shapes,
    style_sheet,
    text_at,
    text_width,
    wrapped,
)
from duetjax.config import ConfigError

_LANES = {"decode lane": 0, "prefill lane": 1, "whole device": 2}
"""Styles by names of threads."""
_QUEUE = 3
_LEGEND = ("decode", "prefill", "whole device", "queue")
_EDGE, _GAP, _KEY = 16, 24, 22
_LEFT, _WIDTH = 120, 860
"""Room for names, and the time beside them."""
_ROW, _BAR, _SPLITS = 24, 16, 56
_MOST_REQUESTS = 16
_FINE = 0.5
"""Pixels: finer bars and ticks are drawn as one."""
_STYLE = """.faint { opacity: 0.35 }
.tick { stroke: currentColor; stroke-width: 1; stroke-dasharray: none }
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """Times are seconds of the trace. lane: its thread's name. steps: when they ended."""

    lane: str
    begin: float
    end: float
    args: Mapping[str, Any]
    steps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """phases: (name, begin, end). tokens: when they came; not all, if rows were left out."""

    begin: float
    end: float
    args: Mapping[str, Any]
    phases: tuple[tuple[str, float, float], ...] = ()
    tokens: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a picture shows of a trace. begin, end: of the part that is shown."""

    model: str
    begin: float
    end: float
    launches: tuple[Launch, ...]
    requests: tuple[Request, ...]


def read(file: Path, start: float = 0.0, seconds: float | None = None) -> Timeline:
    """A part of a file's trace, from a second on; `ConfigError` where there is nothing to draw."""
    if not (0 <= start < inf and (seconds is None or 0 < seconds < inf)):
        raise ConfigError("--start and --duration: give seconds from 0 on, and above 0")
    try:
        whole = _timeline(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name a trace") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        hint = "give what duetjax serve --trace or /debug/trace has written"
        raise ConfigError(f"{file} is no trace of duetjax: {error!r}; {hint}") from error
    end = whole.end if seconds is None else min(start + seconds, whole.end)
    launches = tuple([each for each in whole.launches if each.end > start and each.begin < end])
    requests = tuple([each for each in whole.requests if each.end > start and each.begin < end])
    if not launches or end <= start:
        raise ConfigError(f"{file}: no launch from {start:g} s to {end:g} s; draw another part")
    return Timeline(whole.model, start, end, launches, requests)


def _timeline(document: Mapping[str, Any]) -> Timeline:
    events = document["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    launches, requests = {}, {}
    latest: dict[int, int] = {}  # flows of requests by thread: their phases follow them
    for event in events:
        if event["ph"] != "X":
            continue
        begin, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        tid, args = event["tid"], event["args"]
        if event["cat"] == "launch":
            began = end - args["measured_ms"] / 1e3
            steps = tuple([began + step / 1e3 for step in args["step_ends_ms"]])
            launches[tid, event["ts"]] = Launch(names[tid], begin, end, args, steps)
        elif event["cat"] == "request":
            latest[tid] = args["flow"]
            requests[args["flow"]] = Request(begin, end, args)
        else:
            request = requests[latest[tid]]
            phases = (*request.phases, (event["name"], begin, end))
            requests[latest[tid]] = replace(request, phases=phases)
    for flow, tokens in _tokens(events, launches).items():
        requests[flow] = replace(requests[flow], tokens=tokens)
    facts = document["otherData"]
    return Timeline(
        facts["model"], 0.0, facts["seconds"], tuple(launches.values()), tuple(requests.values())
    )


def _tokens(
    events: Sequence[Mapping[str, Any]], launches: Mapping[tuple[int, float], Launch]
) -> dict[int, tuple[float, ...]]:
    """When each request's came, by its flow: with steps, and with the last chunk of its prompt."""
    links: dict[int, list[tuple[Launch, bool]]] = {}
    for event in events:
        if event["ph"] in ("t", "f"):
            is_chunk = event.get("args", {}).get("chunk", False)
            launch = launches[event["tid"], event["ts"]]
            links.setdefault(event["id"], []).append((launch, is_chunk))
    found = {}
    for flow, own in links.items():
        tokens: list[float] = []
        for (launch, is_chunk), (_, is_next_chunk) in pairwise([*own, (own[-1][0], True)]):
            if not is_chunk:
                tokens += launch.steps
            elif not is_next_chunk:
                tokens.append(launch.end)
        found[flow] = tuple(tokens)
    return found


def draw(told: Timeline) -> str:
    """The text of the picture; the same for the same timeline."""
    unit, name = (1e3, "ms") if told.end - told.begin < 1 else (1.0, "s")
    time = axis_for([told.begin * unit, told.end * unit], 0.0, float(_WIDTH), log=False)
    sheet = _Sheet(time, unit, told)
    parts, y = _head(told)
    for title, part, height in sheet.parts():
        parts += [
            text_at(_EDGE, y + 4, title, f'font-size="{NORMAL}"'),
            f'<g class="panel" transform="translate({_LEFT},{px(y + 14)})">',
            *sheet.grid(height),
            *part,
            "</g>",
        ]
        y += height + 14 + _GAP
    for tick in time.ticks:
        where = f'text-anchor="middle" font-size="{SMALL}"'
        parts.append(text_at(_LEFT + time.at(tick), y - 6, number(tick), where))
    parts.append(text_at(_LEFT + _WIDTH / 2, y + 14, f"time [{name}]", 'text-anchor="middle"'))
    size = f"{_LEFT + _WIDTH + _GAP + _EDGE} {px(y + 26)}"
    start = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img"'
        f' font-family="sans-serif" font-size="{NORMAL}">',
        f"<title>{plain(_title(told))}</title>",
        f"<style>{style_sheet(len(_LEGEND))}{_STYLE}</style>",
        '<rect class="back" width="100%" height="100%"/>',
    ]
    return "\n".join([*start, *parts, "</svg>\n"])


def _title(told: Timeline) -> str:
    return (
        f"{told.model}: {len(told.launches)} launches and {len(told.requests)} requests"
        f" in {told.end - told.begin:.3g} s"
    )


def _head(told: Timeline) -> tuple[list[str], float]:
    """Title and legend, and where what follows begins."""
    parts, y = [], 10.0
    for line in wrapped(_title(told), _LEFT + _WIDTH, LARGE):
        y += LARGE + 5
        parts.append(text_at(_EDGE, y, line, f'font-size="{LARGE}"'))
    x, y = float(_EDGE), y + LEADING + 6
    for style, name in enumerate(_LEGEND):
        parts += [
            f'<g class="s{style}">{shapes(style, [(x + 6, y - 4)])}</g>',
            text_at(x + _KEY, y, name),
        ]
        x += _KEY + text_width(name, NORMAL) + _GAP
    parts.append(text_at(x, y, "upright ticks: tokens of a request"))
    return parts, y + _GAP


class _Sheet:
    """The parts of a picture, each from its upper left corner."""

    def __init__(self, time: Axis, unit: float, told: Timeline) -> None:
        self._time = time
        self._unit = unit
        self._told = told

    def parts(self) -> Iterator[tuple[str, list[str], float]]:
        """Title, what draws it, height."""
        told = self._told
        lanes = [lane for lane in _LANES if any(each.lane == lane for each in told.launches)]
        yield "Launches", list(self._lanes(lanes)), _ROW * len(lanes)
        cores = max((sum(each.args["split"].values()) for each in self._split()), default=0)
        if cores:
            title = f"Cores (SMs) of {cores}: prefill above, decode below"
            yield title, list(self._splits(cores)), _SPLITS
        shown = self._shown()
        if shown:
            left = len(told.requests) - len(shown)
            most = f", the {len(shown)} that take most of the time" if left else ""
            title = f"Requests{most}: tokens of the prompt → generated"
            yield title, list(self._requests(shown)), _ROW * len(shown)

    def grid(self, height: float) -> list[str]:
        """Upright lines."""
        places = [px(self._time.at(tick)) for tick in self._time.ticks]
        return [f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{px(height)}"/>' for x in places]

    def _at(self, seconds: float) -> float:
        shown = min(max(seconds, self._told.begin), self._told.end)
        return self._time.at(shown * self._unit)

    def _split(self) -> list[Launch]:
        return [each for each in self._told.launches if each.args["split"] is not None]

    def _shown(self) -> list[Request]:
        """In the order in which they came."""
        told = self._told

        def shown_for(each: Request) -> float:
            return min(each.end, told.end) - max(each.begin, told.begin)

        longest = sorted(told.requests, key=shown_for, reverse=True)[:_MOST_REQUESTS]
        return sorted(longest, key=lambda each: each.begin)

    def _lanes(self, lanes: Sequence[str]) -> Iterator[str]:
        for row, lane in enumerate(lanes):
            y = row * _ROW + (_ROW - _BAR) / 2
            yield self._name(lane, y)
            yield f'<g class="s{_LANES[lane]}">'
            launches = [each for each in self._told.launches if each.lane == lane]
            spans = [(self._at(each.begin), self._at(each.end), _said(each)) for each in launches]
            yield from _bars(spans, y, _BAR)
            yield "</g>"

    def _splits(self, cores: int) -> Iterator[str]:
        """Decode's share of the height below, prefill's above; between episodes nothing."""
        yield self._name(f"{cores}", -4)
        yield self._name("0", _SPLITS - _BAR + 4)
        for name, style in (("decode", 0), ("prefill", 1)):
            yield f'<g class="s{style}">'
            for share, launches in _by_split(self._split(), name).items():
                high = _SPLITS * share / cores
                spans = [(self._at(each.begin), self._at(each.end), "") for each in launches]
                y = _SPLITS - high if style == 0 else 0.0
                yield from _bars(_union(spans, f"{name}: {share}"), y, high)
            yield "</g>"

    def _requests(self, shown: Sequence[Request]) -> Iterator[str]:
        for row, request in enumerate(shown):
            y, args = row * _ROW + (_ROW - _BAR) / 2, request.args
            yield self._name(f"{args['prompt_tokens']:,} → {args['generated']:,}", y)
            for name, begin, end in request.phases:
                if end <= self._told.begin or begin >= self._told.end:
                    continue
                style = {"queue": _QUEUE, "prefill": 1, "decode": 0}[name]
                high = _BAR if name == "prefill" else _BAR / 3
                span = self._at(begin), self._at(end), f"{name}: {1e3 * (end - begin):.4g} ms"
                yield f'<g class="s{style} faint">'
                yield from _bars([span], y + (_BAR - high) / 2, high)
                yield "</g>"
            told = self._told
            ticks = [self._at(at) for at in request.tokens if told.begin <= at <= told.end]
            marks = "".join(f"M{px(x)},{px(y)}v{_BAR}" for x in _apart(ticks))
            yield f'<g class="s0"><path class="tick" d="{marks}"/></g>' if marks else ""

    def _name(self, name: str, y: float) -> str:
        where = f'text-anchor="end" font-size="{SMALL}"'
        return text_at(-8, y + _BAR - 4, cut(name, _LEFT - _EDGE), where)


def _said(launch: Launch) -> str:
    args = launch.args
    split = args["split"]
    where = launch.lane if split is None else f"{launch.lane} {split['decode']}/{split['prefill']}"
    foretold = args["predicted_ms"]
    predicted = "" if foretold is None else f", predicted {foretold:.4g} ms"
    return (
        f"{args['ticket']}: {args['program']}, {where}, {args['outcome']}, k {args['k']},"
        f" {args['rows']} rows, {args['prompt_tokens']} prompt tokens,"
        f" {args['measured_ms']:.4g} ms{predicted}"
    )


type Span = tuple[float, float, str]
"""Along x from, to, and what to say of it."""


def _by_split(launches: Iterable[Launch], side: str) -> dict[int, list[Launch]]:
    found: dict[int, list[Launch]] = {}
    for launch in launches:
        found.setdefault(launch.args["split"][side], []).append(launch)
    return found


def _union(spans: Iterable[Span], said: str) -> list[Span]:
    """What spans cover together, gaps that nobody sees included."""
    found: list[Span] = []
    for begin, end, _ in sorted(spans):
        if found and begin <= found[-1][1] + _FINE:
            found[-1] = found[-1][0], max(found[-1][1], end), said
        else:
            found.append((begin, end, said))
    return found


def _bars(spans: Iterable[Span], y: float, high: float) -> Iterator[str]:
    """Bars apart from each other; runs of those too fine to be seen as one."""
    run: list[Span] = []
    for span in sorted(spans):
        if run and not (span[1] - run[0][0] < 2 * _FINE or span[0] == span[1]):
            yield _bar(run, y, high)
            run = []
        run.append(span)
    if run:
        yield _bar(run, y, high)


def _bar(run: Sequence[Span], y: float, high: float) -> str:
    begin, end = run[0][0], max(end for _, end, _ in run)
    said = run[0][2] if len(run) == 1 else f"{len(run)} launches"
    size = f'width="{px(max(end - begin - 0.3, 0.4))}" height="{px(high)}"'
    return (
        f'<rect class="fill" x="{px(begin)}" y="{px(y)}" {size}><title>{plain(said)}</title></rect>'
    )


def _apart(places: Iterable[float]) -> Iterator[float]:
    """Without those that would be drawn over the one before."""
    last = -inf
    for place in sorted(places):
        if place - last >= _FINE:
            last = place
            yield place
