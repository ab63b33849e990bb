"""Triton's kernels against float64, interpreted, through the interface that programs use."""

from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import RELATIVE_ERROR, Case, PrefillCase, bits, relative_errors
from triton_interpreted import CHUNK, interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def run():
    with interpreter() as call:
        yield call


def rows_of_decode(lengths, **sizes):
    return Case.random(lengths, dtype="float16", **sizes)


def decoded(run, case, fault=None):
    return run("decode_attention", *case.operands, fault=fault)


def prompts(rows, **sizes):
    return PrefillCase.random(rows, dtype="float16", **sizes)


def prefilled(run, case, fault=None):
    q, pages, table, rows = case.operands
    return run("prefill_attention", q, pages, table, *rows, fault=fault)


def is_right(got, case):
    return relative_errors(got, case.dense()[0]).max() < RELATIVE_ERROR["float16"]  # NaN is not


SIZES = [
    {"D": 64, "S": 16, "G": 1, "K": 2},
    {"D": 96, "S": 32, "G": 4},
    {"D": 128, "S": 64, "G": 16},
    {"D": 256, "S": 128, "G": 5},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_decode_equals_dense_attention_at_every_border(sizes, run):
    S = sizes["S"]
    lengths = [0, 1, S - 1, S, S + 1, CHUNK - 1, CHUNK, CHUNK + 1, 300]
    case = rows_of_decode(lengths, shared_pages=1, seed=1, **sizes)
    assert is_right(decoded(run, case), case)


def test_a_row_of_decode_gets_the_same_bits_alone_and_in_other_pages(run):
    case = rows_of_decode([300, 0, 64, 129], K=2, seed=3)
    together = decoded(run, case)
    order = np.random.default_rng(4).permutation(np.arange(1, case.pages.shape[0]))
    moved = np.concatenate([[0], np.argsort(order) + 1])  # page p is now page moved[p]
    elsewhere = case.only([3, 0]).with_other(pages=case.pages[np.concatenate([[0], order])])
    elsewhere = elsewhere.with_other(table=moved[elsewhere.table].astype(np.int32))
    np.testing.assert_array_equal(bits(decoded(run, elsewhere)), bits(together)[[3, 0]])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_prefill_equals_dense_causal_attention(sizes, run):
    case = prompts([(0, 70), (130, 1), (0, 0), (61, 20)], T=100, seed=5, **sizes)
    assert is_right(prefilled(run, case), case)


@settings(max_examples=3)
@given(
    rows=st.lists(st.tuples(st.integers(0, 130), st.integers(0, 40)), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_prefill_equals_dense_causal_attention_for_any_rows(rows, seed, run):
    case = prompts([*rows, (3, 2)], S=16, seed=seed)
    assert is_right(prefilled(run, case), case)


def test_tokens_behind_the_last_row_get_zeros(run):
    out = prefilled(run, prompts([(5, 9)], T=40))
    assert (out[9:] == 0).all()
    assert (out[:9] != 0).any(axis=(1, 2)).all()


def test_a_prompt_gets_the_same_bits_whole_in_parts_and_in_company(run):
    whole = prompts([(0, 70), (40, 30)], S=16, seed=6)
    want = bits(prefilled(run, whole))
    for first, end in ((0, 1), (1, 70), (0, 33), (33, 70)):
        rows = {"offsets": np.array([0, end - first]), "cached": np.array([first])}
        part = whole.with_other(q=whole.q[first:end], table=whole.table[:1], **rows)
        np.testing.assert_array_equal(bits(prefilled(run, part)), want[first:end])


def test_a_query_that_is_not_finite_is_answered_with_nan_and_nobody_else_is(run):
    case = prompts([(20, 40)], S=16)
    healthy = prefilled(run, case)
    out = prefilled(run, case.with_other(q=case.q.at[17, 2, 3].set(jnp.nan)))
    assert np.isnan(out[17, 2]).all()
    healthy, out = healthy.copy(), out.copy()
    healthy[17, 2] = out[17, 2] = 0
    np.testing.assert_array_equal(bits(out), bits(healthy))


@pytest.mark.parametrize(
    "fault",
    [
        "keys and values swapped",
        "another head's keys",
        "pages in another order",
        "a key too many",
        "a key too few",
    ],
)
def test_a_fault_planted_in_prefill_is_noticed(fault, run):
    case = prompts([(40, 20)], S=16, K=2, seed=8)
    assert not is_right(prefilled(run, case, fault), case)


@pytest.mark.parametrize(
    "fault",
    ["pages in another order", "a chunk without its last key", "results of another chunk"],
)
def test_a_fault_planted_in_decode_is_noticed(fault, run):
    case = rows_of_decode([200, 300], S=16, seed=9)
    assert not is_right(decoded(run, case, fault), case)
