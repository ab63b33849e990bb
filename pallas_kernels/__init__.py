"""Paged attention and KV writes over pages [P, K, 2, S, D]: page, kv head, K or V, slot, dim.

One interface, several implementations, a module each; so far `xla`, which serves on CPU and is the
oracle of the others.
"""
