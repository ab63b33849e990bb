"""Launches and requests as a trace: what stands in it, and that it opens whole."""

import copy
import random

import pytest
from perfetto_format import faults, read

from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.launch import Lane, Program, Split
from duetjax.trace_events import RequestLife, Window, pieces

SPLIT = Split(decode=40, prefill=92)


def launch(ticket, lane, began, ended, ids, chunks=(), k=1, **changes):
    """A launch of decoding rows `ids` and of one chunk of 32 tokens for each of `chunks`."""
    facts = {
        "ticket": ticket,
        "lane": lane,
        "split": None if lane is Lane.WHOLE else SPLIT,
        "program": Program.PREFILL if chunks else Program.DECODE,
        "bucket": 64,
        "k": k,
        "decode_rows": len(ids),
        "prompt_chunks": len(chunks),
        "prompt_tokens": 32 * len(chunks),
        "why": "split",
        "predicted_ms": 9.0,
        "measured_ms": 1e3 * (ended - began),
        "began": began,
        "ended": ended,
        "running": 2,
        "waiting": 1,
        "pages_free": 7,
        "ids": (*ids, *chunks),
        "generated": k * len(ids),
        "step_ends": tuple(began + (ended - began) * (step + 1) / k for step in range(k)),
    }
    return CompletedLaunch(**facts | changes)


def life(name, arrived, first=None, ended=None, generated=0):
    finish = None if ended is None else "stop"
    return RequestLife(name, arrived, first, ended, 64, 16, generated, finish)


LAUNCHES = (
    launch(4, Lane.WHOLE, 99.5, 100.5, ["old"]),
    launch(5, Lane.PREFILL, 101.0, 104.0, [], ["new"], predicted_ms=None),
    launch(6, Lane.DECODE, 101.0, 102.0, ["old"], k=4),
    launch(7, Lane.WHOLE, 104.0, 105.0, ["new"], ["late"]),
)
LIVES = (
    life("old", 90.0, first=95.0, ended=102.25, generated=9),
    life("new", 100.25, first=104.0, ended=105.0, generated=2),
    life("late", 103.0, first=105.5, generated=1),
    life("waiting", 105.0),
)
NONE_DROPPED = {"launches": 0, "rows": 0, "requests": 0}


def window(launches=LAUNCHES, lives=LIVES, begin=100.0, end=106.0, dropped=NONE_DROPPED):
    return Window("demo", begin, end, 1e9, launches, lives, dropped)


def document(window):
    return read(b"".join(pieces(window)).decode())


def of_phase(told, phase, category=None):
    found = [event for event in told["traceEvents"] if event["ph"] == phase]
    return [event for event in found if category in (None, event.get("cat"))]


def spans(events):
    return [(each["name"], each["tid"], each["ts"], each["dur"]) for each in events]


@pytest.fixture(scope="module")
def told():
    return document(window())


# What stands in it.


def test_launches_are_slices_of_their_lanes_cut_to_the_window(told):
    assert spans(of_phase(told, "X", "launch")) == [
        ("decode", 11, 0.0, 5e5),
        ("prefill", 12, 1e6, 3e6),
        ("decode", 13, 1e6, 1e6),
        ("mixed", 11, 4e6, 1e6),
    ]
    names = {
        each["tid"]: each["args"]["name"]
        for each in of_phase(told, "M")
        if each["name"] == "thread_name"
    }
    assert (names[11], names[12]) == ("whole device", "prefill lane")
    assert (names[101], names[102]) == ("requests 1", "requests 2")


def test_a_launch_says_what_it_was_foretold_and_what_it_took(told):
    _, prefill, decode, _ = [each["args"] for each in of_phase(told, "X", "launch")]
    assert decode == {
        "ticket": 6,
        "program": "decode",
        "bucket": 64,
        "split": {"decode": 40, "prefill": 92},
        "k": 4,
        "rows": 1,
        "prompt_chunks": 0,
        "prompt_tokens": 0,
        "predicted_ms": 9.0,
        "measured_ms": 1000.0,
        "outcome": "split",
        "generated": 4,
        "step_ends_ms": [250.0, 500.0, 750.0, 1000.0],
    }
    assert (prefill["predicted_ms"], prefill["prompt_tokens"]) == (None, 32)


def test_a_request_is_a_slice_with_its_phases_within(told):
    assert spans(of_phase(told, "X", "request")) == [
        ("old", 101, 0.0, 2.25e6),
        ("new", 102, 0.25e6, 4.75e6),
        ("late", 101, 3e6, 3e6),
        ("waiting", 102, 5e6, 1e6),
    ]
    assert spans(of_phase(told, "X", "phase")) == [
        ("decode", 101, 0.0, 2.25e6),
        ("queue", 102, 0.25e6, 0.75e6),
        ("prefill", 102, 1e6, 3e6),
        ("decode", 102, 4e6, 1e6),
        ("queue", 101, 3e6, 1e6),
        ("prefill", 101, 4e6, 1.5e6),
        ("decode", 101, 5.5e6, 0.5e6),
        ("queue", 102, 5e6, 1e6),
    ]
    _, new, late, waiting = [each["args"] for each in of_phase(told, "X", "request")]
    assert (new["prompt_tokens"], new["cached_tokens"], new["generated"]) == (64, 16, 2)
    assert (new["ttft_ms"], new["finish"], late["finish"]) == (3750.0, "stop", None)
    assert waiting["ttft_ms"] is None


def test_a_flow_leads_from_a_request_through_its_launches(told):
    flows = {}
    for event in told["traceEvents"]:
        if event["ph"] in "stf":
            chunk = event.get("args", {}).get("chunk", False)
            step = event["ph"], event["tid"], event["ts"], chunk
            flows.setdefault(event["id"], []).append(step)
    assert flows == {
        1: [("s", 101, 0.0, False), ("t", 11, 0.0, False), ("f", 13, 1e6, False)],
        2: [("s", 102, 1e6, False), ("t", 12, 1e6, True), ("f", 11, 4e6, False)],
        3: [("s", 101, 4e6, False), ("f", 11, 4e6, True)],
    }
    assert [each["args"]["flow"] for each in of_phase(told, "X", "request")] == [1, 2, 3, 4]
    assert [each["bp"] for each in of_phase(told, "f")] == ["e"] * 3  # or it would be the next one


def test_counters_are_told_where_they_change(told):
    counted = [(each["name"], each["ts"], each["args"]) for each in of_phase(told, "C")]
    assert counted == [
        ("split", 0.0, {"decode": 0, "prefill": 0}),
        ("requests", 5e5, {"running": 2, "waiting": 1}),
        ("pages", 5e5, {"free": 7}),
        ("split", 1e6, {"decode": 40, "prefill": 92}),
        ("split", 4e6, {"decode": 0, "prefill": 0}),
    ]


def test_facts_stand_before_the_events():
    dropped = {"launches": 3, "rows": 4, "requests": 5}
    first, *_ = pieces(window(dropped=dropped))
    told = read(first.decode() + "]}")["otherData"]
    assert told["begin_unix_s"] == 1e9
    assert told["seconds"] == 6.0
    assert (told["launches"], told["requests"]) == (4, 4)
    assert (told["dropped_launches"], told["dropped_rows"], told["dropped_requests"]) == (3, 4, 5)


def test_a_long_trace_comes_in_pieces_and_an_empty_one_is_whole_too():
    many = [launch(n, Lane.WHOLE, 100 + n / 1e3, 100 + (n + 1) / 1e3, ["old"]) for n in range(2000)]
    parts = list(pieces(window(many)))
    assert len(parts) > 6
    assert max(map(len, parts)) < 400_000
    assert faults(read(b"".join(parts).decode())) == []
    assert faults(document(window((), ()))) == []


# That it opens.


def random_window(seed):
    """Launches one after another on each lane, before, within and around requests of all kinds."""
    draw = random.Random(seed)
    names = [f"r{number}" for number in range(draw.randint(1, 12))]
    launches, free = [], dict.fromkeys(Lane, 99.0)
    for ticket in range(draw.randint(0, 60)):
        lane = draw.choice(list(Lane))
        began = free[lane] + draw.choice([0.0, draw.random() / 7])
        free[lane] = began + draw.choice([0.0, 1e-7, draw.random() / 3])
        rows = draw.sample(names, draw.randint(0, len(names)))
        chunks = draw.randint(0, len(rows))
        ids = (rows[chunks:], rows[:chunks]) if lane is not Lane.DECODE else (rows, ())
        launches.append(launch(ticket, lane, began, free[lane], *ids, k=draw.randint(1, 5)))
    launches.sort(key=lambda each: each.ended)
    lives = []
    for name in names:
        times = sorted(draw.uniform(98.0, 104.0) for _ in range(3))
        lives.append(life(name, *times[: draw.randint(1, 3)]))
    return window(launches, lives, end=103.0)


@pytest.mark.parametrize("seed", range(60))
def test_it_opens_whatever_happened(seed):
    assert faults(document(random_window(seed))) == []


# The checker.


def changed(told, phase, category=None, **fields):
    """A trace whose first event of a kind is otherwise; None: without the field."""
    broken = copy.deepcopy(told)
    event = of_phase(broken, phase, category)[0]
    for name, value in fields.items():
        event[name] = value
        if value is None:
            del event[name]
    return broken


BREAKS = [
    ("ph is 'x'", "X", None, {"ph": "x"}),
    ("has no name", "X", None, {"name": ""}),
    ("pid is None", "X", None, {"pid": None}),
    ("pid is 0", "X", None, {"pid": 0}),
    ("tid is 'eleven'", "X", None, {"tid": "eleven"}),
    ("has no tid", "X", None, {"tid": None}),
    ("ts is None", "X", None, {"ts": None}),
    ("ts is -1", "X", None, {"ts": -1}),
    ("ts is '5'", "C", None, {"ts": "5"}),
    ("dur is None", "X", None, {"dur": None}),
    ("dur is -0.5", "X", None, {"dur": -0.5}),
    ("args is no object", "X", None, {"args": [1]}),
    ("numbers alone", "C", None, {"args": {"decode": None}}),
    ("numbers alone", "C", None, {"args": {}}),
    ("a flow has cat", "s", None, {"cat": None}),
    ("id of 64 bits", "s", None, {"id": "zz"}),
    ("id of 64 bits", "t", None, {"id": 2**64}),
    ("bp is 'b'", "f", None, {"bp": "b"}),
    ("flow 'computes' 1 meets no slice at 1000000.0", "f", None, {"bp": None}),
    ("means nothing", "M", None, {"name": "proces_name"}),
    ("process_name has no name", "M", None, {"args": {"name": 3}}),
    ("pid 1 has no name", "M", None, {"pid": 77}),
    ("outlasts what it began in", "X", "phase", {"ts": 1e6}),
    ("outlasts what it began in", "X", "launch", {"ts": 3.9e6}),
    ("flow 'computes' 1 goes t...f", "s", None, {"id": 99}),
    ("goes s...s", "s", None, {"id": 99}),
    ("goes s...t", "f", None, {"id": 99}),
    ("flow 'computes' 1 goes back in time", "s", None, {"ts": 1e6}),
    ("meets no slice at 700000.0", "t", None, {"ts": 7e5}),
    ("is of processes [1, 2]", "X", "request", {"pid": 1}),
    ("tid 500 has no name", "X", "request", {"tid": 500}),
    ("asynchronous event has cat and id", "X", None, {"ph": "b", "dur": None}),
    ("'decode' never ends", "X", None, {"ph": "B", "dur": None}),
    ("never began", "X", None, {"ph": "E", "dur": None}),
    ("asynchronous 'decode' never ends", "X", None, {"ph": "b", "id": 1, "dur": None}),
    ("outside of any", "X", None, {"ph": "n", "id": 1, "dur": None}),
    ("s is 'x'", "X", None, {"ph": "i", "s": "x", "dur": None}),
]


@pytest.mark.parametrize(("fault", "phase", "category", "fields"), BREAKS)
def test_the_checker_sees_a_broken_event(told, fault, phase, category, fields):
    assert faults(told) == []
    assert [each for each in faults(changed(told, phase, category, **fields)) if fault in each]


def test_the_checker_sees_a_broken_document(told):
    assert faults(told["traceEvents"]) == ["the document is no object with a list of traceEvents"]
    assert faults({"traceEvents": {}})
    assert faults(told | {"displayTimeUnit": "s"}) == ["displayTimeUnit is 's'"]
    assert faults(told | {"otherData": []}) == ["otherData is no object"]
    with pytest.raises(ValueError, match="NaN is no JSON"):
        read('{"traceEvents": [NaN]}')
