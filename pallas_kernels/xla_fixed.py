"""The kernels in plain JAX as a GPU can replay them: the same work in every run, no look at values.

For GPUs that have no kernels of their own. A row costs what the longest context costs, so they are
for small `--max-model-len`. No loops either: XLA copies a loop's first counter from memory of its
own, which a recording must not rest on. Signatures and meaning are those of `pallas_kernels.xla`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import xla


def write_kv(
    pages: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, slot: jax.Array
) -> jax.Array:
    """See `pallas_kernels.xla.write_kv`; what goes to the dummy page is dropped."""
    new = jnp.stack([k, v], axis=2).astype(pages.dtype)  # the cast may overflow
    new = jnp.where(jnp.isfinite(new), new, 0)
    page = jnp.where(page == 0, pages.shape[0], page)
    return pages.at[page, :, :, slot].set(new, mode="drop", unique_indices=True)


def decode_attention(
    q: jax.Array, pages: jax.Array, page_table: jax.Array, lengths: jax.Array
) -> jax.Array:
    """See `pallas_kernels.xla.decode_attention`."""
    longest = page_table.shape[1] * pages.shape[3]
    return xla.decode_walk(q, pages, page_table, lengths, longest)


def prefill_attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    row_offsets: jax.Array,
    cached_lengths: jax.Array,
) -> jax.Array:
    """See `pallas_kernels.xla.prefill_attention`."""
    longest = page_table.shape[1] * pages.shape[3]
    return xla.prefill_walk(q, pages, page_table, row_offsets, cached_lengths, longest)
