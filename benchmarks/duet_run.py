"""An engine under the headline experiment's load, in a process of its own: cells, or the capacity.

    python benchmarks/duet_run.py TASK

TASK is the JSON of a `Task`. Each cell is written when it has been measured.
"""

import gc
import json
import os
import queue
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from checkout import commit  # noqa: E402
from duet_cells import (  # noqa: E402
    CAPACITY_SEED,
    PLANS_BY_OBJECTIVE,
    REFERENCE_STEP_MS,
    SETTLING_SEED,
    Backend,
    Cell,
    Results,
    Timing,
    Variant,
    find,
)
from duet_load import Load, attackers, random_prompt  # noqa: E402
from duet_measure import Window, account, observe  # noqa: E402
from duet_profiles import Profiles  # noqa: E402
from gpu.building import build_launcher, load_launcher  # noqa: E402
from gpu.report import versions  # noqa: E402

from duetjax.checkpoint.source import resolve_model  # noqa: E402
from duetjax.config import EngineConfig, SamplingParams  # noqa: E402
from duetjax.engine import CompletedLaunches, EngineClient  # noqa: E402
from duetjax.policy.completed_launch import CompletedLaunch  # noqa: E402
from duetjax.policy.profiles import HardwareProfile  # noqa: E402
from duetjax.policy.request import FinishReason, NewRequest, StepOutputs  # noqa: E402
from duetjax.profile_files import find_hardware  # noqa: E402

FIRST = -1000
"""Victims' priority: who takes a victim's place is the next whose prompt is begun."""
PREFILLING = 16
"""Prompts at once where the capacity is measured."""
PLANS_BY_NONE_MS = 1e6
"""An objective that changes nothing, for policies whose cells are judged by all."""
NEARLY_ALL = 0.95
_PATIENCE_S = 120.0
_LOOK_S = 0.05
_LAST_LOOK_S = 0.5
"""After a window, so that launches and gaps that it cuts come to their end."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does. cells: pairs of rate and seed; none: it measures the capacity.

    capacity: see `measure_capacity`.
    """

    backend: str
    out: str
    variant: Variant
    cells: tuple[tuple[int, int], ...]
    capacity: Mapping[str, float] | None
    profiles: Profiles
    is_brief: bool
    seconds: float
    command: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `json.dumps(asdict(task))` wrote."""
        values = json.loads(text)
        values["variant"] = Variant(**values["variant"])
        values["profiles"] = Profiles(**values["profiles"])
        values["cells"] = tuple((rate, seed) for rate, seed in values["cells"])
        return cls(**values)

    @property
    def timing(self) -> Timing:
        """Its seconds."""
        return find(self.backend, is_brief=self.is_brief).timing


def static_split(hardware: HardwareProfile) -> tuple[int, int]:
    """The fewest cores for decode that reach nearly all of the memory's bytes/s."""
    splits, most = hardware.splits(), hardware.curve[-1].bytes_per_s
    for split in splits:
        if hardware.reach(split.decode).bytes_per_s >= NEARLY_ALL * most:
            return split.decode, split.prefill
    middle = splits[len(splits) // 2]
    return middle.decode, middle.prefill


type Maker = Callable[[int], NewRequest]
"""The n-th request of a place, which is taken at once when the one before has ended."""


class Crowd:
    """Sends requests to an engine and keeps what comes back; all methods for one thread.

    seen: what came, and when. arrivals: when attackers were due, by name. launches: completed ones.
    """

    def __init__(self, engine: EngineClient) -> None:
        self.seen: list[tuple[float, StepOutputs]] = []
        self.arrivals: dict[str, float] = {}
        self.launches: list[CompletedLaunch] = []
        self._engine = engine
        self._ended: queue.SimpleQueue[tuple[tuple[str, FinishReason], ...]] = queue.SimpleQueue()
        self._places: dict[str, Maker] = {}
        self._live: set[str] = set()
        self._prompts: dict[str, int] = {}
        self._begun: set[str] = set()
        self._looked = 0
        engine.start(self._take)
        engine.watch_launches(self._completed)

    def keep(self, place: str, maker: Maker) -> None:
        """From now on somebody is in a place."""
        self._places[place] = maker
        self._submit(maker(0))

    def leave(self) -> None:
        """Nobody follows in any place; who is there goes."""
        self._places.clear()
        self.clear()

    def clear(self) -> None:
        """Ends whoever is in no place, and waits as in `wait` until they are gone."""
        for name in list(self._live):
            if name.rpartition("-")[0] not in self._places:
                self._engine.abort(name)
        self.wait(
            "those that were aborted have not gone",
            lambda: all(name.rpartition("-")[0] in self._places for name in self._live),
        )

    def forget(self) -> None:
        """What has been seen so far."""
        self.seen, self.arrivals, self.launches = [], {}, []
        self._begun, self._looked = set(), 0

    def run(
        self,
        seconds: float,
        arrivals: list[tuple[float, NewRequest]] | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Lets time pass; submits those whose time has come, ascending, and takes them out."""
        end = time.monotonic() + seconds
        arrivals = [] if arrivals is None else arrivals
        while not until():
            while arrivals and arrivals[0][0] <= time.monotonic():
                at, new = arrivals.pop(0)
                self.arrivals[new.id] = at
                self._prompts[new.id] = len(new.prompt)
                self._submit(new)
            wake = min(end, arrivals[0][0]) if arrivals else end
            left = wake - time.monotonic()
            if left <= 0 and wake == end:
                return
            self._wait(max(0.0, min(left, _LOOK_S)))

    def wait(self, otherwise: str, until: Callable[[], bool]) -> None:
        """Until it is so; SystemExit says what is not, if it does not come true in two minutes."""
        self.run(_PATIENCE_S, until=until)
        if not until():
            raise SystemExit(
                f"duet_run.py: {otherwise} within {_PATIENCE_S:.0f} s; call it again when the"
                " machine has less to do"
            )

    def tokens_of(self, names: Iterable[str]) -> int:
        """Of attackers' prompts."""
        return sum(self._prompts[name] for name in names)

    def first_tokens(self) -> set[str]:
        """Who has had one."""
        for _, outputs in self.seen[self._looked :]:
            self._begun.update(outputs.ids)
            self._looked += 1
        return self._begun

    def _submit(self, new: NewRequest) -> None:
        self._live.add(new.id)
        self._engine.submit(new)

    def _wait(self, seconds: float) -> None:
        try:
            ended = self._ended.get(timeout=seconds)
        except queue.Empty:
            return
        for name, why in ended:
            self._live.discard(name)
            if why is FinishReason.ERROR:
                raise RuntimeError(f"{name} failed: {self._engine.failure!r}")
            place, _, number = name.rpartition("-")
            if (maker := self._places.get(place)) is not None:
                self._submit(maker(int(number) + 1))

    # On the engine's thread.

    def _take(self, outputs: StepOutputs) -> None:
        self.seen.append((time.monotonic(), outputs))
        if outputs.finished:
            self._ended.put(outputs.finished)

    def _completed(self, launches: CompletedLaunches) -> None:
        self.launches.extend(launches)


class Experiment:
    """An engine that has started, and its victims.

    start_s: seconds that it took to start; after `fill`, until all victims decoded.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._began = time.monotonic()
        self.commit = commit()
        self.backend: Backend = find(task.backend, is_brief=task.is_brief)
        self.load: Load = self.backend.load
        self.config = self._config()
        self.engine = self._open()
        self.crowd = Crowd(self.engine)
        self.engine.watch(self.config.watchdog_s)
        gc.collect()
        gc.freeze()  # as the server does
        self.start_s = round(time.monotonic() - self._began, 2)

    def _config(self) -> EngineConfig:
        variant, load = self.task.variant, self.load
        out = Path(self.task.out)
        named = self.task.profiles.hardware_in(out)
        plans = variant.policy in PLANS_BY_OBJECTIVE
        return EngineConfig(
            policy=variant.policy,
            split=static_split(find_hardware(named, "--hardware-profile")),
            max_num_seqs=load.slots,
            max_num_batched_tokens=variant.budget,
            max_model_len=load.max_model_len,
            page_size=load.page,
            tbt_slo_ms=self._objective_ms() if plans else PLANS_BY_NONE_MS,
            hardware_profile=named if plans or self.backend.is_simulation else None,
            model_profile=self.task.profiles.model_in(out) if plans else None,
            device="sim" if self.backend.is_simulation else "auto",
        )

    def _objective_ms(self) -> float:
        assert self.task.capacity is not None, "an objective before the capacity"
        return self.task.capacity["objective_scale"] * float(self.task.variant.objective or 0)

    def _open(self) -> EngineClient:
        backend = self.backend
        dummy = "auto" if backend.name == "host" else "dummy"
        source = resolve_model(backend.model, load_format=dummy)
        if backend.is_simulation:
            from duetjax.build_sim import build_engine as simulated

            return simulated(source, None, self.config)[0]
        load_launcher(build_launcher(ROOT / "build" / "duet")[0])
        from duetjax.build_device import build_engine

        return build_engine(source, self.config, load_format=dummy)[0]

    def fill(self) -> None:
        """Every victim decodes; their first answers end one by one, evenly."""
        load, vocabulary = self.load, self.engine.vocab_size
        self._prompts = [
            random_prompt(vocabulary, load.context, 0, index) for index in range(load.victims)
        ]
        for index in range(load.victims):
            self.crowd.keep(f"victim{index}", partial(self._victim, index))
        names = {f"victim{index}-0" for index in range(load.victims)}
        self.crowd.wait(
            "not every victim has had a token", lambda: names <= self.crowd.first_tokens()
        )
        self.start_s = round(time.monotonic() - self._began, 2)

    def _victim(self, index: int, generation: int) -> NewRequest:
        load, tokens = self.load, self.load.output
        if generation == 0:
            tokens = max(2, tokens * (index + 1) // load.victims)
        sampling = SamplingParams(seed=generation * load.victims + index)
        name = f"victim{index}-{generation}"
        return NewRequest(name, self._prompts[index], tokens, sampling, priority=FIRST)

    def attack(self, rate: int, seconds: float, seed: int) -> list[tuple[float, NewRequest]]:
        """Attackers that come from now on. rate: percent of the capacity.

        At each rate other tokens: those of another would be in the prefix cache.
        """
        assert self.task.capacity is not None, "a rate before the capacity"
        tokens_per_s = rate / 100 * self.task.capacity["prefill_tokens_per_s"]
        coming = [
            (each.at, self._attacker(number, each.prompt, (seed, rate, number)))
            for number, each in enumerate(attackers(self.load, tokens_per_s, seconds, seed))
        ]
        now = time.monotonic()
        return [(now + at, new) for at, new in coming]

    def _attacker(self, number: int, tokens: int, seed: tuple[int, ...]) -> NewRequest:
        prompt = random_prompt(self.engine.vocab_size, tokens, 1, *seed)
        sampling = SamplingParams(seed=number)
        return NewRequest(f"attacker-{number}", prompt, self.load.answer, sampling)


def measure_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """One rate of one seed: warm-up, window, drain."""
    crowd, engine, timing = experiment.crowd, experiment.engine, experiment.task.timing
    crowd.forget()
    seconds = timing.warm_up + timing.window + timing.drain
    coming = experiment.attack(cell.rate, seconds, cell.seed)
    start = time.monotonic() + timing.warm_up
    crowd.run(timing.warm_up, coming)
    before = engine.stats()
    crowd.run(start + timing.window - time.monotonic(), coming)
    after, end = engine.stats(), time.monotonic()
    counted = {name for name, at in crowd.arrivals.items() if start <= at < end}
    crowd.run(_LAST_LOOK_S, coming)
    left = end + timing.drain - time.monotonic()
    crowd.run(left, coming, until=lambda: counted <= crowd.first_tokens())
    window = Window(start, end, timing.blocks, time.monotonic())
    observed = observe(tuple(crowd.seen), tuple(crowd.launches), crowd.arrivals, window)
    launches = account(tuple(crowd.launches), window)
    crowd.clear()
    earlier = dict(before.decisions)
    return _head(experiment) | {
        "cell": asdict(cell),
        "split": experiment.config.split,
        "capacity": experiment.task.capacity,
        "window_s": end - start,
        "load_average": round(os.getloadavg()[0], 2),
        "offered_tokens_per_s": round(crowd.tokens_of(counted) / (end - start), 1),
        "blocks": [block.to_json() for block in observed.blocks],
        "victims_decoding": round(observed.decoding, 2),
        "pauses_ms": _spread(observed.pauses_ms),
        "answer_gaps_ms": _spread(observed.answer_gaps_ms),
        "prefix_hits": after.prefix_hits - before.prefix_hits,
        "preemptions": after.preemptions - before.preemptions,
        "waiting_at_end": after.waiting,
        "decisions": {why: count - earlier.get(why, 0) for why, count in after.decisions},
        "launches": launches,
        "prediction_error": after.prediction_error,
        "predictions_trusted": after.predictions_trusted,
    }


def _head(experiment: Experiment) -> dict[str, Any]:
    task = experiment.task
    return {
        "benchmark": "duet",
        "simulation": experiment.backend.is_simulation,
        "backend": task.backend,
        "is_brief": task.is_brief,
        "start_s": experiment.start_s,
        "rung": str(experiment.engine.rung),
        **task.profiles.to_json(),
        "command": task.command,
        "commit": experiment.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _spread(values: list[float]) -> dict[str, float | int]:
    """Few numbers for many, as ranks."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "worst": 1.0}
    ranks = {name: ordered[min(int(q * len(ordered)), len(ordered) - 1)] for name, q in at.items()}
    return {"count": len(ordered), **{name: round(value, 2) for name, value in ranks.items()}}


def measure_capacity(experiment: Experiment) -> dict[str, Any]:
    """Prompt tokens/s with nothing else to do; and a decode step of the victims, alone.

    objective_scale: what an objective's milliseconds are multiplied by. start_s: of the engine
    alone. SystemExit says what was not seen.
    """
    head = _head(experiment)
    crowd, load, timing = experiment.crowd, experiment.load, experiment.task.timing
    lengths = attackers(load, load.mean_prompt * 1e4, 1.0, CAPACITY_SEED)

    def prefiller(place: int, number: int) -> NewRequest:
        nth = place + number * PREFILLING
        tokens = lengths[nth % len(lengths)].prompt
        prompt = random_prompt(experiment.engine.vocab_size, tokens, 1, CAPACITY_SEED, nth)
        return NewRequest(f"prompt{place}-{number}", prompt, 1, SamplingParams(seed=nth))

    for place in range(PREFILLING):
        crowd.keep(f"prompt{place}", partial(prefiller, place))
    crowd.run(timing.settle)
    start = time.monotonic()
    crowd.run(timing.window)
    crowd.wait(
        "no launch with prompts has ended",
        lambda: any(each.prompt_tokens and each.ended > start for each in crowd.launches),
    )
    end = time.monotonic()
    window = Window(start, end, 1, end)
    observed = observe(tuple(crowd.seen), tuple(crowd.launches), {}, window)
    crowd.leave()
    experiment.fill()
    crowd.forget()
    crowd.run(timing.warm_up + timing.settle)
    crowd.wait(
        "not all victims have decoded at once, with no prompt beside them",
        lambda: any(_is_decoding(each, load) for each in crowd.launches),
    )
    steps = [each.measured_ms / each.k for each in crowd.launches if _is_decoding(each, load)]
    step_ms = _spread(steps)["p50"]
    scale = step_ms / REFERENCE_STEP_MS if experiment.backend.is_scaled else 1.0
    prefill = observed.blocks[0].prompt_tokens / (end - start)
    return head | {
        "prefill_tokens_per_s": round(prefill, 1),
        "decode_step_ms": round(step_ms, 4),
        "objective_scale": round(scale, 6),
    }


def _is_decoding(launch: CompletedLaunch, load: Load) -> bool:
    """Whether it was of all victims alone."""
    return launch.decode_rows == load.victims and not launch.prompt_tokens


def main() -> None:
    """Does a task; prints a line for every cell."""
    task = Task.from_json(sys.argv[1])
    began, results = time.monotonic(), Results(Path(task.out))
    experiment = Experiment(task)
    try:
        if not task.cells:
            results.write("capacity", measure_capacity(experiment))
        else:
            run_cells(experiment, results, began + task.seconds)
    finally:
        experiment.engine.shutdown(timeout=30)


def run_cells(experiment: Experiment, results: Results, deadline: float) -> None:
    """Those for which there is time."""
    task = experiment.task
    experiment.fill()
    settle = experiment.attack(100, task.timing.settle, SETTLING_SEED)
    experiment.crowd.run(task.timing.settle, settle)
    experiment.crowd.clear()
    for rate, seed in task.cells:
        if time.monotonic() + task.timing.cell > deadline:
            return
        cell = Cell(task.variant, rate, seed)
        results.write(cell.name, measure_cell(experiment, cell))
        print(f"  {cell.name}", flush=True)


if __name__ == "__main__":
    main()
