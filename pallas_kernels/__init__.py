"""Paged attention and KV writes over pages [P, K, 2, S, D]: page, kv head, K or V, slot, dim.

One interface, several implementations; so far the one in plain XLA, which serves on CPU and is
the oracle of the others.
"""

from pallas_kernels.xla import decode_attention, prefill_attention, write_kv

__all__ = ["decode_attention", "prefill_attention", "write_kv"]
