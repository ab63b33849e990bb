"""The KV cache as one array per layer, [P, K, 2, S, D]; with the kernels, alone in knowing it.

Page 0 is the dummy: padding rows write to it and nobody reads it. Pages start as finite zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from duetjax.config import ModelConfig
from duetjax.model.decoder import Attend
from pallas_kernels import decode_attention, prefill_attention, write_kv

DUMMY_PAGE = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the cache: `num_pages` pages P (dummy included) of `page_size` tokens S."""

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    num_arrays: int
    dtype: DTypeLike

    @classmethod
    def of(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike
    ) -> "KVLayout":
        """The layout for a model: one array per distinct KV layer."""
        arrays = len(set(config.kv_of_layer))
        return cls(num_pages, page_size, config.num_kv_heads, config.head_dim, arrays, dtype)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one array, [P, K, 2, S, D]."""
        return (self.num_pages, self.num_kv_heads, 2, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all arrays."""
        values = self.num_arrays * 2 * self.num_kv_heads * self.page_size * self.head_dim
        return values * jnp.dtype(self.dtype).itemsize

    def allocate(self) -> list[jax.Array]:
        """Zeroed arrays on the default device."""
        return [jnp.zeros(self.shape, self.dtype) for _ in range(self.num_arrays)]

    def abstract(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays' shapes, for lowering."""
        return [jax.eval_shape(lambda: jnp.zeros(self.shape, self.dtype))] * self.num_arrays


class PagedKV:
    """The cache inside one traced program: `attend` writes to it, `arrays` is what came of it.

    page, slot [N]: where each token's keys and values go.
    """

    def __init__(
        self, arrays: Sequence[jax.Array], config: ModelConfig, page: jax.Array, slot: jax.Array
    ) -> None:
        self.arrays = list(arrays)
        self._array_of_layer = config.kv_of_layer
        self._page, self._slot = page, slot

    def decode(self, page_table: jax.Array, lengths: jax.Array) -> Attend:
        """Attend for one token per row; page_table [B, M], lengths [B] with the new token."""

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return decode_attention(q, self._write(layer, k, v), page_table, lengths)

        return attend

    def prefill(
        self, page_table: jax.Array, row_offsets: jax.Array, cached_lengths: jax.Array
    ) -> Attend:
        """Attend for packed rows; page_table [R, M], row_offsets [R + 1], cached_lengths [R]."""

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            pages = self._write(layer, k, v)
            return prefill_attention(q, pages, page_table, row_offsets, cached_lengths)

        return attend

    def _write(self, layer: int, k: jax.Array, v: jax.Array) -> jax.Array:
        index = self._array_of_layer[layer]
        self.arrays[index] = write_kv(self.arrays[index], k, v, self._page, self._slot)
        return self.arrays[index]
