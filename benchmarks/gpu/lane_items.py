"""L1, L2: the project's own programs are recorded, and lanes give what plain JAX calls give."""

import time
from collections import Counter
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

import duetjax.runtime.rungs as rungs
from duetjax.policy.launch import Lane
from duetjax.runtime.programs import Key
from duetjax.runtime.recorder import Recorder, XlaMemory, _Capture
from duetjax.runtime.rungs import Rung, open_lanes
from gpu.bench import Bench, strays
from gpu.driver import microseconds
from gpu.lane_play import Deliveries, Play, compare, uncovered
from gpu.lane_rig import Heard, Rig, recordings_of, rig_of, splits_of

if TYPE_CHECKING:
    from duetjax.runtime.cuda_lanes import CudaLanes

MIB = 2**20
LADDER = (Rung.GRAPHS, Rung.LISTS, Rung.STREAMS)
ROUNDS = 8
"""Of a split, at most, until each look-ahead has been seen on it."""


class _Building:
    """Told of graphs as they are built: when each was, and how much memory was free."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._began = time.perf_counter()
        self.moments: list[float] = []
        self.free: list[int] = []

    def __call__(self, _count: int, _of: int) -> None:
        self.moments.append(microseconds(self._began) / 1000)
        self.free.append(self._bench.driver.free_bytes())

    def figures(self) -> dict[str, Any]:
        """Of all of it. The first graph's time has recording in it."""
        if not self.moments:
            return {"graphs": 0}
        each = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)] or [0.0]
        taken = self.free[0] - self.free[-1]
        return {
            "graphs": len(self.moments),
            "run_record_check_ms": round(self.moments[0], 1),
            "build_ms_each": round(median(each), 2),
            "build_ms_longest": round(max(each), 2),
            "build_ms_all": round(self.moments[-1] - self.moments[0], 1),
            "graph_kib_each": round(taken / 1024 / max(1, len(self.free) - 1), 1),
            "graph_mib_all": round(taken / MIB, 1),
        }


class _Telling(Recorder):
    """Says what it records; of what cannot be kept every address, not the first alone."""

    bench: Bench
    last: _Capture | None = None

    def _record(self, key: Key, lane: Lane) -> _Capture:
        name, began = f"{key[0].value}_{key[1]}_{lane.value}", time.perf_counter()
        self.last = None
        try:
            made = super()._record(key, lane)
        except Exception:
            if self.last is not None:
                self.bench.attempt(name, self._tell, name, self.last)
            raise
        census = {what: count for what, count in made.recording.census.items() if count}
        figures = {
            "ms": round(microseconds(began) / 1000, 1),
            "temp_bytes": self._temporaries[key],
            "held": _places(made),
        }
        self.bench.note(**{name: {**census, **figures}})
        return made

    def _capture(self, key: Key, lane: Lane) -> _Capture:
        self.last = made = super()._capture(key, lane)
        return made

    def _tell(self, name: str, capture: _Capture) -> None:
        outside = sorted(strays(capture.recording, self._ranges(capture)).items())
        if not outside:  # the last piece that was held has all of them: too late, or too far behind
            self.bench.note(**{f"{name}_outside": {"addresses": 0, "held": _places(capture)}})
            return
        addresses = {"first": f"{outside[0][0]:#x}", "last": f"{outside[-1][0]:#x}"}
        found = {"addresses": len(outside), **addresses, "held": _places(capture)}
        self.bench.note(**{f"{name}_outside": found})
        for address, said in outside[:4]:
            where = self.bench.driver.allocation_of(address) if self.bench.driver.is_real else "?"
            print(f"stray of {name}: {address:#x}: {said}; {where}", flush=True)


def _places(capture: _Capture) -> list[str]:
    """What is held in the place of temporaries: one piece where the first came out right."""
    return [f"{each.nbytes} at {each.unsafe_buffer_pointer():#x}" for each in capture.held]


def recording(bench: Bench) -> None:
    """L1: the rung that comes out, and what recording and graphs come to in time and memory."""
    rig = rig_of(bench)
    bench.note(splits_made=[f"{split.decode}/{split.prefill}" for split in rig.splits])
    bench.attempt("recorded by hand", _by_hand, bench, rig)
    bench.attempt("opened as the server does", _ladder, bench, rig)
    for rung in (Rung.LISTS, Rung.STREAMS):
        bench.attempt(f"rung {rung}", _rung, bench, rig, rung)


def _by_hand(bench: Bench, rig: Rig) -> None:
    with rungs._open(rig.programs, rig.splits, rig.libcuda, replay_lists=False) as device:
        memory = rig.memory or XlaMemory()
        parts = (rig.programs, rig.executables, rig.weights, rig.temporaries)
        recorder = _Telling(device, *parts, memory)
        recorder.bench = bench
        numbers = {split: number for number, split in enumerate(rig.splits, 1)}
        recorder.record(numbers, lambda *_: None)


def _ladder(bench: Bench, rig: Rig) -> None:
    heard, building = Heard(), _Building(bench)
    with heard.listening():
        lanes, rung = open_lanes(
            rig.programs,
            rig.executables,
            rig.weights,
            rig.temporaries,
            rig.splits,
            built=building,
            libcuda=rig.libcuda,
            memory=rig.memory,
        )
    try:
        bench.note(rung=rung.value, warnings=heard.lines, **building.figures())
        bench.expect(rung is Rung.GRAPHS, f"the rung is {rung}: {'; '.join(heard.lines)}")
        asked, usable = len(rig.splits), len(recordings_of(lanes).splits)
        bench.note(splits_built=f"{usable} of {asked}")
        bench.expect(usable == asked, f"{usable} of {asked} splits were built: {heard.lines}")
        bench.attempt("first replays", _replay_all, bench, lanes)
    finally:
        lanes.close()


def _replay_all(bench: Bench, lanes: "CudaLanes") -> None:
    """Each graph once, on padding: none hangs; and what memory a first launch takes."""
    recordings, free = recordings_of(lanes), bench.driver.free_bytes()
    device, launched = recordings.device, 0
    for (lane, _), replay in recordings.of.items():
        number = 0 if lane is Lane.PREFILL else 1
        for split in [0] if lane is Lane.WHOLE else recordings.splits.values():
            step = replay.recording.launch(number, split, 1, 2)
            bench.finish(device, number, step)
            launched += 1
    taken = (free - bench.driver.free_bytes()) / MIB
    bench.note(replayed_once=launched, first_replays_mib=round(taken, 1))


def _rung(bench: Bench, rig: Rig, rung: Rung) -> None:
    building = _Building(bench)
    rig.open(rung, building).close()
    bench.note(**{rung.value: building.figures()})


def graph_tokens(bench: Bench) -> None:
    """L2: by graphs; the double has time for every rung, and a processor has none."""
    rungs = {"fake": LADDER, "host": (Rung.LANES,)}
    _tokens(bench, *rungs.get(bench.backend, (Rung.GRAPHS,)))


def list_tokens(bench: Bench) -> None:
    """L2: kernel by kernel on the same streams."""
    _tokens(bench, Rung.LISTS)


def stream_tokens(bench: Bench) -> None:
    """L2: by graphs on two ordinary streams."""
    _tokens(bench, Rung.STREAMS)


def mosaic_tokens(bench: Bench) -> None:
    """L2: by graphs, with Mosaic's decode kernel in the programs."""
    rig = import_module("gpu.lane_model").make_with_mosaic(bench)
    bench.attempt("mosaic", _play_on, bench, rig, Rung.GRAPHS)


def _tokens(bench: Bench, *ladder: Rung) -> None:
    rig = rig_of(bench)
    for rung in ladder:
        bench.attempt(str(rung), _play_on, bench, rig, rung)


def _play_on(bench: Bench, rig: Rig, rung: Rung) -> None:
    """On every split until each look-ahead has been seen, then the same launches in a row."""
    serial, deliveries, tickets = rig.serial(), Deliveries(), 0
    with rig.opened(rung) as lanes:
        lanes.start(deliveries.put)
        play = Play(rig, lanes, deliveries, 3 * rig.programs.slots.num_slots)
        splits = splits_of(rig, lanes)
        for number, split in enumerate(splits[:2] if rung is Rung.STREAMS else splits, 1):
            what = f"{rung} {split.decode}/{split.prefill}"
            seen, began = Counter[str](), time.perf_counter()
            for seed in range(ROUNDS * number, ROUNDS * (number + 1)):
                played = play.on(split, seed, tickets)
                found = compare(bench, what, played, serial)
                distinct = max(seen["distinct_tokens"], found["distinct_tokens"])
                seen.update(played.covered)
                seen.update(found)
                seen["distinct_tokens"] = distinct
                seen.update(launches=len(played.launches))
                tickets += len(played.launches)
                if not uncovered(seen):
                    break
            missed = uncovered(seen)
            bench.expect(not missed, f"{what}: no play had {', '.join(missed)}")
            seconds = round(time.perf_counter() - began, 1)
            bench.note(**{what: {**dict(sorted(seen.items())), "seconds": seconds}})
