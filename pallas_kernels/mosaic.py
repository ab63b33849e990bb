"""Paged attention and KV writes in Pallas on Mosaic GPU, for NVIDIA Hopper.

The interface and its meaning are those of `pallas_kernels.xla`. Every kernel is lowered once per
program, whatever the number of layers: jit gives all calls of one shape the same text, and XLA
assembles equal kernels once.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import xla_fixed
from pallas_kernels.combine import combine
from pallas_kernels.decode import decode_chunks
from pallas_kernels.pages import FP8, Pages, ScaledPages, parts
from pallas_kernels.prefill import prefill_tiles
from pallas_kernels.shapes import PLAIN_SCORES, Scores, Sizes, Tuning
from pallas_kernels.work_list import rows_within, work_list
from pallas_kernels.write import write_tokens


@dataclass(frozen=True, slots=True)
class MosaicKernels:
    """Kernels of one model on one GPU.

    own_write: keys and values are written by a kernel of ours, if pages have no scales. It is not
    the default, since XLA puts rope, the norm of k and its scatter into one: two launches fewer per
    layer.
    interpreted: see `Sizes`; for tests on a processor.
    """

    tuning: Tuning
    scores: Scores = PLAIN_SCORES
    own_write: bool = False
    interpreted: bool = False

    def write_kv(
        self, pages: Pages, k: jax.Array, v: jax.Array, page: jax.Array, slot: jax.Array, /
    ) -> Pages:
        """See `pallas_kernels.xla.write_kv`."""
        if self.own_write and not isinstance(pages, ScaledPages):
            written: jax.Array = _write(pages, k, v, page, slot)
            return written
        return xla_fixed.write_kv(pages, k, v, page, slot)

    def decode_attention(
        self, q: jax.Array, pages: Pages, page_table: jax.Array, lengths: jax.Array, /
    ) -> jax.Array:
        """See `pallas_kernels.xla.decode_attention`; rows of length 0 cost nothing, and get 0."""
        values, scales = parts(pages)
        return self.decode_with_lse(q, values, page_table, lengths, scales)[0]

    def decode_with_lse(
        self,
        q: jax.Array,
        pages: jax.Array,
        page_table: jax.Array,
        lengths: jax.Array,
        scales: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`decode_attention`, and the scores' log-sum-exp [B, H] float32: -inf for length 0.

        scales [P, K, 2] float32: of pages in fp8, whose values are multiples of them.
        """
        sizes = self._sizes(q, pages, page_table, scales)
        out, lse = _decode(q, pages, page_table, lengths, scales, sizes)
        return out, lse

    def prefill_attention(
        self,
        q: jax.Array,
        pages: Pages,
        page_table: jax.Array,
        row_offsets: jax.Array,
        cached_lengths: jax.Array,
        /,
    ) -> jax.Array:
        """See `pallas_kernels.xla.prefill_attention`; queries behind the last row get 0."""
        values, scales = parts(pages)
        rows = row_offsets, cached_lengths
        return self.prefill_with_lse(q, values, page_table, rows, scales)[0]

    def prefill_with_lse(
        self,
        q: jax.Array,
        pages: jax.Array,
        page_table: jax.Array,
        rows: tuple[jax.Array, jax.Array],
        scales: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`prefill_attention`, and the scores' log-sum-exp [T, H] float32: -inf without keys.

        rows: row_offsets and cached_lengths. scales: as in `decode_with_lse`. Rows of one query are
        decode's, and get its bits.
        """
        sizes = self._sizes(q, pages, page_table, scales)
        out, lse = _prefill(q, pages, page_table, *rows, scales, sizes)
        return out, lse

    def _sizes(
        self, q: jax.Array, pages: jax.Array, page_table: jax.Array, scales: jax.Array | None
    ) -> Sizes:
        if (scales is None) == (pages.dtype.name == FP8):
            raise ValueError(f"pages of {pages.dtype} with scales {scales}; fp8 alone has scales")
        return Sizes.of(
            q, pages, page_table, self.tuning, self.scores, interpreted=self.interpreted
        )


@jax.jit
def _write(
    pages: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, slot: jax.Array
) -> jax.Array:
    return write_tokens(pages, k, v, page, slot)


@partial(jax.jit, static_argnums=5)
def _decode(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    scales: jax.Array | None,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    lengths = jnp.clip(lengths, 0, page_table.shape[1] * sizes.page_size)
    work = work_list(lengths, sizes.chunks)
    means, log_sums = decode_chunks(q, pages, page_table, lengths, work, sizes, scales)
    out, lse = combine(means, log_sums, lengths, sizes, q.dtype)
    return out, lse


@partial(jax.jit, static_argnums=6)
def _prefill(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    row_offsets: jax.Array,
    cached_lengths: jax.Array,
    scales: jax.Array | None,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    T, limit = q.shape[0], page_table.shape[1] * sizes.page_size
    row_offsets, cached_lengths = rows_within(row_offsets, cached_lengths, T, limit)
    first, counts = row_offsets[:-1], row_offsets[1:] - row_offsets[:-1]
    rows = row_offsets, cached_lengths
    out, lse = prefill_tiles(q, pages, page_table, rows, sizes, scales)
    is_one = counts == 1
    lengths = jnp.where(is_one, cached_lengths + 1, 0)
    queries = q[jnp.minimum(first, T - 1)]
    if sizes.interpreted:  # which goes wrong if two kernels run at once
        queries = queries + 0 * out[0]
    ones = _decode(queries, pages, page_table, lengths, scales, sizes)
    place = jnp.where(is_one, first, T)  # that of other rows is dropped
    out, lse = (
        of_all.at[place].set(of_ones, mode="drop", unique_indices=True)
        for of_all, of_ones in zip((out, lse), ones, strict=True)
    )
    return out, lse
