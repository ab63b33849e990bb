"""Faults planted in the prefill kernel and its operands: each must be seen by what tests see."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from paged_case import RELATIVE_ERROR, PrefillCase, Trial

from pallas_kernels import prefill
from pallas_kernels.prefill_block import K
from pallas_kernels.shapes import PLAIN_SCORES, Sizes, Tuning

TUNING = Tuning(chunk=128, step=64, stages=2, blocks=2, prefill_span=128)
CASE = PrefillCase.random([(150, 20), (100, 12), (0, 9)], G=4, seed=7)
"""One tile of two spans, and one that is not cut."""


def attention(q, pages, table, rows):
    sizes = Sizes.of(q, pages, table, TUNING, PLAIN_SCORES, interpreted=True)
    return prefill.prefill_tiles(q, pages, table, rows, sizes)[0]


TRIAL = Trial(attention, CASE)


def test_the_kernel_without_a_fault_is_not_accused():
    error, has_raced = TRIAL.run()
    assert error < RELATIVE_ERROR["bfloat16"]
    assert not has_raced


@pytest.mark.parametrize(
    "faulty",
    [
        pytest.param(CASE.with_other(pages=CASE.pages[:, :, ::-1]), id="keys and values swapped"),
        pytest.param(CASE.with_other(table=CASE.table + 1), id="a page off by one"),
        pytest.param(CASE.with_other(table=CASE.table[:, ::-1]), id="pages in another order"),
        pytest.param(CASE.with_other(cached=CASE.cached + 1), id="a key too many"),
        pytest.param(CASE.with_other(cached=CASE.cached - 1), id="a key too few"),
        pytest.param(
            CASE.with_other(offsets=CASE.offsets + np.array([0, 1, 0, 0])), id="a row too long"
        ),
    ],
)
def test_operands_that_are_off_are_noticed(faulty):
    error, _ = TRIAL.run(faulty)
    assert not error < 4 * RELATIVE_ERROR["bfloat16"], error  # NaN is noticed too


class EarlyRelease(prefill._Attention):
    """Says that values have been read before they are."""

    def plus_weighted(self, value_sums, state, which, slot):
        plgpu.barrier_arrive(self.free.at[which * self.stages + slot])
        return super().plus_weighted(value_sums, state, which, slot)

    def release(self, which, slot):
        if which is K:
            super().release(which, slot)
        else:
            _ = self.kv_s[which, slot]
            plgpu.commit_smem()


class MissingLastValues(prefill._Attention):
    """Leaves out the values of the last step."""

    def last_values(self, done, state):
        super().last_values(done, state)
        return state.softmax.values


class NextValues(prefill._Attention):
    """Adds values of one step with weights of another."""

    def plus_weighted(self, value_sums, state, which, slot):
        return super().plus_weighted(value_sums, state, which, self.slot(slot + 1))


class MissingCommit(prefill._Attention):
    """Hands a result to TMA that it may not see yet."""

    def store(self, *arguments):
        with patch.object(plgpu, "commit_smem", lambda: None):
            super().store(*arguments)


class MissingWait(prefill._Attention):
    """Does not wait for its queries, keys and values."""

    def run(self, group):
        with patch.object(plgpu, "barrier_wait", lambda barrier: None):
            super().run(group)


class MissingSpan(prefill._Attention):
    """Leaves out the last span."""

    def store_span(self, tile, values, log_sums):
        shown = jnp.where(tile.span + 1 < tile.spans, log_sums, -jnp.inf)
        super().store_span(tile, values, shown)


class SpanOfAnother(prefill._Attention):
    """Stores a span as that of the other 64 queries."""

    def store_span(self, *arguments):
        own = self.group
        self.group = 1 - own
        super().store_span(*arguments)
        self.group = own


class MissingWaitForSlot(prefill.Loader):
    """Fills slots whether they are free or not."""

    def load(self, *arguments):
        with patch.object(plgpu, "barrier_wait", lambda barrier: None):
            super().load(*arguments)


@pytest.mark.parametrize("faulty", [NextValues, MissingLastValues, MissingSpan, SpanOfAnother])
def test_values_that_are_not_the_weights_own_are_noticed(faulty, monkeypatch):
    monkeypatch.setattr(prefill, "_Attention", faulty)
    error, _ = TRIAL.run_faulty()
    assert not error < 4 * RELATIVE_ERROR["bfloat16"], error  # NaN is noticed too


@pytest.mark.parametrize("faulty", [EarlyRelease, MissingCommit])
def test_memory_that_is_handed_on_too_early_is_noticed(faulty, monkeypatch):
    monkeypatch.setattr(prefill, "_Attention", faulty)
    error, has_raced = TRIAL.run_faulty()
    assert has_raced, error


def test_a_slot_that_is_filled_before_it_is_free_is_noticed(monkeypatch):
    monkeypatch.setattr(prefill, "Loader", MissingWaitForSlot)
    try:
        _, is_noticed = TRIAL.run_faulty()
    except jax.errors.JaxRuntimeError:  # a barrier was passed that others still wait at
        is_noticed = True
    assert is_noticed


def test_a_load_that_is_not_waited_for_is_noticed(monkeypatch):
    monkeypatch.setattr(prefill, "_Attention", MissingWait)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no threads observed phase"):
        TRIAL.run_faulty()
