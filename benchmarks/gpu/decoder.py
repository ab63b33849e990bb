"""A decoder of realistic width in plain JAX, with random weights, as the launcher wants programs.

KV arrays [P, K, 2, S, D] are donated and scattered into in place; nothing else is donated; every
output passes through the marker. Attention gathers pages and is not made to be fast. Loads jax.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

MARKER = "duetjax_marker"
OPTIONS: Mapping[str, Any] = {"xla_gpu_enable_command_buffer": "", "xla_gpu_enable_pdl": False}
CANDIDATES = 8

type Arrays = tuple[jax.Array, ...]
type Weights = dict[str, Any]
type Lowered = jax.stages.Lowered
type Tokens = np.ndarray[Any, np.dtype[np.int32]]
type Abstract = Callable[[tuple[int, ...], DTypeLike], jax.ShapeDtypeStruct]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes: rows decode together, each with pages of its own; one prompt is prefilled."""

    layers: int = 4
    rows: int = 16
    width: int = 2048
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 8192
    vocab: int = 32_000
    page: int = 64
    row_pages: int = 8
    prompt: int = 2048

    @property
    def prompt_pages(self) -> int:
        """Pages of the prompt."""
        return self.prompt // self.page

    @property
    def pages(self) -> int:
        """All of them, and one that nobody owns."""
        return 1 + self.rows * self.row_pages + self.prompt_pages

    @property
    def kv(self) -> tuple[int, ...]:
        """Of a layer's KV array."""
        return (self.pages, self.kv_heads, 2, self.page, self.head_dim)


def mark(outputs: tuple[jax.Array, ...], program: int) -> tuple[jax.Array, ...]:
    """Passes outputs through the marker, aliased, so that it is the last thing to run."""
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in outputs]
    aliases = {index: index for index in range(len(outputs))}
    call = jax.ffi.ffi_call(MARKER, shapes, input_output_aliases=aliases)
    return tuple(call(*outputs, program=np.int64(program)))


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    normed: jax.Array = (x * lax.rsqrt(square + 1e-5)).astype(x.dtype) * scale
    return normed


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """q [N, Q, K, G, D], k and v [N, C, K, D], seen [N, Q, C] -> [N, Q, K, G, D]."""
    scores = jnp.einsum("nqkgd,nckd->nkgqc", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e9), -1).astype(q.dtype)
    attended: jax.Array = jnp.einsum("nkgqc,nckd->nqkgd", weights, v)
    return attended


def _project(shape: Shape, x: jax.Array, w: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[N, E] -> q [N, K, G, D], k and v [N, K, D]."""
    h, K, D = _norm(x, w["norm1"]), shape.kv_heads, shape.head_dim
    q = (h @ w["q"]).reshape(-1, K, shape.heads // K, D)
    return q, (h @ w["k"]).reshape(-1, K, D), (h @ w["v"]).reshape(-1, K, D)


def _rest(x: jax.Array, attended: jax.Array, w: Weights) -> jax.Array:
    x = x + attended.reshape(x.shape[0], -1) @ w["o"]
    h = _norm(x, w["norm2"])
    out: jax.Array = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    return out


def _choose(x: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """The best token of each row, and the scores of the best few."""
    logits = (_norm(x, weights["norm"]) @ weights["head"]).astype(jnp.float32)
    scores, ids = lax.top_k(logits, CANDIDATES)
    return ids[:, 0], scores


def decode(
    shape: Shape,
    program: int,
    weights: Weights,
    kv: Arrays,
    state: Arrays,
) -> Arrays:
    """A step of every row. state: token [B], position [B], page table [B, M].

    Returns the KV arrays, the next tokens and positions, and scores [B, CANDIDATES].
    """
    token, position, table = state
    context = shape.row_pages * shape.page
    place = jnp.take_along_axis(table, position[:, None] // shape.page, 1)[:, 0]
    seen = (jnp.arange(context)[None] <= position[:, None])[:, None]
    x, written = weights["embedding"][token], list(kv)
    for i, w in enumerate(weights["layers"]):
        q, k, v = _project(shape, x, w)
        new = jnp.stack([k, v], 2)
        written[i] = written[i].at[place, :, :, position % shape.page].set(new, unique_indices=True)
        pages = written[i][table].transpose(3, 0, 1, 4, 2, 5)  # [2, B, M, S, K, D]
        keys, values = pages.reshape(2, shape.rows, context, shape.kv_heads, shape.head_dim)
        x = _rest(x, _attend(q[:, None], keys, values, seen), w)
    token, scores = _choose(x, weights)
    return mark((*written, token, (position + 1) % context, scores), program)


def prefill(
    shape: Shape,
    program: int,
    weights: Weights,
    kv: Arrays,
    state: Arrays,
) -> Arrays:
    """A whole prompt. state: tokens [T], pages [T / S].

    Returns the KV arrays, the next token [1] and scores [1, CANDIDATES].
    """
    tokens, pages = state
    place = jnp.arange(shape.prompt)
    seen = (place[:, None] >= place[None])[None]
    x, written = weights["embedding"][tokens], list(kv)
    for i, w in enumerate(weights["layers"]):
        q, k, v = _project(shape, x, w)
        new = jnp.stack([k, v], 2)
        at = written[i].at[pages[place // shape.page], :, :, place % shape.page]
        written[i] = at.set(new, unique_indices=True)
        x = _rest(x, _attend(q[None], k[None], v[None], seen), w)
    token, scores = _choose(x[-1:], weights)
    return mark((*written, token, scores), program)


def weight_shapes(shape: Shape) -> dict[str, Any]:
    """Shapes of the weights, as a tree."""
    E, F, D = shape.width, shape.hidden, shape.head_dim
    layer = {
        "norm1": (E,), "norm2": (E,), "q": (E, shape.heads * D), "k": (E, shape.kv_heads * D),
        "v": (E, shape.kv_heads * D), "o": (shape.heads * D, E), "gate": (E, F), "up": (E, F),
        "down": (F, E),
    }  # fmt: skip
    top = {"embedding": (shape.vocab, E), "head": (E, shape.vocab), "norm": (E,)}
    return {**top, "layers": [layer] * shape.layers}


def random_weights(shape: Shape) -> Weights:
    """Weights that keep activations near 1; made on the host, the same ones everywhere."""
    draw = np.random.default_rng(0)

    def make(size: tuple[int, ...]) -> jax.Array:
        if len(size) == 1:
            return jnp.ones(size, jnp.bfloat16)
        values = draw.random(size, np.float32) - 0.5
        return jnp.asarray(values * (12 / size[0]) ** 0.5, jnp.bfloat16)

    made: Weights = jax.tree.map(make, weight_shapes(shape), is_leaf=lambda x: type(x) is tuple)
    return made


def decode_state(shape: Shape) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Shapes of the state of the two programs, all int32."""
    B = shape.rows
    return ((B,), (B,), (B, shape.row_pages)), ((shape.prompt,), (shape.prompt_pages,))


def lower(shape: Shape, name: str, program: int, abstract: Abstract) -> Lowered:
    """Lowers "decode" or "prefill". abstract(shape, dtype) makes an argument's description."""
    body, sizes = {
        "decode": (decode, decode_state(shape)[0]),
        "prefill": (prefill, decode_state(shape)[1]),
    }[name]

    def run(weights: Weights, kv: Arrays, state: Arrays) -> Arrays:
        return body(shape, program, weights, kv, state)

    weights = jax.tree.map(
        lambda size: abstract(size, jnp.bfloat16),
        weight_shapes(shape),
        is_leaf=lambda x: type(x) is tuple,
    )
    kv = tuple(abstract(shape.kv, jnp.bfloat16) for _ in range(shape.layers))
    state = tuple(abstract(size, jnp.int32) for size in sizes)
    return jax.jit(run, donate_argnums=(1,)).lower(weights, kv, state)


def first_tokens(shape: Shape, salt: int) -> Tokens:
    """A token for each row, others for another `salt`."""
    return ((np.arange(shape.rows) * 997 + salt * 7919 + 1) % shape.vocab).astype(np.int32)


def page_table(shape: Shape) -> Tokens:
    """Pages of decode's rows; the prompt's come behind them."""
    pages = np.arange(1, 1 + shape.rows * shape.row_pages, dtype=np.int32)
    return pages.reshape(shape.rows, shape.row_pages)


def prompt_table(shape: Shape) -> Tokens:
    """Pages of the prompt."""
    return np.arange(shape.pages - shape.prompt_pages, shape.pages, dtype=np.int32)


def prompt_tokens(shape: Shape) -> Tokens:
    """The prompt."""
    return ((np.arange(shape.prompt) * 131 + 5) % shape.vocab).astype(np.int32)
