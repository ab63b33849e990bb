"""What programs cost by the model's shapes alone, against numbers worked out by hand."""

import pytest
from golden import tiny

from duetjax.config import ModelConfig
from duetjax.model.kv_pages import KVLayout
from duetjax.policy.launch import Program
from duetjax.policy.profiles import ModelProfile
from duetjax.runtime.programs import Buckets, Programs
from duetjax.runtime.shape_profile import shape_profile
from duetjax.runtime.slot_state import SlotShapes
from duetjax.runtime.target import local_target
from pallas_kernels import xla

BUCKETS = Buckets(decode=(2, 4), prefill=(64, 256), prefill_rows=4)


def profile_of(model, dtype):
    config = ModelConfig.from_hf(tiny.CONFIGS[model])
    layout = KVLayout.of(config, 64, 16, dtype)
    slots = SlotShapes(4, 16, config.vocab_size)
    programs = Programs(config, layout, slots, BUCKETS, local_target(), xla)
    return config, shape_profile("mine", config, programs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["mistral", "qwen2", "llama-mha-tied"])
def test_flops_and_bytes_are_those_of_the_products(model, dtype):
    config, profile = profile_of(model, dtype)
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    matrices = [(hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 2 * inner)]
    matrices = [*matrices, (inner, hidden)] * config.num_layers
    size = {"float32": 4, "bfloat16": 2}[dtype]
    for (program, tokens), cost in profile.costs.items():
        rows = tokens if program is Program.DECODE else 4
        products = [(tokens, i, o) for i, o in matrices] + [(rows, hidden, vocabulary)]
        assert cost.flops == sum(2 * n * i * o for n, i, o in products)
        assert cost.bytes == size * sum(n * i + i * o + n * o for n, i, o in products)
    assert profile.costs.keys() == set(BUCKETS)


def test_it_is_a_profile_like_any_other():
    config, profile = profile_of("mistral", "float32")
    assert ModelProfile.from_json(profile.to_json(), "a") == profile
    assert (profile.model, profile.dtype_bytes) == ("mine", 4)
    assert (profile.num_layers, profile.vocab_size) == (config.num_layers, config.vocab_size)
