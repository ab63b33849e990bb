"""How long kernels take on the default device, and what copying takes there."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cost import Heads, decode_cost, prefill_cost
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.pages import FP8, LEAST_SCALE, Pages, ScaledPages

CALLS = 16
"""Calls per timed run, each waiting for the one before: the host's part is spread over them."""

COLD_BYTES = 2**28
"""KV that calls go round, if a call has less: several times any L2."""

TABLE_TOKENS = 2**17
"""Room in page tables, as in an engine's whose rows may become so long."""

COPIED_BYTES = 2**31
_RUNS = 5


def wide(dtype: str) -> str:
    """Of queries, where pages are in `dtype`."""
    return "bfloat16" if dtype == FP8 else dtype


@dataclass(frozen=True, slots=True)
class Workload:
    """Decode attention of B rows with so many keys each.

    dtype: of everything; of pages alone if it is fp8, and then the rest is in bfloat16.
    """

    rows: int
    context: int
    heads: Heads
    page_size: int
    dtype: str

    @property
    def num_bytes(self) -> float:
        """What it must move; see `decode_cost`."""
        return decode_cost([self.context] * self.rows, self.heads).num_bytes

    def operands(self, seed: int = 0) -> tuple[jax.Array, Pages, jax.Array, jax.Array]:
        """Random q, pages, page table and lengths; rows' pages are shuffled."""
        H, K, D = self.heads[:3]
        width = -(-self.context // self.page_size)
        count = self.rows * width + 1  # page 0 is nobody's
        keys = jax.random.split(jax.random.key(seed), 3)
        q = jax.random.normal(keys[0], (self.rows, H, D), jnp.float32).astype(wide(self.dtype))
        shape = (count, K, 2, self.page_size, D)
        values = jax.random.normal(keys[1], shape, wide(self.dtype))
        pages: Pages = values
        if self.dtype == FP8:
            scales = jnp.full(shape[:3], LEAST_SCALE)
            pages = ScaledPages((values / LEAST_SCALE).astype(FP8), scales)
        table = 1 + jax.random.permutation(keys[2], count - 1).reshape(self.rows, width)
        lengths = jnp.full(self.rows, self.context, jnp.int32)
        return q, pages, table.astype(jnp.int32), lengths


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """Prefill attention of R rows of so many queries, after so many keys each.

    dtype: as in `Workload`.
    """

    rows: int
    new: int
    cached: int
    heads: Heads
    page_size: int
    dtype: str

    @property
    def flops(self) -> float:
        """Of both products alone, as attention's speed is usually given; see `prefill_cost`."""
        D = self.heads.head_dim
        whole = prefill_cost([(self.cached, self.new)] * self.rows, self.heads).flops
        return whole * 4 * D / (4 * D + 2)

    def operands(self, seed: int = 0) -> tuple[Any, ...]:
        """Random q, pages, page table, row offsets and cached lengths; rows' pages are shuffled."""
        shape = (self.rows * self.new, self.heads.num_heads, self.heads.head_dim)
        q = jax.random.normal(jax.random.key(seed + 1), shape, wide(self.dtype))
        context = self.cached + self.new
        of_rows = Workload(self.rows, context, self.heads, self.page_size, self.dtype)
        _, pages, table, _ = of_rows.operands(seed)
        offsets = jnp.arange(self.rows + 1, dtype=jnp.int32) * self.new
        return q, pages, table, offsets, jnp.full(self.rows, self.cached, jnp.int32)

    def dense(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [R, q, H, D], keys and values [R, n, K, D] of pages without scales."""
        H, K, D = self.heads[:3]
        q, pages, table, _, _ = self.operands(seed)
        kv = pages[table].transpose(3, 0, 1, 4, 2, 5).reshape(2, self.rows, -1, K, D)
        k, v = kv[:, :, : self.cached + self.new]
        return q.reshape(self.rows, self.new, H, D), k, v


def decode_seconds(kernels: MosaicKernels, load: Workload, calls: int = CALLS) -> float:
    """Seconds of one call of `decode_attention`, the shortest of a few runs."""
    q, pages, table, lengths = load.operands()
    table = in_wide_table(table, load.page_size)
    others = min(int(COLD_BYTES // load.num_bytes), calls - 1)
    pools = [pages, *(jax.tree.map(jnp.copy, pages) for _ in range(others))]

    @jax.jit
    def run(q: jax.Array, pools: list[Pages]) -> jax.Array:
        for call in range(calls):
            q = kernels.decode_attention(q, pools[call % len(pools)], table, lengths)
        return q

    return shortest(lambda: run(q, pools)) / calls


def in_wide_table(table: jax.Array, page_size: int) -> jax.Array:
    """A page table for rows of up to `TABLE_TOKENS`, as a server's: kernels cut work by that."""
    room = TABLE_TOKENS // page_size - table.shape[1]
    return jnp.pad(table, ((0, 0), (0, max(0, room))))


type Attention = Callable[..., jax.Array]
"""Of queries, and whatever else; what it gives has their shape."""


def seconds_per_call(
    attention: Attention, operands: tuple[jax.Array, ...], calls: int = CALLS
) -> float:
    """Seconds of one call, the shortest of a few runs."""
    run = jax.jit(repeated(attention, calls))
    return shortest(lambda: run(*operands)) / calls


def repeated(attention: Attention, calls: int = CALLS) -> Attention:
    """So many calls of it, each with the queries that the one before has given."""

    def run(q: jax.Array, *others: jax.Array) -> jax.Array:
        for _ in range(calls):
            q = attention(q, *others)
        return q

    return run


def copy_bytes_per_s(num_bytes: int = COPIED_BYTES) -> float:
    """Bytes read and written per second by a copy of so many bytes."""
    source = jnp.zeros(num_bytes // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)  # a plain copy would be no kernel
    return 2 * num_bytes / shortest(lambda: copy(source))


def shortest(run: Callable[[], jax.Array]) -> float:
    """Seconds of the shortest of a few runs; the first one, which compiles, does not count."""
    run().block_until_ready()
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
