"""Building blocks of a Llama-family decoder, named as in a Hugging Face checkpoint.

Arrays carry any number of leading axes: [..., N, features]. Weights keep the checkpoint's layout,
[out, in] for projections, so that loading moves no data.
"""

import math
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from duetjax.config import RopeConfig, RopeType

_FEW_ROWS = 16


class Product(Protocol):
    """How a model multiplies by its weights."""

    def __call__(
        self, x: jax.Array, weight: jax.Array, /, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """x [..., in] @ weight.T, weight [out, in] -> [..., out] in `dtype`, None for x's."""


def product(x: jax.Array, weight: jax.Array, /, dtype: DTypeLike | None = None) -> jax.Array:
    """See `Product`; in plain XLA.

    For few rows XLA's processor backend reads float32 weights twice as fast as the left operand.
    The barrier keeps it from turning that round again.
    """
    few = math.prod(x.shape[:-1]) <= _FEW_ROWS and x.dtype == weight.dtype == jnp.float32

    def usual(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)

    def turned(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y: jax.Array = jax.lax.optimization_barrier(jnp.einsum("oi,bi->ob", weight, rows))
        return y.T.reshape((*x.shape[:-1], -1))

    if not few:
        return usual(x, weight)
    y: jax.Array = jax.lax.platform_dependent(x, weight, cpu=turned, default=usual)
    return y


class Linear(nnx.Module):
    """y = x @ weight.T + bias, with weight [out, in]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        product: Product,
    ) -> None:
        scale = in_features**-0.5
        self.weight = nnx.Param(_normal(rngs, (out_features, in_features), scale, dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None
        self.product = product

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        y = self.product(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Token embedding, weight [V, hidden]; also the output head where embeddings are tied."""

    def __init__(self, vocab: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(_normal(rngs, (vocab, hidden), hidden**-0.5, dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 -> [..., hidden]."""
        return self.weight[...][tokens]


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, features: int, eps: float, *, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones(features, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., features] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        return normed.astype(x.dtype) * self.weight[...]


class MLP(nnx.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        product: Product,
    ) -> None:
        linear = partial(Linear, bias=bias, dtype=dtype, rngs=rngs, product=product)
        self.gate_up_proj = linear(hidden, 2 * intermediate)
        self.down_proj = linear(intermediate, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., hidden] -> [..., hidden]."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    theta^(-2i/D) (Su et al. 2021); `linear` divides all by factor; `llama3` divides those of
    wavelengths beyond original / low_freq_factor, keeps those under original / high_freq_factor
    and interpolates between (Llama 3.1 model card).
    """
    inverse = rope.theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.type is RopeType.DEFAULT:
        return inverse
    if rope.type is RopeType.LINEAR:
        return inverse / rope.factor
    turns = rope.original_max_position_embeddings * inverse / (2 * jnp.pi)
    band = rope.high_freq_factor - rope.low_freq_factor
    keep = jnp.clip((turns - rope.low_freq_factor) / band, 0, 1)
    return inverse * (keep + (1 - keep) / rope.factor)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + D/2) of x [..., N, H, D] by angles [..., N, D/2], in float32."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: DTypeLike) -> jax.Array:
    return (scale * jax.random.normal(rngs.params(), shape)).astype(dtype)
