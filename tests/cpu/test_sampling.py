"""The sampler against a float64 oracle: exact where it is greedy, chi-square where it draws."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from sampling_oracle import Row, adjusted, distribution, log_softmax
from scipy.stats import chi2

from duetjax.model.sampling import RowParams, _bits, sample

NUM_STOPS, NUM_BIASES = 3, 6
LEAST_P_VALUE = 1e-4  # seeds are fixed: a failure is a change, not bad luck

sampled = jax.jit(sample, static_argnames="may_branch")


def packed(ids, V, beyond):
    """Bit mask [ceil(V / 32)] of ids; `beyond` sets the bits that no id has."""
    bits = np.full(-(-V // 32) * 32, beyond)
    bits[:V] = False
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def padded(values, size, filler, dtype):
    return np.array([*values, *[filler] * (size - len(values))], dtype)


def arguments(rows):
    """The sampler's arguments for some rows of one vocabulary."""
    V = len(rows[0].logits)
    each = lambda name, dtype: np.array([getattr(row, name) for row in rows], dtype)  # noqa: E731
    params = RowParams(
        temperature=each("temperature", np.float32),
        top_p=each("top_p", np.float32),
        min_p=each("min_p", np.float32),
        repetition_penalty=each("repetition", np.float32),
        frequency_penalty=each("frequency", np.float32),
        presence_penalty=each("presence", np.float32),
        top_k=each("top_k", np.int32),
        seed=each("seed", np.uint32),
        min_position=each("min_position", np.int32),
        stop_ids=np.stack([padded(r.stop_ids, NUM_STOPS, -1, np.int32) for r in rows]),
        bias_ids=np.stack([padded([v for v, _ in r.bias], NUM_BIASES, -1, np.int32) for r in rows]),
        bias_values=np.stack(
            [padded([b for _, b in r.bias], NUM_BIASES, 7, np.float32) for r in rows]
        ),
    )
    counts = np.zeros((len(rows), V), np.int16)
    for row, line in zip(rows, counts, strict=True):
        for v, count in row.counts.items():
            line[v] = count
    everything = range(V)
    allowed = [everything if row.allowed is None else row.allowed for row in rows]
    return (
        np.stack([row.logits for row in rows]).astype(np.float32),
        params,
        counts,
        np.stack([packed(row.prompt, V, True) for row in rows]),
        np.stack([packed(ids, V, True) for ids in allowed]),
        each("position", np.int32),
    )


def sampled_rows(rows):
    """The sampler's results for at most 16 rows, as numpy; padded, so that few shapes compile."""
    filled = [*rows, *[rows[-1]] * (16 - len(rows))]
    out, branched = (sampled(*arguments(filled), may_branch=may) for may in (False, True))
    jax.tree.map(np.testing.assert_array_equal, out, branched)
    return jax.tree.map(lambda a: np.asarray(a)[: len(rows)], out)


def draws(row, num, per_call=512):
    """Tokens of `num` independent draws of one row: seeds and positions count up."""
    one = arguments([row])
    repeated = jax.tree.map(lambda a: np.repeat(a, per_call, axis=0), one)
    tokens = []
    for start in range(0, num, per_call):
        n = np.arange(start, start + per_call)
        seed = np.stack([n % 5, n // 7], axis=1).astype(np.uint32)
        logits, params, *state, _ = repeated
        out = sampled(logits, params._replace(seed=seed), *state, row.position + n.astype(np.int32))
        assert out.is_finite.all()
        tokens.append(np.asarray(out.token))
    return np.concatenate(tokens)[:num]


def p_value(tokens, expected):
    """Of a chi-square test; ids in order of probability are pooled until 10 are expected."""
    order = np.argsort(-expected, kind="stable")
    order = order[expected[order] > 0]
    mass = expected[order] * len(tokens)
    seen = np.bincount(tokens, minlength=len(expected))[order]
    cell = np.floor(np.cumsum(mass) / 10 - 1e-9).astype(int)
    cell = np.unique(np.minimum(cell, cell[-1] - 1 if cell[-1] else 0), return_inverse=True)[1]
    mass, seen = np.bincount(cell, mass), np.bincount(cell, seen)
    return chi2.sf(((seen - mass) ** 2 / mass).sum(), max(len(mass) - 1, 1))


def check(row, num):
    expected = distribution(row)
    tokens = draws(row, num)
    outside = tokens[expected[tokens] == 0]
    assert outside.size == 0, f"drew {outside[:5]}, which the filters exclude"
    assert p_value(tokens, expected) > LEAST_P_VALUE


def normal(V, scale, seed=0):
    return (np.random.default_rng(seed).normal(size=V) * scale).astype(np.float32)


FILTERS = {
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.06},
    "penalties": {
        "repetition": 1.4,
        "frequency": 0.3,
        "presence": -0.5,
        "counts": {v: 1 + v % 3 for v in range(0, 90, 4)},
        "prompt": frozenset(range(0, 90, 3)),
    },
    "bias": {"bias": ((5, 2.5), (40, -9.0), (99, 1.5), (41, -100.0))},
    "mask": {
        "allowed": frozenset(v for v in range(100) if v % 5),
        "stop_ids": (7, 62),
        "min_position": 10**6,
    },
}


@pytest.mark.parametrize("absent", ["", "temperature"])
def test_every_combination_of_filters_draws_as_the_oracle_says(absent):
    kinds = [kind for kind in FILTERS if kind != "temperature"]
    start = {} if absent else FILTERS["temperature"]
    for chosen in itertools.product([False, True], repeat=len(kinds)):
        fields = dict(start)
        for kind, on in zip(kinds, chosen, strict=True):
            fields |= FILTERS[kind] if on else {}
        check(Row(normal(100, 2.0), **fields), num=512)


SHAPES = {
    "flat": np.zeros(100, np.float32),
    "one peak": np.where(np.arange(100) == 71, 20, 0).astype(np.float32),
    "steps of ties": (np.arange(100) // 10 * 0.5).astype(np.float32),
    "ties at the cut": np.array([3.0] * 4 + [2.0] * 40 + [1.0] * 56, np.float32),
    "two tokens": np.array([0.3, -0.2], np.float32),
    "far apart": np.linspace(-3e4, 3e4, 100).astype(np.float32),
    "one group": normal(64, 1.5),
    "just above one group": normal(65, 1.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 70, "min_p": 1e-3}]
)
def test_flat_peaked_and_tied_rows_draw_as_the_oracle_says(shape, filters):
    check(Row(SHAPES[shape], **filters), num=1024)


WIDE = {
    "everything": {},
    "top_p": {"top_p": 0.9},
    "low_top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.03},
    "min_p_then_top_p": {"min_p": 0.03, "top_p": 0.7},
    "top_k_as_many_as_candidates": {"top_k": 64},
    "top_k_just_beyond": {"top_k": 65},
    "top_k": {"top_k": 66 * 3},
    "top_k_beyond_groups": {"top_k": 1500},
    "top_k_then_top_p": {"top_k": 300, "top_p": 0.6},
    "few_kept": {"top_k": 20, "top_p": 0.7},
    "masked": {"allowed": frozenset(range(1, 4133, 2)), "top_p": 0.95},
}


@pytest.mark.parametrize("filters", WIDE)
def test_rows_that_keep_more_tokens_than_candidates_draw_as_the_oracle_says(filters):
    check(Row(normal(4133, 1.2), **WIDE[filters]), num=2048)


def test_more_than_64_equal_tokens_at_the_cut_are_all_drawn():
    logits = np.where(np.arange(4133) % 41 == 3, 2.0, 0.0).astype(np.float32)
    row = Row(logits, top_k=30)
    assert (distribution(row) > 0).sum() == 101
    check(row, num=2048)


def test_tokens_that_top_k_excludes_are_never_drawn_even_if_proposals_always_miss():
    logits = np.zeros(4133, np.float32)
    logits[:80] = np.linspace(1.0, 1.1, 80)  # in two groups: their maxima say little
    tokens = draws(Row(logits, top_k=80), 1024)
    assert tokens.max() < 80
    assert len(set(tokens.tolist())) >= 64


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_greedy_takes_the_greatest_adjusted_logit(seed):
    rng = np.random.default_rng(seed)
    rows = [random_greedy_row(rng) for _ in range(16)]
    out = sampled_rows(rows)
    for row, token in zip(rows, out.token, strict=True):
        logits = adjusted(row)
        assert np.isclose(logits[token], logits.max(), rtol=1e-6, atol=1e-6), row


def random_greedy_row(rng, V=100):
    some = lambda most: rng.choice(V, size=rng.integers(most + 1), replace=False)  # noqa: E731
    return Row(
        rng.normal(size=V).astype(np.float32) * 0.5,
        temperature=float(rng.choice([0.0, 9e-6])),
        top_p=0.01,
        top_k=int(rng.integers(0, 3)),
        repetition=float(rng.uniform(0.5, 2)),
        frequency=float(rng.uniform(-1, 1)),
        presence=float(rng.uniform(-1, 1)),
        counts={int(v): int(rng.integers(1, 5)) for v in some(80)},
        prompt=frozenset(some(80).tolist()),
        allowed=frozenset(rng.permutation(V)[: rng.integers(8, V)].tolist()),
        bias=tuple((int(v), float(rng.normal() * 2)) for v in some(NUM_BIASES)),
        stop_ids=tuple(int(v) for v in some(NUM_STOPS)),
        min_position=5,
        position=int(rng.integers(3, 7)),
    )


@pytest.mark.parametrize("V", [2, 100, 4133])
def test_greedy_takes_the_lowest_of_equal_ids(V):
    for greatest in ([1], [0, 1], range(V), range(1, V), range(V // 2, V)):
        logits = np.zeros(V, np.float32)
        logits[list(greatest)] = 1.5
        out = sampled_rows([Row(logits, temperature=0.0)])
        assert out.token.tolist() == [min(greatest)]


def test_a_stop_id_is_allowed_from_min_position_on():
    logits = np.zeros(100, np.float32)
    logits[[1, 2]] = 9.0, 1.0
    row = Row(logits, 0.0, stop_ids=(1,), min_position=5)
    rows = [dataclasses.replace(row, position=position) for position in (4, 5, 6)]
    assert sampled_rows(rows).token.tolist() == [2, 1, 1]


def test_a_bias_lets_no_forbidden_token_through():
    forbidden = {"stop_ids": (1,), "min_position": 9, "allowed": frozenset([1, 2, 3])}
    row = Row(normal(100, 1.0), 0.0, bias=((0, 100.0), (1, 100.0), (3, 50.0)), **forbidden)
    assert sampled_rows([row]).token.tolist() == [3]


def test_an_id_biased_twice_gets_both_and_unused_entries_bias_nothing():
    logits = np.zeros(100, np.float32)
    logits[[1, 99]] = 1.0, 1.25
    row = Row(logits, 0.0, bias=((2, 0.7), (2, 0.7)))
    assert sampled_rows([row]).token.tolist() == [2]


@pytest.mark.parametrize("V", [2, 19, 100, 4133])
def test_logprobs_are_those_of_the_raw_logits(V):
    rows = [Row(normal(V, 4.0, seed), 0.7, bias=((1, 3.0),)) for seed in range(4)]
    out = sampled_rows(rows)
    for row, token, logprob, ids, top in zip(rows, *out[:4], strict=True):
        expected = log_softmax(row.logits)
        assert len(ids) == min(20, V)
        np.testing.assert_allclose(logprob, expected[token], atol=2e-5)
        np.testing.assert_allclose(top, expected[ids], atol=2e-5)
        assert ids.tolist() == np.argsort(-expected)[:20].tolist()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_flagged_and_touches_no_neighbour(poison):
    rows = [Row(normal(100, 2.0, seed), 0.9, top_p=0.8, seed=(1, seed)) for seed in range(6)]
    clean = sampled_rows(rows)
    broken = rows[3].logits.copy()
    broken[[5, 80]] = poison
    rows[3] = dataclasses.replace(rows[3], logits=broken)
    out = sampled_rows(rows)
    assert out.is_finite.tolist() == [True, True, True, False, True, True]
    for before, after in zip(clean, out, strict=True):
        assert np.delete(before, 3, 0).tobytes() == np.delete(after, 3, 0).tobytes()


def test_a_row_of_nothing_but_nan_still_yields_an_id_of_the_vocabulary():
    rows = [Row(np.full(100, np.nan, np.float32), temperature) for temperature in (0.0, 1.0)]
    assert (sampled_rows(rows).token < 100).all()


def test_a_row_without_an_allowed_token_is_flagged():
    rows = [
        Row(normal(100, 1.0), allowed=frozenset()),
        Row(normal(100, 1.0), allowed=frozenset([7]), stop_ids=(7,), min_position=1),
        Row(normal(100, 1.0), allowed=frozenset([7])),
    ]
    out = sampled_rows(rows)
    assert out.is_finite.tolist() == [False, False, True]
    assert out.token[2] == 7


def test_a_row_draws_the_same_anywhere_in_any_batch():
    row = Row(normal(4133, 1.0), 0.9, top_p=0.9, seed=(3, 4), position=11)
    others = [Row(normal(4133, 2.0, seed), 1.1, top_k=5, seed=(3, seed)) for seed in range(7)]
    found = set()
    for place in range(8):
        rows = [*others[:place], row, *others[place:]]
        out = sampled_rows(rows)
        found.add((int(out.token[place]), out.logprob[place].tobytes()))
    assert len(found) == 1
    alone = sampled_rows([row])  # beside copies of itself
    found.add((int(alone.token[0]), alone.logprob[0].tobytes()))
    assert len(found) == 1


def test_seed_words_and_position_each_change_the_draw():
    row = Row(np.zeros(4133, np.float32))
    changed = [{"seed": (1, 0)}, {"seed": (0, 1)}, {"seed": (1, 1)}, {"position": 1}]
    rows = [row, *[dataclasses.replace(row, **fields) for fields in changed]]
    assert len(set(sampled_rows(rows).token.tolist())) == len(rows)


def test_random_words_are_threefry():
    seed = np.array([[0x13198A2E, 0x03707344], [0, 0]], np.uint32)
    position = np.array([0x243F6A88, 0], np.int32)
    words = np.asarray(_bits(seed, position, 2, 5))
    for row in range(2):
        index = np.arange(5, dtype=np.uint32) + (2 << 16)
        counter = np.concatenate([np.full(5, position[row], np.uint32), index])
        expected = threefry_2x32(tuple(jnp.asarray(seed[row])), jnp.asarray(counter))
        assert words[row].tolist() == expected[:5].tolist()


@pytest.mark.parametrize("V", [50257, 128256, 262144])
def test_the_gpu_program_has_no_branch_and_sorts_at_most_4096_elements(V):
    B, words = 64, -(-V // 32)
    params = jax.tree.map(lambda a: (a.shape[1:], a.dtype), arguments([Row(normal(2, 1.0))])[1])
    shapes = [((V,), np.float32), params, ((V,), np.int16), ((words,), np.uint32)]
    shapes += [((words,), np.uint32), ((), np.int32)]
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((B, *shape[0]), shape[1]),
        shapes,
        is_leaf=lambda node: type(node) is tuple and type(node[0]) is tuple,
    )
    text = sampled.trace(*abstract).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo\.(while|case|if|custom_call|sort)\b", text)
    widths = re.findall(r"top_k.*\(tensor<64x(\d+)xf32>\)|top_k.*: tensor<64x(\d+)xf32>", text)
    assert len(widths) == text.count("chlo.top_k") == 4
    assert max(int(width) for pair in widths for width in pair if width) <= 4096
