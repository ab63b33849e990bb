"""What is wrong with a trace, by the Trace Event Format and by how Perfetto reads it.

The format is that of Chrome's document of this name: the JSON object, metadata, complete, instant,
counter, nestable asynchronous and flow events. Beyond it, what Perfetto's importer drops or takes
for something else without a word is a fault: slices of a thread that overlap, flows that meet no
slice, identifiers that it cannot read, and names of threads, which go by `tid` alone.
"""

import json
import math
import re
from bisect import bisect_right
from collections import defaultdict
from itertools import pairwise

PHASES = frozenset("BEXiICbneSTpFstfPNODMVvRc(),")
METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
LONGEST_ID = 2**64 - 1


def read(text):
    """The document of a file's text; NaN and infinity, which are no JSON, are a `ValueError`."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def faults(document):
    """One line for each fault, none for a trace that opens whole."""
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        return ["the document is no object with a list of traceEvents"]
    found = []
    if document.get("displayTimeUnit", "ms") not in ("ms", "ns"):
        found.append(f"displayTimeUnit is {document['displayTimeUnit']!r}")
    if not isinstance(document.get("otherData", {}), dict):
        found.append("otherData is no object")
    sound = []
    for number, event in enumerate(document["traceEvents"]):
        wrong = list(_event(event))
        found += [f"event {number}: {each}" for each in wrong]
        if not wrong:
            sound.append(event)
    for check in (_threads, _slices, _begins_and_ends, _asyncs, _flows):
        found += check(sound)
    return found


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**32


def _is_flow_id(value):
    """Perfetto reads a string as hexadecimal, and nothing that has more than 64 bits."""
    if isinstance(value, str):
        return re.fullmatch("(0x)?[0-9a-fA-F]{1,16}", value) is not None
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LONGEST_ID


def _event(event):
    """Of one event alone."""
    if not isinstance(event, dict):
        yield "is no object"
        return
    phase = event.get("ph")
    if phase not in PHASES:
        yield f"ph is {phase!r}"
        return
    if phase != "E" and not (isinstance(event.get("name"), str) and event["name"]):
        yield "has no name"
    if not _is_id(event.get("pid")):
        yield f"pid is {event.get('pid')!r}"
    if not _is_id(event.get("tid", 1)):
        yield f"tid is {event['tid']!r}"
    if not isinstance(event.get("args", {}), dict):
        yield "args is no object"
        return
    if phase == "M":
        yield from _metadata(event)
        return
    if not _is_number(event.get("ts")) or event["ts"] < 0:
        yield f"ts is {event.get('ts')!r}"
    if not isinstance(event.get("cat", ""), str):
        yield "cat is no text"
    yield from _own(phase, event)


def _own(phase, event):
    """What only some phases have."""
    if phase in "XBEstf" and "tid" not in event:
        yield "has no tid"
    if phase == "X" and not (_is_number(event.get("dur")) and event["dur"] >= 0):
        yield f"dur is {event.get('dur')!r}"
    if phase == "i" and event.get("s", "t") not in ("g", "p", "t"):
        yield f"s is {event['s']!r}"
    if phase == "C":
        args = event.get("args", {})
        if not args or not all(map(_is_number, args.values())):
            yield "a counter has numbers alone, one at least"
    if phase in "bne" and not (event.get("cat") and event.get("id", event.get("id2"))):
        yield "an asynchronous event has cat and id"
    if phase in "stf":
        if not event.get("cat") or not _is_flow_id(event.get("id")):
            yield "a flow has cat and an id of 64 bits"
        if event.get("bp", "e") != "e":
            yield f"bp is {event['bp']!r}"


def _metadata(event):
    if event["name"] not in METADATA:
        yield f"metadata {event['name']!r} means nothing"
        return
    field, kind = METADATA[event["name"]]
    if not isinstance(event.get("args", {}).get(field), kind):
        yield f"{event['name']} has no {field}"
    if event["name"].startswith("thread") and "tid" not in event:
        yield f"{event['name']} has no tid"


def _threads(events):
    """Every thread and process is named, once, and no two processes share a `tid`."""
    owners, named, processes = defaultdict(set), set(), set()
    for event in events:
        if "tid" in event:
            owners[event["tid"]].add(event["pid"])
        if event["ph"] == "M" and event["name"].endswith("_name"):
            known, key = (named, event.get("tid")) if "tid" in event else (processes, event["pid"])
            if key in known:
                yield f"{event['name']} of {key} is there twice"
            known.add(key)
    for tid, pids in owners.items():
        if len(pids) > 1:
            yield f"tid {tid} is of processes {sorted(pids)}"
        if tid not in named:
            yield f"tid {tid} has no name"
    for pid in sorted({event["pid"] for event in events} - processes):
        yield f"pid {pid} has no name"


def _by_thread(events):
    """Complete events of each thread as (begin, end, event), outer ones first."""
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            span = event["ts"], round(event["ts"] + event["dur"], 3)
            threads[event["pid"], event["tid"]].append((*span, event))
    for slices in threads.values():
        slices.sort(key=lambda each: (each[0], -each[1]))
    return threads


def _slices(events):
    """Those of one thread are apart or within each other."""
    for (pid, tid), slices in _by_thread(events).items():
        opened = []
        for begin, end, event in slices:
            while opened and opened[-1] <= begin:
                opened.pop()
            if opened and end > opened[-1]:
                yield f"{event['name']!r} at {begin} on {pid}/{tid} outlasts what it began in"
            else:
                opened.append(end)


def _begins_and_ends(events):
    opened = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] in "BE"), key=lambda e: e["ts"]):
        own = opened[event["pid"], event["tid"]]
        if event["ph"] == "B":
            own.append(event["name"])
        elif not own:
            yield f"an end at {event['ts']} of what never began"
        elif event.get("name", own[-1]) != own.pop():
            yield f"the end at {event['ts']} is of something else"
    for names in opened.values():
        for name in names:
            yield f"{name!r} never ends"


def _asyncs(events):
    opened = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] in "bne"), key=lambda e: e["ts"]):
        own = opened[event["cat"], str(event.get("id", event.get("id2")))]
        if event["ph"] == "b":
            own.append(event["name"])
        elif not own:
            yield f"asynchronous {event['name']!r} at {event['ts']} is outside of any"
        elif event["ph"] == "e" and event["name"] != own.pop():
            yield f"the end of {event['name']!r} at {event['ts']} is of something else"
    for names in opened.values():
        for name in names:
            yield f"asynchronous {name!r} never ends"


def _flows(events):
    """Each starts, steps and ends, forward in time, in slices of threads."""
    threads, flows = _by_thread(events), defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["cat"], event["name"], event["id"]].append(event)
    slices = _Slices(threads)
    for (_, name, flow_id), chain in flows.items():
        called = f"flow {name!r} {flow_id}"
        phases = "".join(event["ph"] for event in chain)
        if not re.fullmatch("st*f", phases):
            yield f"{called} goes {phases[:1]}...{phases[-1:]}, {len(phases)} events"
        if any(a["ts"] > b["ts"] for a, b in pairwise(chain)):
            yield f"{called} goes back in time"
        for event in chain:
            if not slices.is_bound(event):
                yield f"{called} meets no slice at {event['ts']} on {event['pid']}/{event['tid']}"


class _Slices:
    """Slices of threads, to be asked for one at a time."""

    def __init__(self, threads):
        self._spans = {}
        for thread, slices in threads.items():
            ends, furthest = [], -math.inf
            for _, end, _ in slices:
                furthest = max(furthest, end)
                ends.append(furthest)
            self._spans[thread] = [begin for begin, _, _ in slices], ends

    def is_bound(self, event):
        """A start, a step and an end with bp within a slice; an end without before the next one."""
        begins, furthest = self._spans.get((event["pid"], event["tid"]), ([], []))
        before = bisect_right(begins, event["ts"])
        if event["ph"] == "f" and "bp" not in event:
            return before < len(begins)
        return before > 0 and furthest[before - 1] >= event["ts"]
