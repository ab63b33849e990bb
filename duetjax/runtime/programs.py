"""The serving programs, lowered and compiled ahead of time over buckets.

Both take flat leaves (weights, KV arrays, then small arrays that the host owns) and return the KV
arrays, updated in place, and one sampled token per row. Rows and tokens that only pad a bucket
write to the dummy page.

    decode   B rows, one token each             -> the next token of every row
    prefill  T packed tokens of at most R rows  -> the token after each row's last one
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from duetjax.config import ModelConfig
from duetjax.model.decoder import Definition
from duetjax.model.kv_pages import DUMMY_PAGE, KVLayout, PagedKV
from duetjax.model.sampling import sample
from duetjax.policy.launch import Program

type Leaves = Sequence[jax.Array]
type Key = tuple[Program, int]


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes that programs are compiled for.

    decode: row counts B, ascending, from 2 (B = 1 compiles to more kernels, not fewer).
    prefill: packed token counts T, ascending. prefill_rows: R of every prefill program.
    table_width: page-table entries M per row.
    """

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    prefill_rows: int
    table_width: int

    def __len__(self) -> int:
        return len(self.decode) + len(self.prefill)

    def __iter__(self) -> Iterator[Key]:
        yield from ((Program.DECODE, size) for size in self.decode)
        yield from ((Program.PREFILL, size) for size in self.prefill)


class Programs:
    """Lowers and compiles every bucket of one model; calls go to the compiled executables."""

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, layout: KVLayout, buckets: Buckets
    ) -> None:
        self.definition = Definition(config, dtype)
        self.dtype = dtype
        self.layout = layout
        self.buckets = buckets
        self._config = config
        self._compiled: dict[Key, Callable[..., tuple[list[jax.Array], jax.Array]]] = {}

    def compile(self) -> Iterator[Key]:
        """Compiles every bucket ahead of its first use, yielding each as it is ready.

        Takes seconds each. XLA compiles without the GIL, so several are compiled at once.
        """
        lowered = [(key, self.lower(key)) for key in self.buckets]
        with ThreadPoolExecutor(min(len(lowered), os.cpu_count() or 1)) as pool:
            for key, executable in pool.map(lambda item: (item[0], item[1].compile()), lowered):
                self._compiled[key] = executable
                yield key

    def lower(self, key: Key) -> jax.stages.Lowered:
        """The program's traced form for abstract arguments; KV arrays are donated."""
        program, size = key
        body = self._decode if program is Program.DECODE else self._prefill
        weights = [
            jax.ShapeDtypeStruct(shape, self.dtype) for shape in self.definition.shapes.values()
        ]
        inputs = self._inputs(program, size)
        jitted = jax.jit(body, donate_argnums=1, keep_unused=True)
        return jitted.lower(weights, self.layout.abstract(), *inputs)

    def __call__(
        self, key: Key, weights: Leaves, kv: Leaves, *inputs: np.ndarray
    ) -> tuple[list[jax.Array], jax.Array]:
        """Runs a compiled program; `kv` is consumed. Returns the KV arrays and tokens [B or R]."""
        return self._compiled[key](weights, kv, *inputs)

    def _inputs(self, program: Program, size: int) -> list[jax.ShapeDtypeStruct]:
        rows = size if program is Program.DECODE else self.buckets.prefill_rows
        row_inputs = [
            jax.ShapeDtypeStruct((rows, self.buckets.table_width), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows, 2), jnp.uint32),
        ]
        tokens = jax.ShapeDtypeStruct((size,), jnp.int32)
        if program is Program.DECODE:
            return [tokens, tokens, *row_inputs]
        starts = jax.ShapeDtypeStruct((rows,), jnp.int32)
        offsets = jax.ShapeDtypeStruct((rows + 1,), jnp.int32)
        return [tokens, offsets, starts, *row_inputs]

    def _decode(
        self,
        weights: Leaves,
        kv: Leaves,
        tokens: jax.Array,
        positions: jax.Array,
        page_table: jax.Array,
        temperature: jax.Array,
        seed: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        """tokens, positions [B] are fed; a padding row has an empty (dummy) page table."""
        decoder = self.definition.bind(weights)
        page, slot = self._place(page_table, positions)
        cache = PagedKV(kv, self._config, page, slot)
        hidden = decoder(tokens, positions, cache.decode(page_table, positions + 1))
        sampled = sample(decoder.logits(hidden), temperature, seed, positions + 1)
        return cache.arrays, sampled

    def _prefill(
        self,
        weights: Leaves,
        kv: Leaves,
        tokens: jax.Array,
        row_offsets: jax.Array,
        starts: jax.Array,
        page_table: jax.Array,
        temperature: jax.Array,
        seed: jax.Array,
    ) -> tuple[list[jax.Array], jax.Array]:
        """tokens [T]: row r is tokens[row_offsets[r]:row_offsets[r + 1]], from starts[r] on."""
        decoder = self.definition.bind(weights)
        token = jnp.arange(tokens.shape[0])
        row = jnp.searchsorted(row_offsets[1:], token, side="right")
        used = token < row_offsets[-1]
        row = jnp.where(used, row, 0)
        positions = jnp.where(used, starts[row] + token - row_offsets[row], 0)
        page, slot = self._place(page_table[row], positions)
        cache = PagedKV(kv, self._config, jnp.where(used, page, DUMMY_PAGE), slot)
        hidden = decoder(tokens, positions, cache.prefill(page_table, row_offsets, starts))
        last = jnp.maximum(row_offsets[1:] - 1, 0)
        ends = starts + row_offsets[1:] - row_offsets[:-1]
        sampled = sample(decoder.logits(hidden[last]), temperature, seed, ends)
        return cache.arrays, sampled

    def _place(self, page_table: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Page and slot in page of one position per table row."""
        size = self.layout.page_size
        index = positions >> (size.bit_length() - 1)
        page = jnp.take_along_axis(page_table, index[:, None], axis=1)[:, 0]
        return page, positions & (size - 1)
