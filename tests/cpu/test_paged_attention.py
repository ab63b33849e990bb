"""Paged attention against dense softmax attention in numpy: in plain XLA, and in the launcher."""

import ctypes
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_pool import DTYPES, Pool, Sizes

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


@pytest.mark.parametrize("lengths", [[0, 0], [0, 40]])
def test_rows_of_nobody_are_finite_and_change_nobody(lengths, kernels):
    rng = np.random.default_rng(3)
    sequences, pool = make_sequences([64, 64], rng)
    q = rng.normal(size=(2, K, D)).astype(np.float32)
    out = kernels.decode_attention(q, kernels.pages(pool), tables(sequences), np.array(lengths))
    assert np.isfinite(out).all()
    if lengths[1]:
        np.testing.assert_allclose(out[1], dense(q[1], sequences[1], 39), atol=2e-6)


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


# The launcher's own: any sizes and dtype, bits, and what it refuses.

ROUNDING = {"float32": 0.0, "bfloat16": 1.01 * 2**-8}  # of the result, which is float32 before


@pytest.fixture(scope="module")
def launched():
    if host_kernels._launcher is None:
        pytest.skip("no C compiler when installed")
    return InLauncher()


def as_bits(array):
    array = np.asarray(array)
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


ALL_KINDS = [
    *(Sizes(group=group) for group in (1, 3, 7, 32)),
    *(Sizes(head_dim=head_dim) for head_dim in (8, 64, 80, 128, 256)),
    *(Sizes(page_size=page_size) for page_size in (32, 64, 128)),
    *(Sizes(group=group, head_dim=80, dtype="bfloat16") for group in (1, 7, 32)),
    Sizes(group=3, head_dim=256, page_size=128, dtype="bfloat16"),
]


@pytest.mark.parametrize("sizes", ALL_KINDS, ids=str)
def test_any_supported_sizes_give_dense_attention(sizes, launched):
    pool, counts, starts = Pool(sizes), [1, 33, 40], np.array([70, 0, 21], np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    table, q = pool.table(3, -(-80 // sizes.page_size)), pool.queries(80)
    out = np.asarray(launched.prefill_attention(q, pool.handle, table, offsets, starts))
    for row in range(3):
        for i in (0, counts[row] // 2, counts[row] - 1):
            want = pool.dense(q[offsets[row] + i], table[row], starts[row] + i)
            got = out[offsets[row] + i].astype(np.float64)
            np.testing.assert_allclose(got, want, atol=5e-6, rtol=ROUNDING[sizes.dtype])
    lengths = np.array([1, 17, 80], np.int32)
    decoded = np.asarray(launched.decode_attention(q[:3], pool.handle, table, lengths))
    for row in range(3):
        want = pool.dense(q[row], table[row], lengths[row] - 1)
        got = decoded[row].astype(np.float64)
        np.testing.assert_allclose(got, want, atol=5e-6, rtol=ROUNDING[sizes.dtype])


def test_keys_and_values_in_bfloat16_are_written_as_they_are(launched):
    pool = Pool(Sizes(dtype="bfloat16"))
    want, (k, v) = (
        pool.arrays.copy(),
        pool.dice.normal(size=(2, 3, 2, 16)).astype(DTYPES["bfloat16"]),
    )
    k[0, 0, 0], v[2, 1, 5] = np.inf, np.nan
    page, slot = np.array([5, 5, 9], np.int32), np.array([0, 15, 3], np.int32)
    launched.write_kv(pool.handle, k, v, page, slot).block_until_ready()
    k[0, 0, 0] = v[2, 1, 5] = 0
    want[1, page, :, 0, slot], want[1, page, :, 1, slot] = k, v
    np.testing.assert_array_equal(as_bits(pool.arrays), as_bits(want))


BATCH = 200
SHARED = [  # sizes for different widths of the processor's registers
    *(Sizes(group=3, dtype=dtype) for dtype in ("float32", "bfloat16")),
    Sizes(group=3, head_dim=24),
]


@pytest.mark.parametrize("sizes", SHARED, ids=str)
def test_decoded_rows_have_the_same_bits_alone_and_among_two_hundred(sizes, launched):
    pool = Pool(sizes)
    lengths = pool.dice.integers(1, 20 * 16, BATCH).astype(np.int32)
    assert lengths.sum() * 6 * 16 > 2**17  # enough for threads to share
    table, q = pool.table(BATCH, 20), pool.queries(BATCH)
    together = np.asarray(launched.decode_attention(q, pool.handle, table, lengths))
    for row in range(0, BATCH, 9):
        one = slice(row, row + 1)
        alone = launched.decode_attention(q[one], pool.handle, table[one], lengths[one])
        np.testing.assert_array_equal(as_bits(alone)[0], as_bits(together)[row])
        want = pool.dense(q[row], table[row], lengths[row] - 1)
        got = together[row].astype(np.float64)
        np.testing.assert_allclose(got, want, atol=5e-6, rtol=ROUNDING[sizes.dtype])


@pytest.mark.parametrize("sizes", SHARED, ids=str)
def test_prompts_have_the_same_bits_in_one_chunk_cut_up_and_among_two_hundred(sizes, launched):
    pool, length = Pool(sizes), 150
    table, q = pool.table(BATCH, 20), pool.queries(length + BATCH - 1)
    whole = launched.prefill_attention(
        q[:length], pool.handle, table[:1], np.array([0, length]), np.array([0])
    )
    counts = np.concatenate([[length], np.ones(BATCH - 1, int)])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    starts = np.concatenate([[0], pool.dice.integers(0, 319, BATCH - 1)]).astype(np.int32)
    beside = launched.prefill_attention(q, pool.handle, table, offsets, starts)
    np.testing.assert_array_equal(as_bits(beside)[:length], as_bits(whole))
    for cuts in ([0, 1, 8, 64, 65, length], [0, 16, 32, 150], [0, 149, 150]):
        for first, end in itertools.pairwise(cuts):
            chunk = launched.prefill_attention(
                q[first:end], pool.handle, table[:1], np.array([0, end - first]), np.array([first])
            )
            np.testing.assert_array_equal(as_bits(chunk), as_bits(whole)[first:end])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_answered_with_nan_and_nobody_else_is(poison, launched):
    pool = Pool(Sizes(group=3))
    table, q = pool.table(1, 5), pool.queries(40)
    arguments = pool.handle, table, np.array([0, 40]), np.array([20])
    healthy = np.asarray(launched.prefill_attention(q, *arguments))
    q[17, 4, 3] = poison
    out = np.asarray(launched.prefill_attention(q, *arguments))
    assert np.isnan(out[17, 4]).all()
    healthy, out = healthy.copy(), out.copy()
    healthy[17, 4] = out[17, 4] = 0
    np.testing.assert_array_equal(as_bits(out), as_bits(healthy))


@pytest.mark.parametrize("used", [0, 1, 30])
def test_queries_behind_the_last_row_come_out_as_zeros(used, launched):
    pool = Pool(Sizes(dtype="bfloat16"))
    q, offsets = pool.queries(48), np.array([0, used, used, used], np.int32)
    out = np.asarray(
        launched.prefill_attention(q, pool.handle, pool.table(3, 4), offsets, np.zeros(3, np.int32))
    ).astype(np.float32)
    assert (out[used:] == 0).all()
    assert (out[:used] != 0).any(axis=(1, 2)).all()


def refused(call, *arguments):
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.block_until_ready(call(*arguments))
    return str(refusal.value)


def int32(*values):
    return np.array(values, np.int32)


MISFITS = {
    "the array's number": ["array -1", "array 2"],
    "queries": ["head_dim", "dtype", "rank"],
    "the page table": ["table rows", "table dtype"],
    "lengths": ["lengths"],
    "the number or size of heads": ["heads", "few heads"],
}


@pytest.mark.parametrize(
    ("wrong", "what"), [(wrong, what) for what, wrongs in MISFITS.items() for wrong in wrongs]
)
def test_operands_that_do_not_fit_are_refused_by_name(wrong, what, launched):
    pool = Pool(Sizes())
    number, q, table = pool.opened.number, pool.queries(3), pool.table(3, 4)
    fitting = {"handle": pool.handle, "q": q, "table": table, "lengths": int32(1, 2, 3)}
    changes = {
        "array -1": {"handle": int32(number, -1)},
        "array 2": {"handle": int32(number, 2)},
        "head_dim": {"q": q[:, :, :8]},
        "dtype": {"q": q.astype(DTYPES["bfloat16"])},
        "rank": {"q": q[:, 0]},
        "table rows": {"table": table[:2]},
        "table dtype": {"table": table.astype(np.float32)},
        "lengths": {"lengths": int32(1, 2)},
        "heads": {"q": np.concatenate([q, q[:, :1]], axis=1)},
        "few heads": {"q": q[:, :1]},
    }[wrong]
    operands = {**fitting, **changes}
    call = [operands[name] for name in ("q", "handle", "table", "lengths")]
    assert f"{what} does not fit the pool of KV pages" in refused(launched.decode_attention, *call)


def test_rows_that_are_not_in_order_are_refused(launched):
    pool = Pool(Sizes())
    q, table = pool.queries(8), pool.table(2, 4)
    for offsets, starts in (
        (int32(0, 5, 3), int32(0, 0)),
        (int32(0, 5, 9), int32(0, 0)),
        (int32(-1, 5, 8), int32(0, 0)),
        (int32(0, 5, 8), int32(0, -1)),
        (int32(0, 8), int32(0, 0)),
    ):
        call = launched.prefill_attention, q, pool.handle, table, offsets, starts
        assert "rows does not fit" in refused(*call)


def test_what_cannot_be_written_is_refused(launched):
    pool = Pool(Sizes())
    before, k = pool.arrays.copy(), pool.dice.normal(size=(3, 2, 16)).astype(np.float32)
    place = int32(1, 2, 3)
    for keys, values in ((k[:, :1], k), (k, k[:2]), (k, k.astype(DTYPES["bfloat16"]))):
        call = launched.write_kv, pool.handle, keys, values, place, place
        assert "keys or values does not fit" in refused(*call)
    call = launched.write_kv, pool.handle, k, k, place[:2], place
    assert "where to write them does not fit" in refused(*call)
    np.testing.assert_array_equal(pool.arrays, before)


def test_a_pool_that_is_closed_or_never_was_is_refused(launched):
    pool = Pool(Sizes())
    q, table, handle = pool.queries(1), pool.table(1, 4), pool.handle
    del pool
    for unknown in (handle, int32(-1, 0), int32(256, 0), int32(2**31 - 1, 0)):
        call = launched.decode_attention, q, unknown, table, int32(1)
        assert "the pool of KV pages has been closed" in refused(*call)


def test_pages_that_the_pool_has_not_are_neither_read_nor_written(launched):
    pool = Pool(Sizes(num_arrays=1))
    before, k = pool.arrays.copy(), pool.queries(4)[:, :2]
    far = int32(60, -1, 2**31 - 1, -(2**31))
    launched.write_kv(pool.handle, k, k, far, int32(0, 0, 0, 0)).block_until_ready()
    launched.write_kv(pool.handle, k, k, int32(1, 1, 1, 1), far).block_until_ready()
    np.testing.assert_array_equal(pool.arrays, before)
    out = launched.decode_attention(pool.queries(4), pool.handle, far[:, None], int32(16, 1, 5, 3))
    assert np.isfinite(out).all()
    behind = int32(65, 2**31 - 1, 70, 64)  # positions that the table has no page for
    out = launched.decode_attention(pool.queries(4), pool.handle, pool.table(4, 4), behind)
    assert np.isfinite(out).all()


def test_two_pools_keep_their_pages_apart(launched):
    one, other = Pool(Sizes(), seed=1), Pool(Sizes(), seed=2)
    before, k = other.arrays.copy(), one.queries(60)[:, :2]
    pages, q, table = np.arange(60, dtype=np.int32), one.queries(1), one.table(1, 4)
    launched.write_kv(one.handle, k, k, pages, pages % 16).block_until_ready()
    np.testing.assert_array_equal(other.arrays, before)
    for pool in (one, other):
        out = launched.decode_attention(q, pool.handle, table, int32(64))
        np.testing.assert_allclose(out[0], pool.dense(q[0], table[0], 63), atol=5e-6)


GOOD = {"num_arrays": 2, "num_pages": 3, "num_heads": 2, "page_size": 16, "head_dim": 8}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [0, -1, -(2**40)])
def test_a_pool_without_size_is_refused_by_name(name, value, launched):
    with pytest.raises(ValueError, match=f"{name} must be positive, not {value}"):
        host_kernels._launcher.KVPool(**{**GOOD, name: value}, dtype="float32")


def test_pages_of_an_unknown_dtype_are_refused(launched):
    with pytest.raises(ValueError, match="not float16"):
        host_kernels._launcher.KVPool(**GOOD, dtype="float16")


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [2**62, 2**60 + 16])
def test_a_pool_that_no_memory_can_hold_is_refused(name, value, launched):
    with pytest.raises(MemoryError):
        host_kernels._launcher.KVPool(**{**GOOD, name: value}, dtype="float32")


def test_a_new_pool_is_all_zeros_and_knows_its_size(launched):
    opened = host_kernels._launcher.KVPool(**GOOD, dtype="bfloat16")
    assert opened.num_bytes == 2 * 3 * 2 * 2 * 16 * 8 * 2
    memory = (ctypes.c_byte * opened.num_bytes).from_address(opened.address)
    assert not any(memory)


def opened_or_none():
    try:
        return host_kernels._launcher.KVPool(**GOOD, dtype="float32")
    except MemoryError:
        return None


def test_there_is_an_end_to_pools_and_those_given_back_can_be_had_again(launched):
    pools = []
    while len(pools) < 257 and (opened := opened_or_none()) is not None:
        pools.append(opened)
    assert 64 <= len(pools) < 257
    number = pools.pop().number
    assert host_kernels._launcher.KVPool(**GOOD, dtype="float32").number == number
