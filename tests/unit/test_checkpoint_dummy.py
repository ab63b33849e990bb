"""Random weights for --load-format dummy."""

import hashlib

import ml_dtypes
import numpy as np
import pytest

from duetjax.checkpoint import dummy
from duetjax.checkpoint.dummy import dummy_weights
from duetjax.config import ConfigError

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
SHAPES = {
    "model.embed_tokens.weight": (1500, 1024),
    "model.layers.0.self_attn.q_proj.weight": (64, 1024),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.self_attn.q_norm.weight": (16,),
    "model.norm.weight": (1024,),
}


def test_every_name_comes_once_in_its_shape_and_dtype():
    weights = list(dummy_weights(SHAPES, BF16, seed=0))
    assert {name: value.shape for name, value in weights} == SHAPES
    assert len(weights) == len(SHAPES)
    assert {value.dtype for _, value in weights} == {BF16}


def test_norms_are_ones_and_the_rest_small_normals():
    for name, value in dummy_weights(SHAPES, F32, seed=0):
        if "norm" in name:
            np.testing.assert_array_equal(value, 1)
        else:
            assert 0.015 < value.std() < 0.025
            assert abs(value).max() < 0.2


def test_rows_of_a_tensor_larger_than_a_block_differ():
    embedding = dict(dummy_weights(SHAPES, BF16, seed=0))["model.embed_tokens.weight"]
    assert len(np.unique(embedding.astype(np.float32), axis=0)) == len(embedding)


def test_the_seed_and_the_name_decide_every_bit_whatever_else_is_drawn():
    name = "model.layers.0.self_attn.q_proj.weight"
    alone = dict(dummy_weights({name: SHAPES[name]}, F32, seed=7))[name]
    np.testing.assert_array_equal(alone, dict(dummy_weights(SHAPES, F32, seed=7))[name])
    digest = hashlib.sha256(alone.astype("<f4").tobytes()).hexdigest()
    assert digest.startswith("1ef7550b1b5e78d8")
    assert not np.array_equal(alone, dict(dummy_weights(SHAPES, F32, seed=8))[name])
    other = dict(dummy_weights({"other.weight": SHAPES[name]}, F32, seed=7))["other.weight"]
    assert not np.array_equal(alone, other)


def test_a_model_larger_than_memory_is_refused_before_anything_is_drawn():
    shapes = {f"model.layers.{i}.weight": (2**23, 2**23) for i in range(3)}
    with pytest.raises(ConfigError) as refusal:
        dummy_weights(shapes, BF16, seed=0)
    assert "the weights take 422212.5 GB in bfloat16, this machine has" in str(refusal.value)
    assert "choose a smaller model" in str(refusal.value)


def test_a_model_just_within_memory_is_not_refused(monkeypatch):
    need = sum(np.prod(shape) for shape in SHAPES.values()) * 2
    monkeypatch.setattr(dummy, "host_memory", lambda: need)
    dummy_weights(SHAPES, BF16, seed=0)
    monkeypatch.setattr(dummy, "host_memory", lambda: need - 1)
    with pytest.raises(ConfigError):
        dummy_weights(SHAPES, BF16, seed=0)
