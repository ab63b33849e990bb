"""Pools of KV pages as numpy sees them, and dense attention over them in float64."""

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from duetjax.runtime import host_kernels

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Sizes:
    """Of a pool's arrays; group: heads of queries that share a KV head."""

    num_pages: int = 60
    num_heads: int = 2
    page_size: int = 16
    head_dim: int = 16
    group: int = 2
    dtype: str = "float32"
    num_arrays: int = 2

    @property
    def shape(self):
        return (self.num_pages, self.num_heads, 2, self.page_size, self.head_dim)


class Pool:
    """A pool filled at random, and the handle of its last array."""

    def __init__(self, sizes, seed=0):
        self.sizes = sizes
        self.opened = host_kernels._launcher.KVPool(
            sizes.num_arrays, *sizes.shape[:2], *sizes.shape[3:], sizes.dtype
        )
        self.handle = np.array([self.opened.number, sizes.num_arrays - 1], np.int32)
        self.dice = np.random.default_rng(seed)
        self.arrays[:] = self.dice.normal(size=self.arrays.shape)

    @property
    def arrays(self):
        """[num_arrays, P, K, 2, S, D], the memory itself."""
        memory = (ctypes.c_byte * self.opened.num_bytes).from_address(self.opened.address)
        flat = np.frombuffer(memory, DTYPES[self.sizes.dtype])
        return flat.reshape(self.sizes.num_arrays, *self.sizes.shape)

    def queries(self, count):
        shape = (count, self.sizes.num_heads * self.sizes.group, self.sizes.head_dim)
        return self.dice.normal(size=shape).astype(DTYPES[self.sizes.dtype])

    def table(self, num_rows, width):
        """Pages of each row, which rows may share."""
        return self.dice.integers(1, self.sizes.num_pages, (num_rows, width)).astype(np.int32)

    def dense(self, query, table, position):
        """What one query [H, D] sees at a position, in float64."""
        pages = self.arrays[-1][table].astype(np.float64)  # [M, K, 2, S, D]
        keys, values = pages.transpose(2, 0, 3, 1, 4).reshape(2, -1, *np.array(pages.shape)[[1, 4]])
        keys, values = (
            np.repeat(each[: position + 1], self.sizes.group, axis=1) for each in (keys, values)
        )
        scores = np.einsum("hd,shd->hs", query.astype(np.float64), keys)
        scores /= np.sqrt(self.sizes.head_dim)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hs,shd->hd", shares / shares.sum(-1, keepdims=True), values)
