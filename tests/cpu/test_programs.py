"""Launches on the device's slot state against a sequential oracle, whatever their order.

The oracle knows one request at a time: a dense pass over its whole text, then the sampler. Where
rounding could tip a draw it accepts what either side of the rounding would have drawn.
"""

import random
from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.config import ModelConfig, SamplingParams
from duetjax.model.decoder import Definition, causal_attention
from duetjax.model.kv_pages import KVLayout
from duetjax.model.sampling import sample
from duetjax.policy.launch import Launch, Program, RowFlag, SlotParams, pack
from duetjax.runtime.compiler import Compiler
from duetjax.runtime.executor import JaxDevice
from duetjax.runtime.programs import Buckets, Programs
from duetjax.runtime.slot_state import PARAMS, HostTables, SlotShapes, unpack
from duetjax.runtime.store import ProgramStore, default_folder
from duetjax.runtime.target import local_target
from pallas_kernels import xla

MODEL = "llama-biases"
PAGE, SLOTS, WIDTH, LONGEST = 16, 4, 4, 64
ROUNDING = 1e-4


@cache
def config():
    return ModelConfig.from_hf(tiny.CONFIGS[MODEL])


@cache
def definition():
    return Definition(config(), jnp.float32)


@cache
def weights():
    fused = dict(definition().fusion.fuse(tiny.weights(tiny.CONFIGS[MODEL])))
    return definition().ordered({name: jnp.asarray(value) for name, value in fused.items()})


@cache
def programs():
    layout = KVLayout.of(config(), SLOTS * WIDTH + 1, PAGE, "float32")
    slots = SlotShapes(SLOTS, WIDTH, config().vocab_size)
    buckets = Buckets(decode=(2, 4), prefill=(16, 48), prefill_rows=3)
    return Programs(config(), layout, slots, buckets, local_target(), xla)


@cache
def executables():
    made = Compiler(local_target(), ProgramStore(default_folder())).compile(programs().lowered())
    return {key: program.executable for key, program in made}


def executor(leaves=None):
    return JaxDevice(programs(), executables(), leaves or weights())


@jax.jit
def dense_logits(leaves, tokens, last):
    decoder = definition().bind(leaves)
    hidden = decoder(tokens, jnp.arange(LONGEST), causal_attention)
    return decoder.logits(hidden[last][None])


jitted_sample = jax.jit(sample)
jitted_unpack = jax.jit(unpack)


@dataclass
class Row:
    """What a slot should hold. tokens: fed and to be fed; num_fed: whose KV is written."""

    slot: int
    sampling: SamplingParams
    num_prompt: int
    tokens: list[int]
    stop_ids: tuple[int, ...]
    limit: int
    num_fed: int = 0
    stopped: bool = False
    pages: list[int] = field(default_factory=list)

    @property
    def is_prefilling(self):
        return self.num_fed < self.num_prompt and len(self.tokens) == self.num_prompt

    @property
    def is_active(self):
        return not self.is_prefilling and not self.stopped and self.num_fed < self.limit

    def params(self):
        history = tuple(self.tokens) if self.sampling.has_penalties else ()
        return SlotParams(self.slot, self.sampling, self.stop_ids, self.num_prompt, history)

    def draws(self):
        """What may be drawn after the tokens so far, and the logprobs by rounding up and down."""
        padded = np.zeros(LONGEST, np.int32)
        padded[: len(self.tokens)] = self.tokens
        logits = np.asarray(dense_logits(weights(), padded, len(self.tokens) - 1))
        tables = HostTables(SlotShapes(0, WIDTH, config().vocab_size))
        tables.apply(Launch(0, Program.DECODE, 2, (0,), admitted=(replace(self.params(), slot=0),)))
        params, _ = jitted_unpack(tables.tables().params)
        counts = np.bincount(self.tokens[self.num_prompt :], minlength=config().vocab_size)
        noise = np.random.default_rng(0).uniform(-ROUNDING, ROUNDING, logits.shape)
        for shift in (0, noise, -noise):
            yield jitted_sample(
                (logits + shift).astype(np.float32),
                params,
                counts[None].astype(np.int16),
                tables.tables().prompt_mask,
                tables.tables().allowed,
                np.array([len(self.tokens)], np.int32),
            )

    def check(self, token, flags, logprob):
        """Takes over a token that the device has sampled."""
        same = next((drawn for drawn in self.draws() if int(drawn.token[0]) == token), None)
        assert same is not None
        assert logprob == pytest.approx(float(same.logprob[0]), abs=1e-3)
        self.tokens.append(token)
        self.stopped = token in self.stop_ids
        wanted = RowFlag.SAMPLED
        wanted |= RowFlag.STOPPED if self.stopped else RowFlag(0)
        wanted |= RowFlag.AT_LIMIT if self.num_fed >= self.limit else RowFlag(0)
        assert flags == wanted


class Machine:
    """Draws launches at random, runs them, and holds every row against its oracle."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.executor = executor()
        self.rows = {}
        self.free_pages = list(range(1, SLOTS * WIDTH + 1))
        self.dice.shuffle(self.free_pages)

    def step(self):
        deltas = self.deltas()
        decoding = [row for row in self.rows.values() if not row.is_prefilling]
        prefilling = [row for row in self.rows.values() if row.is_prefilling]
        if prefilling and (not decoding or self.dice.random() < 0.6):
            self.prefill(prefilling, decoding, deltas)
        else:
            self.decode(decoding, deltas)

    def deltas(self):
        """Ends some rows, admits others, raises limits: what a scheduler may do in between."""
        for slot in list(self.rows):
            done = not self.rows[slot].is_active and not self.rows[slot].is_prefilling
            if (done and self.dice.random() < 0.7) or self.dice.random() < 0.05:
                self.free_pages += self.rows.pop(slot).pages
        admitted = []
        for slot in range(SLOTS):
            if slot not in self.rows and (not self.rows or self.dice.random() < 0.6):
                admitted.append(self.admit(slot))
        limits = [(row.slot, row.limit) for row in admitted]
        for row in self.rows.values():
            if not row.stopped and self.dice.random() < 0.3:
                row.limit = min(WIDTH * PAGE - 1, row.limit + self.dice.randrange(6))
                limits.append((row.slot, row.limit))
        return {
            "admitted": tuple(row.params() for row in admitted),
            "pages": tuple((r.slot, i, page) for r in admitted for i, page in enumerate(r.pages)),
            "limits": tuple(limits),
        }

    def admit(self, slot):
        dice, vocab = self.dice, config().vocab_size
        prompt = [dice.randrange(vocab) for _ in range(dice.randrange(1, 40))]
        sampling = SamplingParams(
            seed=dice.getrandbits(62),
            temperature=dice.choice((0.0, 0.7, 1.5)),
            top_k=dice.choice((0, 5)),
            top_p=dice.choice((1.0, 0.8)),
            repetition_penalty=dice.choice((1.0, 1.3)),
            presence_penalty=dice.choice((0.0, 0.9)),
            logit_bias=dice.choice((None, {3: 4.0, 5: -100.0})),
            min_tokens=dice.choice((0, 4)),
        )
        stop_ids = tuple(dice.sample(range(vocab), dice.choice((0, 8))))
        limit = len(prompt) + dice.randrange(0, 12)
        row = Row(slot, sampling, len(prompt), prompt, stop_ids, limit)
        row.pages = [self.free_pages.pop() for _ in range(WIDTH)]
        self.rows[slot] = row
        return row

    def decode(self, rows, deltas):
        rows = self.dice.sample(rows, self.dice.randint(1, len(rows)))
        bucket = next(b for b in (2, 4) if b >= len(rows))
        launch = Launch(
            0,
            Program.DECODE,
            bucket,
            tuple(r.slot for r in rows),
            k=self.dice.randint(1, 3),
            **deltas,
        )
        before = self.kv()
        ticket = self.executor.submit(launch)
        written = set()
        for i in range(launch.k):
            result = self.executor.result(ticket, i)
            for row, token, flags, logprob in zip(
                rows, result.tokens, result.flags, result.logprobs, strict=True
            ):
                written |= self.check_step(row, token, flags, logprob)
        self.check_writes(before, written)

    def prefill(self, prefilling, decoding, deltas):
        chunks = self.dice.sample(prefilling, self.dice.randint(1, min(2, len(prefilling))))
        room = min(3 - len(chunks), len(decoding))
        rows = chunks + self.dice.sample(decoding, self.dice.randint(0, room))
        self.dice.shuffle(rows)
        starts, counts, tokens, samples = [], [], [], []
        for row in rows:
            left = row.num_prompt - row.num_fed if row in chunks else 0
            count = min(left, self.dice.randint(1, 20)) if left else 0
            starts.append(row.num_fed if count else 0)
            counts.append(count)
            tokens += row.tokens[row.num_fed : row.num_fed + count]
            samples.append(count == left)
        size = sum(max(count, 1) for count in counts)
        launch = Launch(
            0,
            Program.PREFILL,
            next(b for b in (16, 48) if b >= size),
            tuple(row.slot for row in rows),
            starts=tuple(starts),
            counts=tuple(counts),
            packed=pack(tokens),
            samples=tuple(samples),
            **deltas,
        )
        before = self.kv()
        result = self.executor.result(self.executor.submit(launch))
        written = set()
        for i, row in enumerate(rows):
            outcome = result.tokens[i], result.flags[i], result.logprobs[i]
            if counts[i] == 0:
                written |= self.check_step(row, *outcome)
                continue
            fed = range(row.num_fed, row.num_fed + counts[i])
            written |= {(row.pages[position // PAGE], position % PAGE) for position in fed}
            row.num_fed += counts[i]
            if samples[i]:
                row.check(*outcome)
            else:
                assert result.flags[i] == 0
        self.check_writes(before, written)

    def check_step(self, row, token, flags, logprob):
        """One decoding step of a row; the places that it may have written."""
        if not row.is_active:
            assert flags == 0
            return set()
        place = row.pages[row.num_fed // PAGE], row.num_fed % PAGE
        row.num_fed += 1
        row.check(token, flags, logprob)
        return {place}

    def kv(self):
        return [np.array(layer) for layer in self.executor._chain._state.kv]

    def check_writes(self, before, written):
        """Every place but those of the tokens fed, and the dummy page, is as it was."""
        for old, new in zip(before, self.kv(), strict=True):
            changed = (old != new).any(axis=(1, 2, 4))
            changed[0] = False
            assert {tuple(place) for place in np.argwhere(changed)} <= written
            assert np.isfinite(new).all()


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None, database=None)
def test_any_interleaving_of_launches_gives_every_row_its_own_tokens(seed):
    machine = Machine(seed)
    for _ in range(25):
        machine.step()


def admit(slot, prompt, *, limit, first_page, **sampling):
    """A launch that computes a whole prompt in a slot, on WIDTH pages from first_page on."""
    params = SamplingParams(**{"temperature": 0.0, "seed": 1, **sampling})
    return Launch(
        0,
        Program.PREFILL,
        48,
        (slot,),
        starts=(0,),
        counts=(len(prompt),),
        packed=pack(prompt),
        samples=(True,),
        admitted=(SlotParams(slot, params, (), len(prompt)),),
        pages=tuple((slot, i, first_page + i) for i in range(WIDTH)),
        limits=((slot, limit),),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_k_steps_of_one_launch_are_bitwise_those_of_k_launches(temperature):
    seen = []
    for launches in ([4], [1, 1, 1, 1], [2, 2]):
        device = executor()
        for slot in range(3):
            prompt = tiny.prompt(MODEL, 10 + slot).tolist()
            first_page = 1 + slot * WIDTH
            launch = admit(slot, prompt, limit=60, first_page=first_page, temperature=temperature)
            device.result(device.submit(launch))
        steps = []
        for k in launches:
            ticket = device.submit(Launch(0, Program.DECODE, 4, (0, 1, 2), k=k, wants_top=True))
            steps += [device.result(ticket, i) for i in range(k)]
        seen.append((steps, [np.array(layer).tobytes() for layer in device._chain._state.kv]))
    assert seen[0] == seen[1] == seen[2]


def poisoned():
    """The weights, but token 7 embeds as NaN."""
    leaves = dict(zip(definition().fusion.leaves, weights(), strict=True))
    table = np.array(leaves["model.embed_tokens.weight"])
    table[7] = np.nan
    return definition().ordered({**leaves, "model.embed_tokens.weight": jnp.asarray(table)})


@pytest.mark.parametrize("place", [0, 5, 11], ids=["first", "middle", "last"])
def test_a_row_whose_logits_are_not_finite_ends_alone_and_its_pages_serve_the_next(place):
    healthy = [t for t in tiny.prompt(MODEL, 40).tolist() if t != 7][:12]
    sick = [7 if i == place else t for i, t in enumerate(healthy)]
    no_seven = {"logit_bias": {7: -100.0}}

    def play(device, second):
        device.result(device.submit(admit(0, healthy, limit=60, first_page=1, **no_seven)))
        result = device.result(device.submit(admit(1, second, limit=60, first_page=5, **no_seven)))
        ticket = device.submit(Launch(0, Program.DECODE, 2, (0, 1), k=3))
        return result, [device.result(ticket, i) for i in range(3)]

    _, wanted = play(executor(poisoned()), healthy)
    device = executor(poisoned())
    result, steps = play(device, sick)
    assert result.flags.tolist() == [RowFlag.NON_FINITE]
    assert [step.tokens[0] for step in steps] == [step.tokens[0] for step in wanted]
    assert [step.logprobs[0] for step in steps] == [step.logprobs[0] for step in wanted]
    assert [step.flags[1] for step in steps] == [0, 0, 0]
    heir = device.result(device.submit(admit(2, healthy, limit=60, first_page=5, **no_seven)))
    fresh = executor(poisoned())
    assert heir == fresh.result(fresh.submit(admit(0, healthy, limit=60, first_page=1, **no_seven)))


def test_a_chunk_that_is_not_finite_is_flagged_before_its_prompt_ends():
    device = executor(poisoned())
    launch = admit(0, [3, 7, 5], limit=60, first_page=1)
    result = device.result(device.submit(replace(launch, samples=(False,))))
    assert result.flags.tolist() == [RowFlag.NON_FINITE]


def test_parameters_keep_their_values_on_the_way_to_the_device():
    sampling = SamplingParams(
        seed=-(2**63) + 5, temperature=0.25, top_p=0.5, min_p=0.125, top_k=9,
        repetition_penalty=1.5, frequency_penalty=-0.5, presence_penalty=0.75,
        logit_bias={4: -1.5, 2: 3.0}, min_tokens=6,
    )  # fmt: skip
    tables = HostTables(SlotShapes(2, WIDTH, 40))
    new = SlotParams(1, sampling, stop_ids=(11, 12), num_prompt=3)
    tables.apply(Launch(0, Program.DECODE, 2, (1,), admitted=(new,), limits=((1, 30),)))
    params, limit = unpack(tables.tables().params)
    row = {name: np.asarray(value)[1].tolist() for name, value in params._asdict().items()}
    assert np.asarray(limit).tolist() == [0, 30, 0]
    assert row == {
        "temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "top_k": 9,
        "repetition_penalty": 1.5, "frequency_penalty": -0.5, "presence_penalty": 0.75,
        "seed": [2**31, 5], "min_position": 9,
        "stop_ids": [11, 12] + [-1] * 14,
        "bias_ids": [2, 4] + [-1] * 62, "bias_values": [3.0, -1.5] + [0.0] * 62,
    }  # fmt: skip
    assert set(row) | {"limit"} == set(PARAMS.names)


def test_rows_that_only_pad_a_bucket_ask_for_no_draws():
    """With the default temperature every step of a bucket that is not full would sample."""
    params = HostTables(SlotShapes(2, WIDTH, 40)).arrays()["params"].view(PARAMS)
    assert (params["temperature"] == 0).all()
