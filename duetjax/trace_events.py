"""Launches and requests of a window of time, in the Trace Event Format that Perfetto opens.

Knows numbers and names alone, as the engine and the server tell them. The format is Chrome's
("Trace Event Format"); how Perfetto reads it is in its importer: names of threads go by `tid`
alone, so no two processes share one, and flows join slices of threads alone.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import batched, chain
from typing import Any

import orjson

from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.launch import Lane

type Event = dict[str, Any]

_LAUNCHES, _REQUESTS = 1, 2
"""Process ids."""
_LANES = {
    Lane.WHOLE: (11, "whole device"),
    Lane.PREFILL: (12, "prefill lane"),
    Lane.DECODE: (13, "decode lane"),
}
_FIRST_REQUEST = 101
"""Thread ids: of the lanes, and from there on of requests."""
_EVENTS_A_PIECE = 500


@dataclass(frozen=True, slots=True)
class RequestLife:
    """A request as its server saw it; seconds of the engine's clock, None: not yet.

    generated: tokens that it has taken. finish: why it ended.
    """

    id: str
    arrived: float
    first_token: float | None
    ended: float | None
    prompt_tokens: int
    cached_tokens: int
    generated: int
    finish: str | None


@dataclass(frozen=True, slots=True)
class Window:
    """All that is told of a time. begin, end: seconds of the engine's clock; wall: the begin since
    the epoch.

    launches: those that completed within it, in order. lives: of requests that were live in it.
    dropped: what there was no room for, by its name.
    """

    model: str
    begin: float
    end: float
    wall: float
    launches: Sequence[CompletedLaunch]
    lives: Sequence[RequestLife]
    dropped: Mapping[str, int]


def pieces(window: Window) -> Iterator[bytes]:
    """The JSON document, a few hundred events at a time: nobody need hold all of it."""
    facts = {
        "model": window.model,
        "begin_unix_s": round(window.wall, 6),
        "clock": "the engine's, monotonic; 0 is the window's begin",
        "seconds": round(window.end - window.begin, 6),
        "launches": len(window.launches),
        "requests": len(window.lives),
        **{f"dropped_{name}": count for name, count in window.dropped.items()},
    }
    yield b'{"displayTimeUnit":"ms","otherData":%b,"traceEvents":[\n' % orjson.dumps(facts)
    separator = b""
    for some in batched(events(window), _EVENTS_A_PIECE):
        yield separator + b",\n".join(map(orjson.dumps, some))
        separator = b",\n"
    yield b"\n]}\n"


def events(window: Window) -> Iterator[Event]:
    """Slices come before what happens in them at the same time: readers sort by time alone."""
    clock = _Clock(window)
    links = _links(window.launches, clock)
    return chain(
        _process(_LAUNCHES, "launches"),
        *(_thread(_LAUNCHES, *told) for told in _LANES.values()),
        (_launch(launch, clock) for launch in window.launches),
        _counters(window.launches, clock),
        _process(_REQUESTS, "requests"),
        _requests(window.lives, links, clock),
    )


class _Clock:
    """Seconds of the engine's clock as microseconds of the window, cut to it."""

    def __init__(self, window: Window) -> None:
        self._begin = window.begin
        self.end = round(1e6 * (window.end - window.begin), 3)

    def at(self, seconds: float) -> float:
        """To the nanosecond."""
        return min(max(round(1e6 * (seconds - self._begin), 3), 0.0), self.end)


@dataclass(frozen=True, slots=True)
class _Link:
    """A launch that computed something for a request: a chunk of its prompt, or tokens."""

    tid: int
    ts: float
    is_chunk: bool


def _launch(launch: CompletedLaunch, clock: _Clock) -> Event:
    mixed = launch.prompt_chunks and launch.decode_rows
    split = launch.split
    return _slice(
        "mixed" if mixed else launch.program.value,
        "launch",
        (_LAUNCHES, _LANES[launch.lane][0]),
        (clock.at(launch.began), clock.at(launch.ended)),
        {
            "ticket": launch.ticket,
            "program": launch.program.value,
            "bucket": launch.bucket,
            "split": split and {"decode": split.decode, "prefill": split.prefill},
            "k": launch.k,
            "rows": launch.decode_rows,
            "prompt_chunks": launch.prompt_chunks,
            "prompt_tokens": launch.prompt_tokens,
            "predicted_ms": launch.predicted_ms,
            "measured_ms": launch.measured_ms,
            "outcome": str(launch.why),
            "generated": launch.generated,
            "step_ends_ms": [round(1e3 * (at - launch.began), 6) for at in launch.step_ends],
        },
    )


def _links(launches: Sequence[CompletedLaunch], clock: _Clock) -> dict[str, list[_Link]]:
    """By request, in order of time."""
    found: dict[str, list[_Link]] = defaultdict(list)
    for launch in launches:
        where = _LANES[launch.lane][0], clock.at(launch.began)
        rows, chunks = _Link(*where, is_chunk=False), _Link(*where, is_chunk=True)
        for row, request_id in enumerate(launch.ids):
            found[request_id].append(rows if row < launch.decode_rows else chunks)
    for links in found.values():
        links.sort(key=lambda link: link.ts)
    return found


def _counters(launches: Sequence[CompletedLaunch], clock: _Clock) -> Iterator[Event]:
    """What launches found, wherever it is another than before."""
    last: dict[str, Mapping[str, int]] = {}
    for launch in launches:
        split = launch.split
        cores = (split.decode, split.prefill) if split else (0, 0)
        told = (
            ("split", launch.began, dict(zip(("decode", "prefill"), cores, strict=True))),
            ("requests", launch.ended, {"running": launch.running, "waiting": launch.waiting}),
            ("pages", launch.ended, {"free": launch.pages_free}),
        )
        for name, at, values in told:
            if last.get(name) != values:
                last[name] = values
                yield {
                    "ph": "C",
                    "name": name,
                    "pid": _LAUNCHES,
                    "tid": _LANES[Lane.WHOLE][0],
                    "ts": clock.at(at),
                    "args": values,
                }


def _requests(
    lives: Sequence[RequestLife], links: Mapping[str, Sequence[_Link]], clock: _Clock
) -> Iterator[Event]:
    """Each on the first thread that is free, with its phases and its flow through launches."""
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    count = 0
    for flow, life in enumerate(sorted(lives, key=lambda life: (life.arrived, life.id)), start=1):
        begin, end = clock.at(life.arrived), clock.end
        if life.ended is not None:
            end = max(begin, clock.at(life.ended))
        while taken and taken[0][0] <= begin:
            heappush(free, heappop(taken)[1])
        if not free:
            yield from _thread(_REQUESTS, _FIRST_REQUEST + count, f"requests {count + 1}")
            heappush(free, _FIRST_REQUEST + count)
            count += 1
        tid = heappop(free)
        heappush(taken, (end, tid))
        own = links.get(life.id, ())
        yield from _phases(life, own, flow, (_REQUESTS, tid), (begin, end), clock)
        yield from _flow(flow, own, (_REQUESTS, tid), (begin, end))


def _phases(
    life: RequestLife,
    links: Sequence[_Link],
    flow: int,
    track: tuple[int, int],
    span: tuple[float, float],
    clock: _Clock,
) -> Iterator[Event]:
    """A request's slice, and within it queue, prefill and decode as far as the window saw them."""
    begin, end = span
    ttft = None if life.first_token is None else 1e3 * (life.first_token - life.arrived)
    facts = {
        "prompt_tokens": life.prompt_tokens,
        "cached_tokens": life.cached_tokens,
        "generated": life.generated,
        "ttft_ms": ttft,
        "finish": life.finish,
        "flow": flow,
    }
    yield _slice(life.id, "request", track, span, facts)
    first = end if life.first_token is None else min(max(begin, clock.at(life.first_token)), end)
    chunk = next((link.ts for link in links if link.is_chunk), first)
    computed = min(max(begin, chunk), first)
    for name, phase in (
        ("queue", (begin, computed)),
        ("prefill", (computed, first)),
        ("decode", (first, end)),
    ):
        if phase[0] < phase[1]:
            yield _slice(name, "phase", track, phase, {})


def _flow(
    flow: int, links: Sequence[_Link], track: tuple[int, int], span: tuple[float, float]
) -> Iterator[Event]:
    """From a request through the launches that computed it, to the last one of them."""
    if not links:
        return
    same = {"name": "computes", "cat": "flow", "id": flow}
    first = min(max(span[0], links[0].ts), span[1])
    if first > links[0].ts:  # a launch that was planned before the request came
        return
    yield {"ph": "s", **same, "pid": track[0], "tid": track[1], "ts": first}
    for link in links:
        is_last = link is links[-1]
        at = {"pid": _LAUNCHES, "tid": link.tid, "ts": link.ts}
        chunk = {"args": {"chunk": True}} if link.is_chunk else {}
        ends = {"bp": "e"} if is_last else {}
        yield {"ph": "f" if is_last else "t", **same, **at, **chunk, **ends}


def _slice(
    name: str,
    category: str,
    track: tuple[int, int],
    span: tuple[float, float],
    args: Mapping[str, Any],
) -> Event:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": track[0],
        "tid": track[1],
        "ts": span[0],
        "dur": round(span[1] - span[0], 3),
        "args": args,
    }


def _process(pid: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}


def _thread(pid: int, tid: int, name: str) -> Iterator[Event]:
    where = {"pid": pid, "tid": tid}
    yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": tid}}
