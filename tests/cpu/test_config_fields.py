"""Every field of the configuration that the decoder reads changes what it computes.

A field that is parsed and then forgotten would serve wrong tokens without an error, so each one has
a mutation here that a parity test would notice, and a new field fails until it has one.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import tiny
from paged_case import QUICK

from duetjax.config import ModelConfig, RopeConfig
from duetjax.model.decoder import Decoder, Definition, causal_attention

NOTICED = 1e-3  # relative L2 of the logits; parity with transformers is tested to 1e-4

SCALED_ROPE = tiny.CONFIGS["llama-rope-parameters"]["rope_parameters"]
# Beside the type, what RopeConfig has for linear rope; all wavelengths under 2048 are kept.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 2.5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {**SCALED_ROPE, **changes}}


def family(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **changes}


# Field of ModelConfig, tiny model, keys of its config.json that become another.
MUTATIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("vocab_size", "mistral", {"vocab_size": 200}),
    ("hidden_size", "mistral", {"hidden_size": 72}),
    ("intermediate_size", "mistral", {"intermediate_size": 112}),
    ("num_layers", "mistral", {"num_hidden_layers": 1}),
    ("num_heads", "mistral", {"num_attention_heads": 4}),
    ("num_kv_heads", "mistral", {"num_key_value_heads": 4}),
    ("head_dim", "mistral", {"head_dim": 12}),
    ("rms_norm_eps", "mistral", {"rms_norm_eps": 2e-2}),
    ("rms_norm_eps", "qwen3", {"rms_norm_eps": 2e-2}),
    ("tie_word_embeddings", "qwen2", {"tie_word_embeddings": False}),
    ("tie_word_embeddings", "llama-mha-tied", {"tie_word_embeddings": False}),
    ("qkv_bias", "mistral", family("Qwen2ForCausalLM", "qwen2")),
    ("o_bias", "qwen2", family("LlamaForCausalLM", "llama", attention_bias=True)),
    ("mlp_bias", "llama-biases", {"mlp_bias": False}),
    ("qk_norm", "llama-rope-parameters", family("Qwen3ForCausalLM", "qwen3")),
    ("rope.theta", "llama-rope-parameters", rope(rope_theta=5000.0)),
    ("rope.theta", "llama-mha-tied", {"rope_theta": 5000.0}),
    ("rope.type", "llama-linear-rope", {"rope_scaling": LLAMA3_ROPE}),
    ("rope.factor", "llama-linear-rope", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("rope.factor", "llama-rope-parameters", rope(factor=3.0)),
    ("rope.low_freq_factor", "llama-rope-parameters", rope(low_freq_factor=1.5)),
    ("rope.high_freq_factor", "llama-rope-parameters", rope(high_freq_factor=8.0)),
    (
        "rope.original_max_position_embeddings",
        "llama-rope-parameters",
        rope(original_max_position_embeddings=128),
    ),
]

# Fields that the decoder does not read, and who does.
OTHERS = {
    "architecture": "ModelConfig.from_hf, which derives the bias and norm switches from it",
    "max_position_embeddings": "check_context, which limits max_model_len",
    "sliding_window": "check_context, which limits max_model_len",
    "dtype": "whoever loads the weights with dtype auto",
    "eos_token_ids": "the scheduler, which ends requests",
}


def fields(config: ModelConfig) -> dict[str, Any]:
    """The configuration as one flat table; those of rope are called rope.*."""
    table = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    scaling = dataclasses.asdict(table.pop("rope"))
    return table | {f"rope.{name}": value for name, value in scaling.items()}


def logits(hf: Mapping[str, Any]) -> np.ndarray:
    """Logits [N, V] of one prompt; tensors of the same name and shape have the same weights."""
    definition = Definition(ModelConfig.from_hf(hf), jnp.float32)
    weights = dict(tiny.weights(hf))
    assert {name: value.shape for name, value in weights.items()} == definition.fusion.shapes
    leaves = dict(definition.fusion.fuse(weights.items()))
    tokens = jnp.asarray(tiny.prompt("qwen3", 64))

    def run(leaves: list[jax.Array]) -> jax.Array:
        decoder = definition.bind(leaves)
        return decoder.logits(decoder(tokens, jnp.arange(len(tokens)), causal_attention))

    return np.asarray(jax.jit(run, compiler_options=QUICK)(definition.ordered(leaves)))


@cache
def original_logits(model: str) -> np.ndarray:
    return logits(tiny.CONFIGS[model])


def assert_noticed(got: np.ndarray, original: np.ndarray) -> None:
    """Different vocabularies, or logits that differ far more than a parity test lets pass."""
    if got.shape != original.shape:
        return
    change = np.linalg.norm(got - original) / np.linalg.norm(original)
    assert change > NOTICED, f"relative change {change:.1e}"


@pytest.mark.parametrize(
    ("field", "model", "changes"), MUTATIONS, ids=[f"{m[0]}-{m[1]}" for m in MUTATIONS]
)
def test_changing_one_field_changes_the_logits(field, model, changes):
    original = tiny.CONFIGS[model]
    mutated = {**original, **changes}
    before, after = fields(ModelConfig.from_hf(original)), fields(ModelConfig.from_hf(mutated))
    assert {name for name in before if before[name] != after[name]} - {"architecture"} == {field}
    assert_noticed(logits(mutated), original_logits(model))


def test_the_same_weights_divided_into_other_heads_give_other_logits():
    original = tiny.CONFIGS["mistral"]
    changes = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    mutated = {**original, **changes}
    assert tiny.tensor_shapes(mutated) == tiny.tensor_shapes(original)
    assert_noticed(logits(mutated), original_logits("mistral"))


class Watched:
    """Stands in for a configuration and notes under which names its fields are read."""

    def __init__(self, config: ModelConfig | RopeConfig, prefix: str, read: set[str]) -> None:
        self._config, self._prefix, self._read = config, prefix, read

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if isinstance(value, RopeConfig):
            return Watched(value, f"{name}.", self._read)
        self._read.add(self._prefix + name)
        return value


@pytest.fixture(scope="module")
def read_by_decoder() -> set[str]:
    """Names of the fields that building and running decoders of every kind of rope reads."""
    read: set[str] = set()
    for model in ("llama-biases", "llama-linear-rope", "llama-rope-parameters"):
        watched: Any = Watched(ModelConfig.from_hf(tiny.CONFIGS[model]), "", read)
        jax.eval_shape(partial(_build_and_run, watched))
    return read


def _build_and_run(config: ModelConfig) -> jax.Array:
    decoder = Decoder(config, nnx.Rngs(0))
    return decoder.logits(decoder(jnp.arange(2), jnp.arange(2), causal_attention))


def test_every_field_that_the_decoder_reads_has_a_mutation(read_by_decoder):
    assert read_by_decoder == {field for field, _, _ in MUTATIONS}


def test_every_other_field_has_a_reader_elsewhere(read_by_decoder):
    known = fields(ModelConfig.from_hf(tiny.CONFIGS["qwen2"])).keys()
    assert known - read_by_decoder == OTHERS.keys()
