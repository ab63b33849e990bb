"""One dense pass of the decoder against Hugging Face transformers, from files to logits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import tiny
from paged_case import QUICK

from duetjax.checkpoint.huggingface import read_weights
from duetjax.checkpoint.source import resolve_model
from duetjax.model.decoder import Definition, causal_attention

GOLDEN = Path(tiny.__file__).parent


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        assert arrays["fingerprint"] == tiny.fingerprint(name), "made from other weights"
        return dict(arrays)


def dense_logits(folder: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    """Logits [N, V] of tokens [N] by the decoder in a model folder."""
    definition = Definition(resolve_model(str(folder)).config, dtype)
    weights = read_weights(folder, definition.fusion.shapes, np.dtype(jnp.dtype(dtype)))
    arrays = {name: jnp.asarray(value) for name, value in definition.fusion.fuse(weights)}
    run = jax.jit(_logits, static_argnums=0, compiler_options=QUICK)
    return np.asarray(run(definition, arrays, tokens))


def _logits(definition: Definition, arrays, tokens):
    decoder = definition.bind(definition.ordered(arrays))
    return decoder.logits(decoder(tokens, jnp.arange(len(tokens)), causal_attention))


def relative_l2(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def test_every_golden_file_belongs_to_a_tiny_model():
    assert {file.stem for file in GOLDEN.glob("*.npz")} == tiny.CONFIGS.keys()


def test_float32_logits_equal_those_of_transformers(name, golden, tmp_path):
    tiny.write_checkpoint(name, tmp_path)
    logits = dense_logits(tmp_path, golden["tokens"], "float32")
    assert logits.dtype == np.float32
    assert relative_l2(logits, golden["logits"]).max() <= 1e-4
    steps = slice(int(golden["prompt_len"]) - 1, -1)
    assert np.array_equal(logits[steps].argmax(-1), golden["tokens"][steps.start + 1 :])


@pytest.fixture(scope="module")
def bfloat16_logits(name, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    tiny.write_checkpoint(name, folder, dtype="bfloat16", shards=3)
    return dense_logits(folder, golden["tokens"], "bfloat16")


def test_bfloat16_logits_follow_those_of_transformers(golden, bfloat16_logits):
    assert bfloat16_logits.dtype == np.float32
    assert relative_l2(bfloat16_logits, golden["logits_bf16"]).max() <= 2e-2
    same = bfloat16_logits.argmax(-1) == golden["logits_bf16"].argmax(-1)
    assert same.mean() >= 0.97


def test_bfloat16_is_no_further_from_float32_than_in_transformers(golden, bfloat16_logits):
    ours = relative_l2(bfloat16_logits, golden["logits"]).mean()
    theirs = relative_l2(golden["logits_bf16"], golden["logits"]).mean()
    assert ours <= 1.1 * theirs
