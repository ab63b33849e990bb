"""Projections are joined at load by a table that reads both ways, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden import tiny

from duetjax.config import ModelConfig
from duetjax.model.decoder import Definition


def fusion(name):
    return Definition(ModelConfig.from_hf(tiny.CONFIGS[name]), jnp.float32).fusion


@pytest.fixture(params=sorted(tiny.CONFIGS))
def name(request):
    return request.param


def test_splitting_undoes_fusing(name):
    tensors = dict(tiny.weights(tiny.CONFIGS[name]))
    table = fusion(name)
    split = {}
    for leaf, value in table.fuse(tensors.items()):
        assert value.shape == table.leaves[leaf]
        split |= table.split(leaf, value)
    assert split.keys() == tensors.keys() == table.shapes.keys()
    for key, value in tensors.items():
        assert split[key].tobytes() == value.tobytes()
        assert split[key].shape == table.shapes[key]


def test_tensors_may_come_in_any_order_and_few_wait_for_the_others(name):
    tensors = list(tiny.weights(tiny.CONFIGS[name]))
    forwards = {leaf: value.tobytes() for leaf, value in fusion(name).fuse(tensors)}
    backwards = {leaf: value.tobytes() for leaf, value in fusion(name).fuse(tensors[::-1])}
    assert forwards == backwards
    assert forwards.keys() == fusion(name).leaves.keys()


def test_queries_keys_and_values_are_one_leaf_in_this_order():
    tensors = dict(tiny.weights(tiny.CONFIGS["qwen2"]))
    fused = dict(fusion("qwen2").fuse(tensors.items()))
    prefix = "model.layers.1.self_attn."
    parts = [tensors[f"{prefix}{part}_proj.bias"] for part in "qkv"]
    assert np.array_equal(fused[f"{prefix}qkv_proj.bias"], np.concatenate(parts))
    assert f"{prefix}q_proj.bias" not in fused


def test_a_missing_part_is_noticed():
    tensors = dict(tiny.weights(tiny.CONFIGS["qwen3"]))
    del tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(AssertionError, match="gate_proj"):
        list(fusion("qwen3").fuse(tensors.items()))
