"""Writes new keys and values into pages in place on NVIDIA Hopper, a block per token."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.shapes import Ref


def write_tokens(
    pages: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, slot: jax.Array
) -> jax.Array:
    """The kernel behind `write_kv`; operands and meaning as in `pallas_kernels.xla.write_kv`.

    In place where `pages` is donated: the kernel gets them as a mutable reference. 2 K D must be a
    multiple of the 128 threads of a block.
    """
    N, K, D = k.shape
    run: Any = plgpu.kernel(
        _write_one,
        scratch_types=[
            plgpu.SMEM((2, K, D), k.dtype),
            plgpu.SMEM((2, K, D), pages.dtype),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(N,),
        grid_names=("token",),
        kernel_name="write_kv",
    )
    ref = jax.new_ref(pages)
    run(k, v, page, slot, ref)
    written: jax.Array = jax.freeze(ref)
    return written


def _write_one(
    k: Ref, v: Ref, page: Ref, slot: Ref, pages: Ref, new_s: Ref, clean_s: Ref, here: Ref
) -> None:
    """Non-finite values become 0, those that overflow in the pages' type too."""
    token = lax.axis_index("token")
    for which, new in enumerate((k, v)):
        plgpu.copy_gmem_to_smem(new.at[token], new_s.at[which], here)
    place, row = page[token], slot[token]
    plgpu.barrier_wait(here)
    values = new_s[...].astype(clean_s.dtype).astype(jnp.float32)
    clean_s[...] = jnp.where(jnp.abs(values) < jnp.inf, values, 0.0).astype(clean_s.dtype)
    plgpu.commit_smem()
    for which in range(2):
        plgpu.copy_smem_to_gmem(clean_s.at[which], pages.at[place, :, which, row])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
