"""What decode and prefill share of the online softmax (Dao 2022): its state, and its scores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.shapes import WGMMA_ROWS

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

FP8_WEIGHTS = 256.0
"""Weights with a scale of V in them are small: so many times as large they are float16's size."""


class Softmax(NamedTuple):
    """Where 64 rows are: peak score [64] in base 2, sum of weights [64], weighted V [64, D]."""

    peak: jax.Array
    total: jax.Array
    values: jax.Array

    @classmethod
    def start(cls, columns: int, depth: float) -> "Softmax":
        """No key seen yet, and peaks so far below 0."""
        column = jnp.zeros((WGMMA_ROWS,), jnp.float32)
        values = jnp.zeros((WGMMA_ROWS, columns), jnp.float32)
        whole, one_per_row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        return cls(
            plgpu.layout_cast(column - depth, one_per_row),
            plgpu.layout_cast(column, one_per_row),
            plgpu.layout_cast(values, whole),
        )


def scaled(products: jax.Array, scale: jax.Array | float, cap: float | None) -> jax.Array:
    """Scores in base 2. tanh is made of exp2: the GPU's own has 11 bits."""
    if cap is None:
        return products * (scale * LOG2_E)
    top = cap * LOG2_E
    return top - 2 * top / (jnp.exp2(products * (scale * (2 * LOG2_E / cap))) + 1)
