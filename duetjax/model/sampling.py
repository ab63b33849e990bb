"""Choosing the next token inside a program: greedy or by temperature, one seed per row."""

import jax
import jax.numpy as jnp

_GREEDY_BELOW = 1e-5  # dividing logits by less would overflow; vLLM draws the line there too


def sample(
    logits: jax.Array, temperature: jax.Array, seed: jax.Array, position: jax.Array
) -> jax.Array:
    """One token id per row, int32 [B].

    logits [B, V] float32; temperature [B] float32, under 1e-5 is greedy; seed [B, 2] uint32;
    position [B] int32: where the new token will stand. The random bits are a function of (seed,
    position) alone, so a row draws the same in any batch and after a recompute, up to rounding of
    its logits. Drawing is by the Gumbel-max trick: argmax(logits / temperature + Gumbel noise).
    """
    greedy = temperature < _GREEDY_BELOW
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    noise = jax.vmap(_gumbel, (0, 0, None))(seed, position, logits.shape[1])
    return jnp.argmax(scaled + jnp.where(greedy[:, None], 0.0, noise), axis=-1).astype(jnp.int32)


def _gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (size,))
