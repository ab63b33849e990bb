"""The items that show whether XLA's programs can be captured, replayed and run side by side."""

import time
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gpu.bench import FEW_SPLITS, PATIENCE_S, SPLITS, Bench, strays
from gpu.decoder import Shape, first_tokens
from gpu.driver import microseconds
from gpu.recorded import Captured, Model, addresses

if TYPE_CHECKING:
    from duetjax._launcher import Device

SHAPE = Shape()
STEPS = 12
BUSY_MS = 30.0
"""How long each side of a race takes alone, about."""


def capture(bench: Bench) -> None:
    """J2: what a capture of XLA's programs contains and what it leaves alone."""
    model = Model(bench, SHAPE, ("decode", "prefill"))
    model.decoded(salt=0, steps=3)
    model.run("prefill", model.prefill_state())
    with bench.open(FEW_SPLITS) as device:
        states = {"prefill": model.prefill_state(), "decode": model.decode_state(salt=1)}
        for name, state in states.items():
            bench.attempt(name, _capture, bench, model, device, name, state)


def _capture(
    bench: Bench, model: Model, device: "Device", name: str, state: tuple[jax.Array, ...]
) -> None:
    content = [np.asarray(layer).view(np.uint16) for layer in model.kv]
    before, written = addresses(model.kv), sum(int(layer.any()) for layer in content)
    began = time.perf_counter()
    captured = model.capture(device, name, state)
    took_ms = round(microseconds(began) / 1000, 1)
    program = captured.program
    bench.note(**{f"{name}_census": program.census, f"{name}_capture_ms": took_ms})
    after = addresses(model.kv)
    bench.expect(after == before, f"{name}: KV was at {before}, is at {after}")
    outputs = after + addresses(captured.outputs)
    seen = list(program.outputs)
    bench.expect(seen == outputs, f"{name}: the marker saw {seen}, XLA's outputs are {outputs}")
    kernels = program.census["kernels"]
    bench.expect(kernels > 10, f"{name}: only {kernels} kernels were recorded")
    bench.expect(written == len(content), f"{name}: only {written} layers of KV held anything")
    again = [np.asarray(layer).view(np.uint16) for layer in model.kv]
    same = all(np.array_equal(a, b) for a, b in zip(content, again, strict=True))
    bench.expect(same, f"{name}: the capture changed the KV arrays' content")


def temporaries(bench: Bench) -> None:
    """J3: after a capture the memory of XLA's temporaries can be taken again, all of it."""
    model = Model(bench, SHAPE, ("decode", "prefill"))
    model.decoded(salt=0, steps=2)
    model.run("prefill", model.prefill_state())
    with bench.open(FEW_SPLITS) as device:
        held = []
        for name in sorted(model.temp_bytes, key=lambda each: -model.temp_bytes[each]):
            state = model.decode_state(1) if name == "decode" else model.prefill_state()
            captured = model.capture(device, name, state, hold=False)
            held.append(captured)
            bench.attempt(name, _take_again, bench, model, name, captured)
        apart = [each.program for each in held]
        bench.attempt("both at once", apart[0].check_apart, apart[1])


def _take_again(bench: Bench, model: Model, name: str, captured: Captured) -> None:
    captured.hold = model.take_hold(name)  # before anything else can take it
    hold, size = captured.hold, captured.temp_bytes
    captured.hold = None
    known = [*model.shared_ranges(), *captured.ranges()]
    captured.hold = hold
    wanted = sorted(strays(captured.program, known))
    bench.note(**{f"{name}_temp_bytes": size, f"{name}_stray_addresses": len(wanted)})
    if wanted:
        bench.note(**{f"{name}_strays_span": wanted[-1] - wanted[0]})
    start = hold.unsafe_buffer_pointer() if hold is not None else 0
    outside = [address for address in wanted if not start <= address < start + size]
    lowest = hex(wanted[0]) if wanted else "none"
    bench.expect(
        not outside,
        f"{name}: {len(outside)} of {len(wanted)} stray addresses, from {lowest}, are outside"
        f" the hold of {size} bytes at {start:#x}",
    )
    left = model.check(captured)
    bench.expect(not left, f"{name}: {len(left)} addresses are nobody's")


def tokens(bench: Bench) -> None:
    """J4: steps replayed on every split, with feedback copies, give plain JAX's tokens."""
    model = Model(bench, SHAPE, ("decode",))
    reference = [model.decoded(salt, STEPS) for salt in range(len(SPLITS) + 1)]
    bench.note(distinct_tokens=len(np.unique(np.stack(reference))))
    for lists in (False, True):
        way = "lists" if lists else "graphs"
        bench.attempt(way, _replay, bench, model, reference, way, lists)


def feed_back(captured: Captured) -> None:
    """What decode puts out becomes its input, and its tokens the result."""
    token, position, _ = captured.state
    next_token, next_position, _ = captured.outputs
    for target, source in ((token, next_token), (position, next_position)):
        captured.program.add_copy(
            target.unsafe_buffer_pointer(), source.unsafe_buffer_pointer(), source.nbytes
        )
    captured.program.add_result(next_token.unsafe_buffer_pointer(), next_token.nbytes)


def restart(bench: Bench, device: "Device", captured: Captured, split: int, salt: int) -> None:
    """Sets decode's tokens and positions back, before the lane's next launch."""
    token, position, _ = captured.state
    fresh = (first_tokens(SHAPE, salt), np.zeros(SHAPE.rows, np.int32))
    for array, values in zip((token, position), fresh, strict=True):
        address = array.unsafe_buffer_pointer()
        device.copy_in(bench.launcher.DECODE, split, address, values.tobytes())


def results(bench: Bench, device: "Device", lane: int, steps: range) -> list[Any]:
    """Tokens of some steps, each taken when it has completed."""
    found = []
    for step in steps:
        if not device.wait(lane, step, PATIENCE_S):
            raise TimeoutError(f"step {step} did not complete; {device.completed(lane)} did")
        found.append(np.frombuffer(device.result(lane, step), np.int32))
    device.release(lane, steps[-1])
    return found


def _replay(bench: Bench, model: Model, reference: list[Any], way: str, lists: bool) -> None:
    decode = bench.launcher.DECODE
    model.kv = model.empty_kv()  # a replay that wrote no keys must show
    model.run("decode", model.decode_state(0))
    with bench.open(SPLITS, replay_lists=lists) as device:
        captured = model.capture(device, "decode", model.decode_state(0))
        feed_back(captured)
        outside = model.check(captured)
        bench.note(**{f"{way}_addresses_of_nobody": len(outside)})
        began = time.perf_counter()
        for split in range(len(device.splits)):
            captured.program.build(decode, split)
        bench.note(**{f"{way}_build_ms": round(microseconds(began) / 1000 / len(device.splits), 2)})
        step_us = {}
        for split, wanted in enumerate(reference):
            restart(bench, device, captured, split, split)
            began = time.perf_counter()
            last = captured.program.launch(decode, split, STEPS, 1)
            got = np.stack(results(bench, device, decode, range(last - STEPS + 1, last + 1)))
            step_us[split] = round(microseconds(began) / STEPS)
            wrong = int((got != wanted).sum())
            bench.expect(
                wrong == 0, f"{way}, split {split}: {wrong} of {got.size} tokens are not JAX's"
            )
        bench.note(**{f"{way}_step_us": step_us})


class Race:
    """Decode steps and prefills on the two lanes of one split."""

    def __init__(
        self, bench: Bench, device: "Device", pair: tuple[Captured, Captured], split: int
    ) -> None:
        self._bench, self._device, self._split = bench, device, split
        self._decode, self._prefill = pair
        self._lanes = bench.launcher.DECODE, bench.launcher.PREFILL
        for lane, captured in zip(self._lanes, pair, strict=True):
            captured.program.build(lane, split)

    def start(self, steps: int, prompts: int) -> tuple[range, range]:
        """Enqueues steps from the same beginning; returns their numbers."""
        decode, prefill = self._lanes
        if steps:
            restart(self._bench, self._device, self._decode, self._split, 3)
        q = self._prefill.program.launch(prefill, self._split, prompts, 1) if prompts else 0
        p = self._decode.program.launch(decode, self._split, steps, 1) if steps else 0
        return range(p - steps + 1, p + 1), range(q - prompts + 1, q + 1)

    def run(self, steps: int, prompts: int) -> tuple[float, list[Any], list[Any]]:
        """Milliseconds until all is done, decode's tokens and the prompts'."""
        began = time.perf_counter()
        p, q = self.start(steps, prompts)
        decode, prefill = self._lanes
        decoded = results(self._bench, self._device, decode, p) if steps else []
        prefilled = results(self._bench, self._device, prefill, q) if prompts else []
        return microseconds(began) / 1000, decoded, prefilled

    def paces(self, steps: int, prompts: int) -> list[float]:
        """Milliseconds of each decode step that began and ended beside prefill."""
        decode, prefill = self._lanes
        device, ends = self._device, []
        p, q = self.start(steps, prompts)
        for step in p:
            device.wait(decode, step, PATIENCE_S)
            if device.completed(prefill) >= q[-1]:
                break
            ends.append(time.perf_counter())
        device.wait(decode, p[-1], PATIENCE_S)
        device.release(decode, p[-1])
        self._bench.finish(device, prefill, q[-1])
        return [1000 * (b - a) for a, b in pairwise(ends)]


def concurrency(bench: Bench) -> None:
    """E4, J5: the lanes of a split run at the same time, and decode keeps its pace."""
    model = Model(bench, SHAPE, ("decode", "prefill"))
    model.decoded(salt=0, steps=2)
    model.run("prefill", model.prefill_state())
    with bench.open(FEW_SPLITS, result_slots=512) as device:
        prefill = model.capture(device, "prefill", model.prefill_state())
        decode = model.capture(device, "decode", model.decode_state(3))
        feed_back(decode)
        token = prefill.outputs[0]
        prefill.program.add_result(token.unsafe_buffer_pointer(), token.nbytes)
        for captured in (prefill, decode):
            left = model.check(captured)
            bench.expect(not left, f"{len(left)} addresses are nobody's: see J3")
        bench.attempt("apart", decode.program.check_apart, prefill.program)
        for split in range(len(device.splits)):
            race = Race(bench, device, (decode, prefill), split)
            sms = device.splits[split][1:]
            bench.attempt(f"split {split}", _race, bench, race, split, sms)


def _race(bench: Bench, race: Race, split: int, sms: tuple[int, int]) -> None:
    race.run(8, 2)
    step_ms, prompt_ms = race.run(32, 0)[0] / 32, race.run(0, 4)[0] / 4
    steps = min(400, max(8, round(BUSY_MS / step_ms)))
    prompts = min(100, max(2, round(BUSY_MS / prompt_ms)))
    decoding = median(race.run(steps, 0)[0] for _ in range(3))
    prefilling = median(race.run(0, prompts)[0] for _ in range(3))
    both = median(race.run(steps, prompts)[0] for _ in range(3))
    _, *wanted = race.run(steps, prompts)
    _, *got = race.run(steps, prompts)
    _, decoded, _ = race.run(steps, 0)
    _, _, prefilled = race.run(0, prompts)
    alone = decoded, prefilled
    for other, name in ((got, "again"), (alone, "alone")):
        for kind, a, b in zip(("decode", "prefill"), wanted, other, strict=True):
            same = np.array_equal(np.stack(a), np.stack(b))
            bench.expect(same, f"split {split}: {kind}'s tokens beside the other lane and {name}")
    pace = sorted(race.paces(min(400, 2 * steps), min(100, 2 * prompts)))
    beside = [round(pace[0], 3), round(median(pace), 3), round(pace[-1], 3)] if pace else []
    bench.note(
        **{
            f"split_{split}": {
                "sms": f"{sms[0]}/{sms[1]}",
                "steps": steps,
                "prompts": prompts,
                "decode_ms": round(decoding, 2),
                "prefill_ms": round(prefilling, 2),
                "together_ms": round(both, 2),
                "of_one_after_the_other": round(both / (decoding + prefilling), 3),
                "step_alone_ms": round(decoding / steps, 3),
                "step_beside_prefill_ms": beside,
            }
        }
    )
    if split:
        limit = 0.85 * (decoding + prefilling)
        bench.expect(both < limit, f"split {split}: together {both:.1f} ms, over {limit:.1f}")
