"""What a model's programs cost by its shapes alone: nothing is compiled for it.

XLA's own count of programs for a processor is of no use: attention over all of the KV cache is in
it, and slot state, however few rows are touched. See `runtime.profile` for programs of a GPU.
"""

from math import prod

import jax.numpy as jnp

from duetjax.config import ModelConfig
from duetjax.policy.launch import Program
from duetjax.policy.profiles import Cost, ModelProfile
from duetjax.runtime.profile import product_flops
from duetjax.runtime.programs import Buckets, Key, Programs

SOURCE = "no device: from the model's shapes"
"""Stands for the GPU that other profiles were compiled for."""


def shape_profile(name: str, config: ModelConfig, programs: Programs) -> ModelProfile:
    """The profile of a model that no compilation was analysed for.

    Of each product of N rows with a matrix [o, i]: 2 N i o FLOPs and (N i + i o + N o) s bytes, s
    being the bytes of a value (DuetServe, arXiv 2511.04791, its table of operators).
    """
    return ModelProfile(
        model=name,
        compiled_for=SOURCE,
        dtype_bytes=_dtype_bytes(programs),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        costs={
            key: Cost(product_flops(programs, key), _product_bytes(programs, key))
            for key in programs.buckets
        },
    )


def _product_bytes(programs: Programs, key: Key) -> float:
    leaves = programs.definition.fusion.leaves
    matrices = [shape for name, shape in leaves.items() if ".layers." in name and shape[1:]]
    head = leaves["model.embed_tokens.weight"]
    tokens, rows = key[1], _rows(programs.buckets, key)
    values = sum(prod(shape) + tokens * sum(shape) for shape in matrices)
    values += prod(head) + rows * sum(head)
    return float(values * _dtype_bytes(programs))


def _dtype_bytes(programs: Programs) -> int:
    return int(jnp.dtype(programs.layout.dtype).itemsize)


def _rows(buckets: Buckets, key: Key) -> int:
    """Rows that get logits."""
    program, size = key
    return size if program is Program.DECODE else buckets.rows_of(size)
