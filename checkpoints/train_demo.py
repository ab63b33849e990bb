"""Trains the demo checkpoint from nothing, on text that corpus.py writes: seeded, on the CPU.

`python checkpoints/train_demo.py` writes checkpoints/demo (see README.md beside this file);
`--documents` makes a shorter run and `--output` another folder.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus
import demo_folder
import jax
import jax.numpy as jnp
import numpy as np
import optax
from chat_format import Encoded, encode, train_tokenizer
from flax import nnx

from duetjax.config import ModelConfig
from duetjax.model.decoder import Decoder, Definition

SEED = 7
BATCH_TOKENS = 2048
WIDTHS = (40, 48, 64, 96, 160, 256, 512)  # columns of a batch; longer documents are cut
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 80


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one width: tokens int32 [B, N] and the loss weight of each, float32 [B, N]."""

    tokens: np.ndarray
    weights: np.ndarray


def batches(documents: Sequence[Encoded], rng: np.random.Generator) -> list[Batch]:
    """Rows of similar length together, in random order; every batch has BATCH_TOKENS tokens."""
    by_width: dict[int, list[Encoded]] = {width: [] for width in WIDTHS}
    for document in documents:
        fitting = (width for width in WIDTHS if len(document.ids) <= width)
        by_width[next(fitting, WIDTHS[-1])].append(document)
    made = []
    for width, rows in by_width.items():
        size = BATCH_TOKENS // width
        made += [_batch(rows[i : i + size], size, width) for i in range(0, len(rows), size)]
    return [made[i] for i in rng.permutation(len(made))]


def _batch(rows: Sequence[Encoded], size: int, width: int) -> Batch:
    tokens = np.zeros((size, width), np.int32)
    weights = np.zeros((size, width), np.float32)
    for row, document in enumerate(rows):
        length = min(len(document.ids), width)
        tokens[row, :length] = document.ids[:length]
        weights[row, :length] = document.weights[:length]
    return Batch(tokens, weights)


def loss(decoder: Decoder, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean cross-entropy of each next token; tokens and weights [B, N]."""
    positions = jnp.arange(tokens.shape[1] - 1)
    logits = decoder.logits(decoder(tokens[:, :-1], positions, attend))
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(entropies * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def attend(_layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense causal attention as two batched matrix products a head group.

    The same sums as duetjax.model.decoder.causal_attention, in the layout that XLA's CPU backend
    multiplies fastest: rows of one kv head side by side. q [B, N, H, D], k and v [B, N, K, D].
    """
    B, N, H, D = q.shape
    K = k.shape[2]
    G = H // K
    queries = q.reshape(B, N, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B * K, G * N, D)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(B * K, N, D) for x in (k, v))
    visible = jnp.tile(jnp.arange(N)[:, None] >= jnp.arange(N), (G, 1))
    scores = jnp.einsum("bqd,bsd->bqs", queries, keys) * D**-0.5
    mixed = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ values
    return mixed.reshape(B, K, G, N, D).transpose(0, 3, 1, 2, 4).reshape(B, N, H, D)


def train(decoder: Decoder, order: Sequence[Batch]) -> Iterator[float]:
    """Takes one step a batch, in place; yields each step's loss."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_LEARNING_RATE, WARM_UP_STEPS, len(order), 0.02 * PEAK_LEARNING_RATE
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=_matrices),
    )
    graph, weights = nnx.split(decoder)
    state = optimizer.init(weights)

    @jax.jit(donate_argnums=(0, 1))
    def step(weights, state, tokens, loss_weights):  # noqa: ANN001, ANN202
        value, gradients = jax.value_and_grad(
            lambda w: loss(nnx.merge(graph, w), tokens, loss_weights)
        )(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, value

    for batch in order:
        weights, state, value = step(weights, state, batch.tokens, batch.weights)
        yield float(value)
    nnx.update(decoder, weights)


def _matrices(weights: nnx.State) -> nnx.State:
    """What weight decay applies to: projections and embeddings, not the norms."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, weights)


def named(decoder: Decoder) -> dict[str, np.ndarray]:
    """A decoder's weights by their Hugging Face names."""
    split = Definition(decoder.config, jnp.float32).fusion.split
    leaves = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in leaves:
        tensors |= split(".".join(map(str, path)), np.asarray(leaf[...]))
    return tensors


def main() -> None:
    """Writes the text, trains tokenizer and model on it, and saves the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=corpus.DOCUMENTS, help="texts to train on")
    parser.add_argument("--output", type=Path, default=demo_folder.DEMO, help="folder to write")
    options = parser.parse_args()
    started = time.monotonic()
    documents = list(corpus.documents(options.documents))
    tokenizer = train_tokenizer(document.text() for document in documents)
    order = batches(encode(tokenizer, documents), np.random.default_rng(SEED))
    decoder = Decoder(ModelConfig.from_hf(demo_folder.CONFIG), nnx.Rngs(SEED))
    print(f"{len(documents)} documents, {len(order)} steps, {time.monotonic() - started:.0f} s")
    recent = 0.0
    for number, value in enumerate(train(decoder, order), 1):
        recent = value if number == 1 else 0.95 * recent + 0.05 * value
        if number % 50 == 0 or number == len(order):
            spent = time.monotonic() - started
            left = spent / number * (len(order) - number)
            print(f"step {number}: loss {recent:.3f}, {spent:.0f} s, {left:.0f} s left", flush=True)
    demo_folder.write(options.output, tokenizer, named(decoder))
    print(f"{time.monotonic() - started:.0f} s, {time.process_time():.0f} s of processor time")


if __name__ == "__main__":
    main()
