"""Paged attention against dense softmax attention in numpy: in plain XLA, and in the launcher."""

import ctypes
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.runtime import host_kernels
from pallas_kernels import xla

K, D, S, M, P = 2, 16, 16, 20, 80
T, R = 448, 6  # one compiled shape for every example


class InXla:
    """Kernels whose pages are an array of XLA's."""

    def __init__(self):
        self.decode_attention = jax.jit(xla.decode_attention)
        self.prefill_attention = jax.jit(xla.prefill_attention)
        self.write_kv = jax.jit(xla.write_kv)
        self.pages, self.content = jnp.array, np.asarray


class InLauncher:
    """Kernels whose pages are a pool's; a page operand is its handle."""

    def __init__(self):
        host_kernels.register()
        self.decode_attention = jax.jit(host_kernels.decode_attention)
        self.prefill_attention = jax.jit(host_kernels.prefill_attention)
        self.write_kv = jax.jit(host_kernels.write_kv)
        self._pools = {}

    def pages(self, pool):
        opened = host_kernels._launcher.KVPool(2, *pool.shape[:2], S, D, "float32")
        self._pools[opened.number] = opened
        handle = np.array([opened.number, 1], np.int32)
        self.content(handle)[:] = pool
        return handle

    def content(self, handle):
        number, array = np.asarray(handle).tolist()
        opened = self._pools[number]
        count = opened.num_bytes // 4
        floats = (ctypes.c_float * count).from_address(opened.address)
        return np.ctypeslib.as_array(floats).reshape(2, -1, K, 2, S, D)[array]


@pytest.fixture(scope="module", params=[InXla, InLauncher])
def kernels(request):
    if request.param is InLauncher and host_kernels._launcher is None:
        pytest.skip("no C compiler when installed")
    return request.param()


@dataclass(frozen=True)
class Sequence:
    """Keys and values [length, K, D] of one row, and the pages they lie in."""

    k: np.ndarray
    v: np.ndarray
    table: np.ndarray


def make_sequences(lengths, rng):
    """Sequences of given lengths in shuffled pages, and the pool with junk everywhere else."""
    pool = rng.normal(size=(P, K, 2, S, D)).astype(np.float32)
    free = list(rng.permutation(np.arange(1, P)))
    sequences = []
    for length in lengths:
        k = rng.normal(size=(length, K, D)).astype(np.float32)
        v = rng.normal(size=(length, K, D)).astype(np.float32)
        table = np.zeros(M, np.int32)
        for index in range(-(-length // S)):
            table[index] = free.pop()
        for t in range(length):
            pool[table[t // S], :, 0, t % S] = k[t]
            pool[table[t // S], :, 1, t % S] = v[t]
        sequences.append(Sequence(k, v, table))
    return sequences, pool


def dense(q, seq, position):
    """One query [H, D] at a position over its sequence, in float64."""
    H = q.shape[0]
    k = np.repeat(seq.k[: position + 1].astype(np.float64), H // K, axis=1)
    v = np.repeat(seq.v[: position + 1].astype(np.float64), H // K, axis=1)
    scores = np.einsum("hd,shd->hs", q.astype(np.float64), k) / np.sqrt(D)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hs,shd->hd", weights, v)


def tables(sequences):
    return np.stack([s.table for s in sequences])


@pytest.mark.parametrize("group", [1, 2, 4])
def test_decode_equals_dense_attention_at_every_page_border(group, kernels):
    rng = np.random.default_rng(0)
    lengths = [1, S - 1, S, S + 1, 127, 128, 129, 300]
    sequences, pool = make_sequences(lengths, rng)
    q = rng.normal(size=(len(lengths), K * group, D)).astype(np.float32)
    out = kernels.decode_attention(q, kernels.pages(pool), tables(sequences), np.array(lengths))
    for row, seq in enumerate(sequences):
        np.testing.assert_allclose(out[row], dense(q[row], seq, lengths[row] - 1), atol=2e-6)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 100)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_packed_prefill_equals_dense_causal_attention(rows, seed, kernels):
    rng = np.random.default_rng(seed)
    cached, counts = np.array(rows, np.int32).T
    sequences, pool = make_sequences(cached + counts, rng)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    empty_rows = R - len(rows)
    offsets = np.concatenate([offsets, np.full(empty_rows, offsets[-1], np.int32)])
    table = np.concatenate([tables(sequences), np.zeros((empty_rows, M), np.int32)])
    cached_lengths = np.concatenate([cached, np.zeros(empty_rows, np.int32)])
    q = rng.normal(size=(T, K * 2, D)).astype(np.float32)
    out = np.asarray(
        kernels.prefill_attention(q, kernels.pages(pool), table, offsets, cached_lengths)
    )
    assert np.isfinite(out).all()
    for row, seq in enumerate(sequences):
        for i in range(counts[row]):
            got = out[offsets[row] + i]
            want = dense(q[offsets[row] + i], seq, cached[row] + i)
            np.testing.assert_allclose(got, want, atol=3e-6)


def test_a_row_gets_the_same_bits_alone_and_beside_longer_rows(kernels):
    rng = np.random.default_rng(1)
    lengths = [100, 290, 7, 33]
    sequences, pool = make_sequences(lengths, rng)
    q = rng.normal(size=(4, K * 2, D)).astype(np.float32)
    together = kernels.decode_attention(
        q, kernels.pages(pool), tables(sequences), np.array(lengths)
    )
    padded = np.array([lengths[0], 1, 1, 1])
    alone = kernels.decode_attention(q, kernels.pages(pool), tables(sequences), padded)
    np.testing.assert_array_equal(together[0], alone[0])


def test_a_query_does_not_see_the_keys_behind_it(kernels):
    rng = np.random.default_rng(2)
    [seq], pool = make_sequences([64], rng)
    q = rng.normal(size=(1, K, D)).astype(np.float32)
    before = kernels.decode_attention(q, kernels.pages(pool), seq.table[None], np.array([40]))
    pool[seq.table[40 // S], :, :, 40 % S] += 5.0
    after = kernels.decode_attention(q, kernels.pages(pool), seq.table[None], np.array([40]))
    np.testing.assert_array_equal(before, after)
    seen = kernels.decode_attention(q, kernels.pages(pool), seq.table[None], np.array([41]))
    assert np.abs(np.asarray(seen - after)).max() > 1e-3


def test_writing_kv_touches_its_slots_only(kernels):
    rng = np.random.default_rng(3)
    pool = rng.normal(size=(P, K, 2, S, D)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, K, D)).astype(np.float32)
    page, slot = np.array([5, 5, 9]), np.array([0, 15, 3])
    out = kernels.content(kernels.write_kv(kernels.pages(pool), k, v, page, slot))
    want = pool.copy()
    for i in range(3):
        want[page[i], :, 0, slot[i]] = k[i]
        want[page[i], :, 1, slot[i]] = v[i]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_values_reach_neither_neighbours_nor_the_next_owner(poison, kernels):
    rng = np.random.default_rng(5)
    [seq], pool = make_sequences([S], rng)
    bad = np.full((1, K, D), poison, np.float32)
    poisoned = kernels.write_kv(kernels.pages(pool), bad, bad, seq.table[:1], np.array([9]))
    q = rng.normal(size=(1, K, D)).astype(np.float32)
    new_owner = kernels.decode_attention(q, poisoned, seq.table[None], np.array([3]))
    np.testing.assert_array_equal(
        new_owner, kernels.decode_attention(q, kernels.pages(pool), seq.table[None], np.array([3]))
    )
    assert np.isfinite(kernels.decode_attention(q, poisoned, seq.table[None], np.array([S]))).all()


def test_swapped_keys_and_values_would_be_noticed(kernels):
    rng = np.random.default_rng(4)
    [seq], pool = make_sequences([50], rng)
    q = rng.normal(size=(1, K, D)).astype(np.float32)
    swapped = kernels.pages(pool[:, :, ::-1])
    out = kernels.decode_attention(q, swapped, seq.table[None], np.array([50]))
    assert np.abs(np.asarray(out[0]) - dense(q[0], seq, 49)).max() > 0.1
