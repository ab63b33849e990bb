"""Writing keys and values into pages: by XLA, and by our own kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.cost import Heads
from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.shapes import Tuning
from pallas_kernels.timing import shortest


def write_seconds(tokens: int, heads: Heads, pages: int, calls: int) -> dict[str, float]:
    """Seconds per call of both, the pages donated; tokens go to places of their own."""
    shape = (pages, heads.num_kv_heads, 2, 64, heads.head_dim)
    new = jnp.ones((tokens, heads.num_kv_heads, heads.head_dim), "bfloat16")
    place = jax.random.permutation(jax.random.key(0), (pages - 1) * 64)[:tokens] + 64
    found = {}
    for name, own in (("xla", False), ("own", True)):
        kernels = MosaicKernels(Tuning(512, 64, 2, 1), own_write=own)
        write = jax.jit(kernels.write_kv, donate_argnums=0)
        pool = jnp.zeros(shape, "bfloat16")

        def run() -> jax.Array:
            nonlocal pool
            for _ in range(calls):
                pool = write(pool, new, new, place // 64, place % 64)  # noqa: B023
            return pool

        found[name] = shortest(run) / calls
    return found
