"""FLOPs and bytes of the kernels, for rooflines: what the computation needs, not what a form moves.

duetjax/policy/roofline.py has the same formulas, for all layers and without jax (a test compares).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """Of one call, for one layer."""

    flops: float
    num_bytes: float


class Heads(NamedTuple):
    """H, K, D, and the bytes of a value."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int


def decode_cost(lengths: Sequence[int], heads: Heads, window: int | None = None) -> Cost:
    """Rows with so many keys: (4 D + 2) H FLOPs a key, keys and values once, queries and outputs.

    Rows of length 0 cost nothing.
    """
    H, K, D, s = heads
    seen = [length if window is None else min(length, window) for length in lengths]
    keys, rows = sum(seen), sum(length > 0 for length in seen)
    return Cost(float((4 * D + 2) * H * keys), float(2 * D * s * (H * rows + K * keys)))


def write_cost(tokens: int, heads: Heads) -> Cost:
    """Keys and values of so many tokens, written; reading them is their producer's."""
    return Cost(0.0, float(tokens * 2 * heads.num_kv_heads * heads.head_dim * heads.itemsize))
