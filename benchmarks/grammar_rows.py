"""What answers under a grammar cost: themselves, the rows beside them, and a mask by itself.

Rows decode together on the demo model, some of them under a JSON schema; runs with and without
them alternate in one process. Then masks of the schema are computed token by token for the demo's
vocabulary and for one of 131,072 made-up tokens. Then rows decode on a simulated device of 10 ms a
step, more and more of them under the schema; and in launches of 8 steps while prompts prefill
beside them: are gaps within the objective? Last line: one JSON document.

    python benchmarks/grammar_rows.py [--rows 16] [--grammars 1 4] [--repeats 5]
"""

import argparse
import json
import math
import os
import platform
import queue
import random
import statistics
import string
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import tokenizers
from checkout import commit
from tokenizers import decoders, models, pre_tokenizers

from duetjax.build import LoadedModel, ModelRequest, load
from duetjax.config import EngineConfig, SamplingParams
from duetjax.constrain.follower import Follower, vocabulary
from duetjax.constrain.grammars import json_grammar
from duetjax.policy.request import Constraint, NewRequest, StepOutputs
from duetjax.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "size": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["river", "lake", "sea"]},
        },
        "required": ["name", "size", "kind"],
        "additionalProperties": False,
    },
}
"""Long enough that answers end by their max_tokens."""
TOKENS = 200
GAPS = 400
STEP_MS = 5.0
OBJECTIVE_MS = 50.0
SHARED_STEP_MS, SHARED_ROWS, SHARES = 10.0, 64, (0, 16, 32, 48, 64)
LARGE = 2**17


class Rows:
    """Decodes rows together and tells the mean milliseconds between tokens of both kinds."""

    def __init__(self, model: LoadedModel, rows: int) -> None:
        self._model, self._rows = model, rows
        self._outputs: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
        self._constraint = Constraint(grammar())
        self._calls = 0
        model.engine.start(self._outputs.put)

    def run(self, constrained: int) -> tuple[float, float]:
        """Of plain rows, while there are others, and of those; NaN where there are none."""
        self._calls += 1
        times: dict[str, list[float]] = {}
        live = [self._request(row, row < constrained) for row in range(self._rows)]
        for new in live:
            times[new.id] = []
            self._model.engine.submit(new)
        waiting = {new.id for new in live}
        while waiting:
            outputs, now = self._outputs.get(), time.perf_counter()
            for output in outputs:
                times[output.id] += [now] * len(output.token_ids)
                if output.finish is not None:
                    waiting.discard(output.id)
        rows = [times[new.id] for new in live]
        end = max((row[-1] for row in rows[:constrained]), default=math.inf)
        plain = [_mean_ms([at for at in row if at <= end]) for row in rows[constrained:]]
        return _mean(plain), _mean([_mean_ms(row) for row in rows[:constrained]])

    def _request(self, row: int, is_constrained: bool) -> NewRequest:
        prompt = tuple(range(20 + row, 60 + row))
        # Under the grammar half of them, so that all of them come beside plain rows.
        tokens = TOKENS // 2 - 1 if is_constrained else TOKENS
        params = SamplingParams(seed=row, max_tokens=tokens, ignore_eos=not is_constrained)
        [new] = self._model.new_requests(f"{self._calls}-{row}", prompt, params)
        return replace(new, constraint=self._constraint if is_constrained else None)


def grammar() -> str:
    """Of SCHEMA."""
    return json_grammar(SCHEMA, max_bytes=2**16, max_depth=64, param="schema")


def mask_us(tokenizer_json: str, size: int, eos: list[int]) -> list[float]:
    """Microseconds from each token of an answer to the mask of the next one."""
    words = vocabulary(tokenizer_json, size, eos)
    follower, dice, took = Follower("", Constraint(grammar()), words), random.Random(0), []
    permit = follower.begin()
    for _ in range(TOKENS):
        token = dice.choice([i for i in range(size) if permit.mask[i // 8] >> i % 8 & 1])
        began = time.perf_counter()
        following = follower.sampled(token)
        took.append(1e6 * (time.perf_counter() - began))
        assert following is not None, "each token needs a permit"
        assert not following.error, following.error
        permit = following
    return took


def made_up(size: int) -> str:
    """A byte-level tokenizer of so many tokens: bytes, and random words of one to ten letters."""
    dice, vocab = (
        random.Random(1),
        {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())},
    )
    marks = ["", "\u0120", "\u0120", '"', "_", "."]
    while len(vocab) < size - 1:
        word = "".join(dice.choices(string.ascii_letters + string.digits, k=dice.randint(1, 10)))
        vocab.setdefault(dice.choice(marks) + word, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return str(tokenizer.to_str())


def simulated(step_ms: tuple[float, float], rows: int, **settings: Any) -> LoadedModel:
    """The demo's tokenizer on a device that sleeps: so long a decode step, a prefill launch."""
    return load(
        ModelRequest(),
        EngineConfig(
            device="sim",
            sim_step_ms=step_ms,
            max_num_seqs=rows,
            enable_prefix_caching=False,
            **settings,
        ),
    )


def by_share() -> list[dict[str, float]]:
    """Tokens per second while all rows decode, so many of them under the grammar."""
    model = simulated((SHARED_STEP_MS, 60.0), SHARED_ROWS, policy="aggregated")
    rows, found = Rows(model, SHARED_ROWS), []
    for constrained in SHARES:
        plain_ms, grammar_ms = rows.run(constrained)
        told = {"grammars": constrained, "tokens_per_s": 0.0}
        for name, count, ms in (
            ("plain_ms", SHARED_ROWS - constrained, plain_ms),
            ("grammar_ms", constrained, grammar_ms),
        ):
            if count:
                told |= {name: ms, "tokens_per_s": told["tokens_per_s"] + 1e3 * count / ms}
        found.append(told)
    model.engine.shutdown(10)
    return found


def beside_prompts(rows: int, constrained: int) -> dict[str, float]:
    """Gaps in ms on a simulated device: 5 ms a decode step, k = 8, prompts coming all the time."""
    model = simulated((STEP_MS, 60.0), rows + 4, policy="static-split", look_ahead=8)
    outputs: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
    model.engine.start(outputs.put)
    ks: list[int] = []
    model.engine.watch_launches(
        lambda launches: ks.extend(each.k for each in launches if each.program == "decode")
    )
    constraint, times, waiting = Constraint(grammar()), dict[str, list[float]](), set[str]()
    for row in range(rows):
        is_constrained = row < constrained
        tokens = GAPS // 16 - 2 if is_constrained else GAPS  # one every other launch
        params = SamplingParams(seed=row, max_tokens=tokens, ignore_eos=not is_constrained)
        [new] = model.new_requests(f"row {row}", (7,) * 200, params)
        times[new.id] = []
        waiting.add(new.id)
        model.engine.submit(replace(new, constraint=constraint if is_constrained else None))
    began, number = time.perf_counter(), 0
    while waiting:
        if time.perf_counter() - began > 0.2 * number:
            number += 1
            params = SamplingParams(seed=number, max_tokens=1)
            [prompt] = model.new_requests(f"prompt {number}", (9,) * 3000, params)
            model.engine.submit(prompt)
        outputs_now, now = outputs.get(), time.perf_counter()
        for output in outputs_now:
            if output.id in times:
                times[output.id] += [now] * len(output.token_ids)
            if output.finish is not None:
                waiting.discard(output.id)
    model.engine.shutdown(10)
    gaps = [sorted(1e3 * (b - a) for a, b in pairwise(each)) for each in times.values()]
    own, plain = gaps[:constrained], sorted(gap for each in gaps[constrained:] for gap in each)
    under = sorted(gap for each in own for gap in each)
    told = {"mean_k": statistics.fmean(ks)}
    for name, each in (("plain", plain), ("grammar", under)):
        if each:
            told[f"{name}_p99_ms"] = each[int(0.99 * len(each))]
            told[f"{name}_met"] = sum(gap <= OBJECTIVE_MS for gap in each) / len(each)
    return told


def _mean_ms(times: Sequence[float]) -> float:
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def main() -> None:
    """Prints facts, then the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--grammars", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = load(ModelRequest(), EngineConfig(max_num_seqs=args.rows))
    assert isinstance(model.tokenizer, Tokenizer)
    rows = Rows(model, args.rows)
    found: dict[int, list[tuple[float, float]]] = {n: [] for n in (0, *args.grammars)}
    for count in found:
        rows.run(count)  # warm
    for _ in range(args.repeats):
        for count, runs in found.items():
            runs.append(rows.run(count))
    model.engine.shutdown(10)
    plain = statistics.median(run[0] for run in found[0])
    print(
        f"{args.rows} rows, {TOKENS} tokens each; milliseconds between tokens,"
        f" medians of {args.repeats}"
    )
    cells = []
    for count, runs in found.items():
        beside = statistics.median(run[0] for run in runs)
        own = statistics.median(run[1] for run in runs) if count else None
        cells.append({"grammars": count, "plain_ms": beside, "grammar_ms": own})
        told = "" if own is None else f", under the grammar {own:.2f} ({own / beside:.2f} x)"
        print(f"{count:3} under a grammar: plain rows {beside:.2f} ({beside / plain:.2f} x){told}")
    masks = []
    eos = list(model.generation.eos_token_ids)
    for name, text, size, ends in (
        ("demo", model.tokenizer.to_json(), model.config.vocab_size, eos),
        ("made up", made_up(LARGE), LARGE, [LARGE - 1]),
    ):
        took = sorted(mask_us(text, size, ends))
        median, late = took[len(took) // 2], took[int(0.99 * len(took))]
        masks.append({"vocabulary": size, "median_us": median, "p99_us": late})
        print(f"a mask, vocabulary of {size} ({name}): median {median:.0f} us, 99 % {late:.0f} us")
    print(f"simulated, {SHARED_STEP_MS:g} ms a step, {SHARED_ROWS} rows:")
    shares = by_share()
    for each in shares:
        print(", ".join(f"{name} {value:.4g}" for name, value in each.items()))
    print(f"simulated, {STEP_MS:g} ms a step, objective {OBJECTIVE_MS:g} ms, prompts coming:")
    beside_prefill = {count: beside_prompts(args.rows, count) for count in (0, 1)}
    for count, told in beside_prefill.items():
        facts = ", ".join(f"{name} {value:.3g}" for name, value in told.items())
        print(f"{count:3} under a grammar: {facts}")
    document = {
        "simulated": beside_prefill,
        "by_share": shares,
        "benchmark": "grammar_rows",
        "rows": args.rows,
        "cells": cells,
        "masks": masks,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "commit": commit(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
