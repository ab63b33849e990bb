"""The prefill kernel in Pallas' interpreter, with detection of races, against float64."""

from functools import cache

import jax
import numpy as np
import pytest
from paged_case import (
    FP8,
    QUICK,
    RELATIVE_ERROR,
    Case,
    PrefillCase,
    bits,
    interpreter,
    relative_errors,
)

from pallas_kernels import mosaic
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.prefill import prefill_tiles
from pallas_kernels.shapes import PLAIN_SCORES, Scores, Sizes, Tuning

SMALL = Tuning(chunk=128, step=64, stages=2, blocks=2)
WIDE = Tuning(128, 64, 2, 2, prefill_step=128, prefill_stages=3)
CUT = Tuning(128, 64, 2, 2, prefill_span=128)


@cache
def interpreted(tuning, scores, *, whole=False):
    """The interface, or its kernel for rows of two queries or more alone."""
    if whole:
        return MosaicKernels(tuning, scores, interpreted=True).prefill_with_lse

    def tiles(q, pages, table, rows, scales=None):
        sizes = Sizes.of(q, pages, table, tuning, scores, interpreted=True)
        return prefill_tiles(q, pages, table, rows, sizes, scales)

    return jax.jit(tiles, compiler_options=QUICK)


def prefilled(case, tuning=SMALL, scores=PLAIN_SCORES, *, whole=False):
    """Outputs and log-sum-exps of the kernel, which must not race."""
    run = interpreted(tuning, scores, whole=whole)
    with interpreter() as has_raced:
        out, lse = jax.block_until_ready(run(*case.operands))
        assert not has_raced()
    return out, lse


def assert_equal_to_dense(case, tuning=SMALL, scores=PLAIN_SCORES, *, whole=False):
    out, lse = prefilled(case, tuning, scores, whole=whole)
    want, want_lse = case.dense(scores)
    errors = relative_errors(out, want)
    assert errors.max() < RELATIVE_ERROR[case.q.dtype.name], errors  # NaN fails
    assert (np.asarray(out)[case.offsets[-1] :] == 0).all()  # queries of nobody
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    return out


UNEVEN = [(0, 63), (70, 65), (5, 0), (64, 7), (15, 8), (33, 9), (0, 64)]

FORMS = [
    ({"D": 64, "S": 16, "G": 1}, UNEVEN, SMALL),
    ({"D": 96, "S": 32, "G": 8, "dtype": "float16"}, [(130, 9), (15, 5), (0, 2)], WIDE),
    ({"D": 128, "S": 64, "G": 4, "K": 2}, [(0, 8), (131, 19)], WIDE),
    ({"D": 256, "S": 128, "G": 6, "dtype": "float16"}, [(100, 20), (3, 8)], SMALL),
    ({"D": 256, "S": 64, "G": 1, "dtype": FP8}, [(70, 9), (0, 63)], SMALL),
]


@pytest.mark.parametrize(("sizes", "rows", "tuning"), FORMS, ids=str)
def test_prefill_equals_dense_attention_for_uneven_rows_in_shared_pages(sizes, rows, tuning):
    T = sum(new for _, new in rows) + 3
    assert_equal_to_dense(PrefillCase.random(rows, T=T, shared_pages=1, seed=1, **sizes), tuning)


def test_capped_scaled_and_windowed_scores_equal_dense_attention():
    scores = Scores(soft_cap=2.0, scale=0.3, window=70)
    case = PrefillCase.random([(0, 30), (110, 90)], G=1, seed=2)
    assert_equal_to_dense(case, scores=scores)


@pytest.mark.parametrize(
    ("sizes", "rows", "scores"),
    [
        # Tiles of 32 tokens: one with spans, one with both rows, one without spans, one of nobody.
        ({"D": 128, "G": 4}, [(390, 40), (0, 40)], PLAIN_SCORES),
        ({"D": 64, "S": 16, "G": 8}, [(300, 5), (0, 9)], Scores(soft_cap=2.0, window=150)),
        ({"D": 64, "G": 1, "dtype": FP8}, [(270, 9)], PLAIN_SCORES),
    ],
    ids=str,
)
def test_spans_of_keys_are_put_together(sizes, rows, scores):
    T = sum(new for _, new in rows) + 20
    case = PrefillCase.random(rows, T=T, seed=8, **sizes)
    assert_equal_to_dense(case, CUT, scores)


def test_rows_of_one_query_which_are_decodes_fit_in_among_longer_ones(monkeypatch):
    # As one program it would hang on two cores: the interpreter's kernels wait inside XLA's
    # threads, of which there are two, and a program of several kernels takes one more.
    monkeypatch.setattr(mosaic, "_prefill", mosaic._prefill.__wrapped__)
    case = PrefillCase.random([(130, 1), (7, 12), (64, 0), (63, 1)], T=17, seed=3)
    assert_equal_to_dense(case, whole=True)


def test_where_keys_are_cut_a_query_gets_the_same_bits_in_other_company():
    # In its place among the tokens: the interpreter's products differ by that in their last bits.
    case = PrefillCase.random([(250, 20), (10, 20), (300, 30)], G=4, seed=6)
    together, lse = prefilled(case, CUT)
    others = case.with_other(
        offsets=np.array([0, 40, 40, 70], np.int32), cached=np.array([9, 0, 300], np.int32)
    )
    apart, other_lse = prefilled(others, CUT)
    np.testing.assert_array_equal(bits(apart)[40:], bits(together)[40:])
    np.testing.assert_array_equal(other_lse[40:], lse[40:])


def test_a_query_gets_the_same_bits_in_chunks_in_company_and_in_other_pages():
    case = PrefillCase.random([(40, 60), (0, 9)], G=1, seed=4, M=3)
    together, _ = prefilled(case)
    order = np.random.default_rng(5).permutation(np.arange(1, case.pages.shape[0]))
    moved = np.concatenate([[0], np.argsort(order) + 1])  # page p is now page moved[p]
    chunks = case.with_other(
        pages=case.pages[np.concatenate([[0], order])],
        table=moved[case.table[[0, 0]]].astype(np.int32),
        offsets=np.array([0, 23, 60], np.int32),
        cached=np.array([40, 63], np.int32),
    )
    apart, _ = prefilled(chunks)
    np.testing.assert_array_equal(bits(apart)[:60], bits(together)[:60])


def test_shapes_that_the_kernel_does_not_take_are_refused_by_name():
    with pytest.raises(ValueError, match="17 heads on 1 KV heads"):
        MosaicKernels(SMALL).prefill_with_lse(*PrefillCase.random([(0, 5)], G=17).operands)
    with pytest.raises(ValueError, match="stages of prefill 2"):
        Tuning(128, 64, 2, 2, prefill_stages=1)
    q, pages, table, _ = Case.random([5], dtype=FP8).operands[:4]
    with pytest.raises(ValueError, match="fp8 alone has scales"):
        MosaicKernels(SMALL).prefill_attention(q, pages, table, np.array([0, 1]), np.array([4]))
