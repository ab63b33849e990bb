"""One decoder for Llama, Mistral, Qwen2 and Qwen3 checkpoints.

The decoder knows projections, norms and rope, and nothing of pages, batches or programs: each
layer hands its queries, keys and values to an `Attend` function, which may write them to a paged
cache and walk it, or attend densely for training.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from duetjax.config import ModelConfig
from duetjax.model.fusion import Fusion, part_rows
from duetjax.model.layers import (
    MLP,
    Embedding,
    Linear,
    Product,
    RMSNorm,
    product,
    rope_frequencies,
    rotate,
)

type Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""(layer, q [..., N, H, D], k [..., N, K, D], v [..., N, K, D]) -> [..., N, H, D]."""


class Attention(nnx.Module):
    """Projections of one attention layer; the attention itself is the caller's."""

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, product: Product
    ) -> None:
        c, d = config, config.head_dim
        rows = part_rows(c)["qkv_proj"]
        linear = partial(Linear, dtype=dtype, rngs=rngs, product=product)
        self.qkv_proj = linear(c.hidden_size, sum(rows), bias=c.qkv_bias)
        self.o_proj = linear(rows[0], c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(d, c.rms_norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(d, c.rms_norm_eps, dtype=dtype) if c.qk_norm else None
        self.head_dim = d
        self.ends_of_q_and_k = (c.num_heads, c.num_heads + c.num_kv_heads)

    def __call__(self, x: jax.Array, angles: jax.Array, attend: Attend, layer: int) -> jax.Array:
        """x [..., N, hidden], angles [..., N, D/2] -> [..., N, hidden]."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = jnp.split(self.qkv_proj(x).reshape(heads), self.ends_of_q_and_k, axis=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, rotate(q, angles), rotate(k, angles), v)
        return self.o_proj(out.reshape((*x.shape[:-1], -1)))


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, product: Product
    ) -> None:
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(c, dtype=dtype, rngs=rngs, product=product)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(
            c.hidden_size,
            c.intermediate_size,
            bias=c.mlp_bias,
            dtype=dtype,
            rngs=rngs,
            product=product,
        )

    def __call__(self, x: jax.Array, angles: jax.Array, attend: Attend, layer: int) -> jax.Array:
        """x [..., N, hidden] -> [..., N, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nnx.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, product: Product
    ) -> None:
        c = config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(c, dtype=dtype, rngs=rngs, product=product) for _ in range(c.num_layers)]
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)


class Decoder(nnx.Module):
    """A causal language model; parameters' paths are Hugging Face's names, some of them fused."""

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        product: Product = product,
    ) -> None:
        c, self.config, self.product = config, config, product
        linear = partial(Linear, bias=False, dtype=dtype, rngs=rngs, product=product)
        self.model = DecoderStack(c, dtype=dtype, rngs=rngs, product=product)
        self.lm_head = None if c.tie_word_embeddings else linear(c.hidden_size, c.vocab_size)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """tokens, positions [..., N] int32 -> normed hidden states [..., N, hidden]."""
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        x = self.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, angles, attend, index)
        return self.model.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., hidden_size] -> float32 [..., V], for the rows that need them only."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return self.product(hidden, head.weight[...], jnp.float32)


def causal_attention(_layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense causal attention over N positions: the `Attend` of training and of oracles."""
    N, H, D = q.shape[-3:]
    K = k.shape[-2]
    grouped = q.reshape((*q.shape[:-2], K, H // K, D))
    scores = jnp.einsum("...qkgd,...skd->...kgqs", grouped, k, preferred_element_type=jnp.float32)
    visible = jnp.arange(N)[:, None] >= jnp.arange(N)
    weights = jax.nn.softmax(jnp.where(visible, scores * D**-0.5, -jnp.inf), axis=-1)
    return jnp.einsum("...kgqs,...skd->...qkgd", weights.astype(v.dtype), v).reshape(q.shape)


class Definition:
    """A decoder's structure without its weights: their names and shapes, and how to bind them.

    fusion: the names and shapes of the flat leaves that programs take, in order (a flat list is the
    cheapest thing to call a compiled program with), and of the checkpoint's tensors. Allocates
    nothing.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, product: Product = product) -> None:
        abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype, product))
        graph, state = nnx.split(abstract)
        self._graph: nnx.GraphDef[Decoder] = graph
        self._tree = jax.tree.structure(state)
        paths = nnx.to_flat_state(state)
        self.fusion = Fusion(config, {".".join(map(str, path)): leaf.shape for path, leaf in paths})

    def ordered(self, leaves: Mapping[str, jax.Array]) -> list[jax.Array]:
        """Arranges leaves by name as programs take them; every name must be there."""
        return [leaves[name] for name in self.fusion.leaves]

    def bind(self, leaves: Sequence[jax.Array]) -> Decoder:
        """The decoder with these flat leaves; cheap, meant for use inside a traced function."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))
