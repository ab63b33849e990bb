"""What programs cost by the model's shapes alone, against numbers worked out by hand."""

import math

import pytest
from golden import tiny

from duetjax.config import ModelConfig
from duetjax.model.decoder import Definition
from duetjax.policy.launch import Program
from duetjax.policy.profiles import ModelProfile
from duetjax.policy.shape_profile import shape_profile

BUCKETS = (*((Program.DECODE, n) for n in (2, 4)), *((Program.PREFILL, n) for n in (64, 256)))


def profile_of(model, dtype_bytes):
    config = ModelConfig.from_hf(tiny.CONFIGS[model])
    return config, shape_profile("mine", config, dtype_bytes, BUCKETS, prefill_rows=4)


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("model", ["mistral", "qwen2", "llama-mha-tied"])
def test_flops_and_bytes_are_those_of_the_products(model, size):
    config, profile = profile_of(model, size)
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    matrices = [(hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 2 * inner)]
    matrices = [*matrices, (inner, hidden)] * config.num_layers
    for (program, tokens), cost in profile.costs.items():
        rows = tokens if program is Program.DECODE else 4
        products = [(tokens, i, o) for i, o in matrices] + [(rows, hidden, vocabulary)]
        assert cost.flops == sum(2 * n * i * o for n, i, o in products)
        assert cost.bytes == size * sum(n * i + i * o + n * o for n, i, o in products)
    assert profile.costs.keys() == set(BUCKETS)


def test_it_is_a_profile_like_any_other():
    config, profile = profile_of("mistral", 4)
    assert ModelProfile.from_json(profile.to_json(), "a") == profile
    assert (profile.model, profile.dtype_bytes) == ("mine", 4)
    assert (profile.num_layers, profile.vocab_size) == (config.num_layers, config.vocab_size)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_parameters_are_those_of_a_checkpoint(name):
    config = ModelConfig.from_hf(tiny.CONFIGS[name])
    shapes = Definition(config, "float32").fusion.shapes.values()
    assert config.num_parameters == sum(math.prod(shape) for shape in shapes)
