"""Paged attention and KV writes over pages [P, K, 2, S, D]: page, kv head, K or V, slot, dim.

One interface, several implementations: `xla` serves on CPU, is the oracle of the others and has the
meaning of each function; `xla_fixed` is the same work in a form that a GPU can replay; `mosaic` is
Pallas for NVIDIA Hopper. `choice` says which of them a GPU gets, and why.
"""
