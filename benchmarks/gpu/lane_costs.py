"""L4: what a launch costs the host, what lies between steps, what a step takes on each split."""

import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING

from duetjax.policy.launch import Lane, Launch, Split
from duetjax.runtime.rungs import Rung
from gpu.bench import Bench
from gpu.driver import microseconds
from gpu.kernels import BITMAP_BYTES
from gpu.lane_launches import Hand
from gpu.lane_play import Deliveries
from gpu.lane_rig import Rig, reach, recordings_of, replay_of, rig_of, splits_of

if TYPE_CHECKING:
    from duetjax._launcher import Device, Program
    from duetjax.runtime.cuda_lanes import Recordings

ENQUEUE_US, GAP_US, SWITCH_US = 100.0, 10.0, 50.0
"""The goals of issue 06."""

K = 8
SPIN_CYCLES = 200_000
DECODE = 1
"""The launcher's number of the lane."""


def costs(bench: Bench) -> None:
    """L4: each part on its own; a goal that is missed is noted and fails nothing."""
    rig = rig_of(bench)
    bench.attempt("plain calls", _plain, bench, rig)
    bench.attempt("enqueue", _enqueue, bench, rig)
    bench.attempt("replays", _replayed, bench, rig)
    bench.attempt("gaps of lists", _gaps_of_lists, bench, rig)


def _replayed(bench: Bench, rig: Rig) -> None:
    parts = {"pieces": _pieces, "steps": _steps, "switches": _switches, "gaps": _gaps}
    with rig.opened(Rung.GRAPHS) as lanes:
        for what, part in parts.items():
            bench.attempt(what, part, bench, recordings_of(lanes))


def _count(bench: Bench, many: int, few: int) -> int:
    """How often to measure: the double is slow, and its figures mean nothing."""
    return many if bench.driver.is_real else few


def _plain(bench: Bench, rig: Rig) -> None:
    """A decode step and a prompt as plain JAX calls, many enqueued at once."""
    serial = rig.serial()
    hand = Hand(rig, None, Deliveries())  # type: ignore[arg-type]  # it only makes launches
    for launch in hand.beginning():
        serial.run(launch)
    steps = _count(bench, 64, 4)
    launches = {"step": [hand.decode(None, steps)], "prompt": [hand.prompt(None)] * 4}
    for what, each in launches.items():
        took = []
        for _ in range(_count(bench, 5, 1) + 1):
            began = time.perf_counter()
            for launch in each:
                serial.run(launch)
            took.append(microseconds(began) / (steps if what == "step" else len(each)))
        bench.note(**{f"plain_{what}_us": round(median(took[1:]), 1)})


# The host's side.


def _enqueue(bench: Bench, rig: Rig) -> None:
    """`submit` of k = 8 decode steps with the deltas of a usual one, quiet and with one running."""
    deliveries = Deliveries()
    with rig.opened(Rung.GRAPHS) as lanes:
        lanes.start(deliveries.put)
        hand = Hand(rig, lanes, deliveries)
        splits = splits_of(rig, lanes)
        split = splits[len(splits) // 2]
        for name, in_flight in (("quiet", 0), ("one_in_flight", 1)):
            took = _submitted(hand, split, _count(bench, 300, 6), in_flight)
            spread = {"p99_us": round(quantiles(took, n=100)[98], 1), "most_us": max(took)}
            bench.note(**{f"enqueue_k{K}_{name}_spread": {"launches": len(took), **spread}})
            reach(bench, f"enqueue_k{K}_{name}", median(took), ENQUEUE_US)


def _submitted(hand: Hand, split: Split, count: int, in_flight: int) -> list[float]:
    """Microseconds of each `submit`, with so many launches before it that have not ended."""
    took: list[float] = []
    waiting: list[Launch] = []
    a_life = max(1, hand.steps_left // K)
    for number in range(count + 3):
        if number % a_life == 0:
            _collect(hand, waiting, 0)
            hand.run(hand.beginning())
        launch = _usual(hand, split, number)
        began = time.perf_counter()
        hand.executor.submit(launch)
        took.append(microseconds(began))
        waiting.append(launch)
        _collect(hand, waiting, in_flight)
    _collect(hand, waiting, 0)
    return took[3:]


def _usual(hand: Hand, split: Split, number: int) -> Launch:
    """A page for one slot, and a limit for three: the values that they have."""
    slots, width = hand.decoding, hand.rig.programs.slots.table_width
    slot, index = slots[number % len(slots)], number % width
    limits = tuple((each, hand.rig.longest - 1) for each in slots[:3])
    return hand.decode(split, K, pages=((slot, index, 1 + slot * width + index),), limits=limits)


def _collect(hand: Hand, waiting: list[Launch], left: int) -> None:
    while len(waiting) > left:
        hand.collect([waiting.pop(0)], time.perf_counter())


def _pieces(bench: Bench, recordings: "Recordings") -> None:
    """What `submit` is made of: the launcher's calls one by one."""
    replay = replay_of(recordings, Lane.DECODE, prefill=False)
    device, split = recordings.device, next(iter(recordings.splits.values()))
    table = recordings.tables["params"]
    row, ids = bytes(table.row_bytes), bytes(4)
    found: dict[str, list[float]] = {"copy_in_row": [], "copy_in_4_bytes": [], f"launch_k{K}": []}
    dummy = table.row(len(recordings.host_tables.arrays()["params"]) - 1)
    content = bytes(recordings.host_tables.arrays()["params"][-1].tobytes())
    assert len(content) == len(row), f"{len(content)} bytes of a row of {len(row)}"
    for _ in range(_count(bench, 200, 3)):
        began = time.perf_counter()
        device.copy_in(DECODE, split, dummy, content)
        found["copy_in_row"].append(microseconds(began))
        began = time.perf_counter()
        device.copy_in(DECODE, split, recordings.progress[Lane.PREFILL].row(0) + 12, ids)
        found["copy_in_4_bytes"].append(microseconds(began))
        began = time.perf_counter()
        last = replay.recording.launch(DECODE, split, K, 1)
        found[f"launch_k{K}"].append(microseconds(began))
        bench.finish(device, DECODE, last)
    bench.note(pieces_us={name: round(median(took), 1) for name, took in found.items()})


# The device's side.


def _steps(bench: Bench, recordings: "Recordings") -> None:
    """A step of each program on each split, of many at once; and what one costs that is alone."""
    device = recordings.device
    decode: dict[str, float] = {}
    prefill: dict[str, float] = {}
    few, many = (16, 64) if bench.driver.is_real else (2, 4)
    for lane, kind, found in ((1, Lane.DECODE, decode), (0, Lane.PREFILL, prefill)):
        replay = replay_of(recordings, kind, prefill=lane == 0)
        for split, number in recordings.splits.items():
            slope = _slope(bench, device, (replay.recording, lane, number), (few, many))
            found[f"{split.decode}/{split.prefill}"] = round(slope, 1)
    bench.note(decode_step_us=decode, prefill_step_us=prefill)
    whole = (replay_of(recordings, Lane.DECODE, prefill=False).recording, DECODE, 0)
    slope = _slope(bench, device, whole, (few, many))
    bare = _slope(bench, device, whole, (few, many), results=0)
    alone = median(_ran(bench, device, whole, 1, 1) for _ in range(_count(bench, 20, 2)))
    bench.note(
        whole_step_us=round(slope, 1),
        whole_step_without_results_us=round(bare, 1),
        whole_step_alone_us=round(alone, 1),
        k_1_costs_more_by_us=round(alone - slope, 1),
    )


type _Place = tuple["Program", int, int]
"""A recording, a lane and a split."""


def _ran(bench: Bench, device: "Device", place: _Place, steps: int, results: int) -> float:
    """Microseconds of so many steps, from the call until they have completed."""
    recording, lane, split = place
    began = time.perf_counter()
    last = recording.launch(lane, split, steps, results)
    bench.finish(device, lane, last)
    return microseconds(began)


def _slope(
    bench: Bench, device: "Device", place: _Place, sizes: tuple[int, int], results: int = 1
) -> float:
    """Microseconds that one step more takes: what comes once for a launch drops out."""
    few, many = sizes
    _ran(bench, device, place, few, results)
    times = [
        [_ran(bench, device, place, size, results) for _ in range(_count(bench, 7, 1))]
        for size in sizes
    ]
    return (median(times[1]) - median(times[0])) / (many - few)


def _switches(bench: Bench, recordings: "Recordings") -> None:
    """Launches of one decode step, on one split and on two by turns."""
    recording = replay_of(recordings, Lane.DECODE, prefill=False).recording
    device, numbers = recordings.device, list(recordings.splits.values())
    if len(numbers) < 2:
        bench.note(switch="there is one split alone")
        return
    pairs = {"neighbours": numbers[:2], "ends": [numbers[0], numbers[-1]]}
    for name, (one, two) in pairs.items():
        took = {
            tuple(order): _in_order(bench, device, recording, order)
            for order in ((one,), (two,), (one, two))
        }
        extra = took[one, two] - (took[one,] + took[two,]) / 2
        bench.note(**{f"switch_{name}_us_a_step": [round(each, 1) for each in took.values()]})
        reach(bench, f"switch_{name}", extra, SWITCH_US)


def _in_order(bench: Bench, device: "Device", recording: "Program", order: Sequence[int]) -> float:
    """Microseconds of a step, of launches of one step each on splits in turn."""
    count, took = _count(bench, 100, 4), []
    for _ in range(_count(bench, 5, 1) + 1):
        began, last = time.perf_counter(), 0
        for index in range(count):
            last = recording.launch(DECODE, order[index % len(order)], 1, 1)
        bench.finish(device, DECODE, last)
        took.append(microseconds(began) / count)
    return median(took[1:])


def _gaps_of_lists(bench: Bench, rig: Rig) -> None:
    with rig.opened(Rung.LISTS) as lanes:
        recordings = recordings_of(lanes)
        bench.attempt("steps", _whole_step, bench, recordings)
        _gap(bench, recordings, "lists_gap")


def _whole_step(bench: Bench, recordings: "Recordings") -> None:
    whole = (replay_of(recordings, Lane.DECODE, prefill=False).recording, DECODE, 0)
    sizes = (16, 64) if bench.driver.is_real else (2, 4)
    slope = _slope(bench, recordings.device, whole, sizes)
    bench.note(lists_whole_step_us=round(slope, 1))


def _gaps(bench: Bench, recordings: "Recordings") -> None:
    _gap(bench, recordings, "gap")


def _gap(bench: Bench, recordings: "Recordings", name: str) -> None:
    """What lies between steps: a kernel of known length per step, against many in one step.

    The steps have a copy and a result as decode's have. Within a step kernels follow each other
    with a gap of their own, which is taken for none: so the gap comes out too small by that.
    """
    device, split = recordings.device, next(iter(recordings.splits.values()), 0)
    many = 16 if bench.driver.is_real else 2
    single, long = (_spinning(bench, device, kernels) for kernels in (1, many))
    for program in (single, long):
        program.build(DECODE, split)
    sizes = (16, 64) if bench.driver.is_real else (2, 4)
    gaps, kernels = [], []
    for _ in range(_count(bench, 5, 1)):
        step = _slope(bench, device, (single, DECODE, split), sizes)
        longer = _slope(bench, device, (long, DECODE, split), (2, 8))
        kernel = (longer - step) / (many - 1)
        kernels.append(kernel)
        gaps.append(step - kernel)
    bench.note(**{f"{name}_kernel_us": round(median(kernels), 2)})
    reach(bench, name, median(gaps), GAP_US)


def _spinning(bench: Bench, device: "Device", kernels: int) -> "Program":
    """A program of so many kernels that take their time."""
    driver = bench.driver
    bitmap, cells = driver.allocate(BITMAP_BYTES), driver.allocate(16)

    def enqueue(stream: int) -> None:
        for _ in range(kernels):
            driver.launch(driver.kernel("probe"), stream, (bitmap, SPIN_CYCLES))

    ranges = [(bitmap, BITMAP_BYTES, True), (cells, 16, True)]
    program = bench.record(device, enqueue, ranges)
    program.add_copy(cells, cells + 8, 8)
    program.add_result(cells + 8, 8)
    program.check(ranges)
    return program
