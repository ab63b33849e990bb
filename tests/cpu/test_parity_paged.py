"""The serving programs against Hugging Face transformers: pages, chunks, preemption included."""

import queue
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_choices, assert_same_generations
from golden import tiny
from paged_case import QUICK

from duetjax.build_device import build_engine
from duetjax.checkpoint.huggingface import read_weights
from duetjax.checkpoint.source import resolve_model
from duetjax.config import EngineConfig, ModelConfig, SamplingParams
from duetjax.model.decoder import Definition
from duetjax.model.kv_pages import KVLayout, PagedKV
from duetjax.policy.request import NewRequest
from pallas_kernels import xla

GOLDEN = Path(tiny.__file__).parent
PAGE = 16
OUTPUT = 64


@pytest.fixture(params=sorted(tiny.CONFIGS))
def name(request):
    return request.param


@pytest.fixture
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        assert arrays["fingerprint"] == tiny.fingerprint(name), "made from other weights"
        return dict(arrays)


def paged_logits(folder: Path, tokens: np.ndarray, dtype: str, chunks: list[int]) -> np.ndarray:
    """Logits [N, V] of tokens fed in chunks through pages in shuffled order.

    All chunks are padded to N tokens, so that whatever they are they need one program.
    """
    config = resolve_model(str(folder)).config
    definition = definition_of(config, dtype)
    weights = read_weights(folder, definition.fusion.shapes, np.dtype(jnp.dtype(dtype)))
    fused = definition.fusion.fuse(weights)
    leaves = definition.ordered({k: jnp.asarray(v) for k, v in fused})
    num_pages = -(-len(tokens) // PAGE)
    layout = KVLayout.of(config, num_pages + 1, PAGE, dtype)
    kv = [jnp.zeros(layout.shape, dtype) for _ in range(layout.num_arrays)]
    table = np.random.default_rng(0).permutation(np.arange(1, num_pages + 1))[None]
    rows, start = [], 0
    for count in chunks:
        padded = np.zeros(len(tokens), np.int32)
        padded[:count] = tokens[start : start + count]
        span = np.array([start, count], np.int32)
        kv, logits = _chunk(definition, config, leaves, kv, padded, span, table)
        rows.append(np.asarray(logits)[:count])
        start += count
    assert start == len(tokens), f"chunks cover {start} of {len(tokens)} tokens"
    return np.concatenate(rows)


definition_of = cache(Definition)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _chunk(definition: Definition, config: ModelConfig, leaves, kv, tokens, span, table):
    start, count = span
    index = jnp.arange(tokens.shape[0])
    used = index < count
    positions = jnp.where(used, start + index, 0)
    page = jnp.where(used, table[0, positions // PAGE], 0)
    cache = PagedKV(kv, config, xla, (page, positions % PAGE))
    attend = cache.prefill(table, jnp.stack([0, count]), start[None])
    decoder = definition.bind(leaves)
    return cache.arrays, decoder.logits(decoder(tokens, positions, attend))


def relative_l2(got, wanted):
    return np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


@pytest.mark.parametrize("chunks", [[214], [1, 63, 64, 65, 21]], ids=["one-piece", "uneven"])
def test_paged_logits_equal_transformers_in_float32(name, golden, tmp_path, chunks):
    tiny.write_checkpoint(name, tmp_path)
    logits = paged_logits(tmp_path, golden["tokens"], "float32", chunks)
    assert relative_l2(logits, golden["logits"]).max() <= 1e-4


def test_paged_logits_follow_transformers_in_bfloat16(name, golden, tmp_path):
    tiny.write_checkpoint(name, tmp_path, dtype="bfloat16")
    logits = paged_logits(tmp_path, golden["tokens"], "bfloat16", [1, 63, 64, 65, 21])
    assert relative_l2(logits, golden["logits_bf16"]).max() <= 2e-2
    choice, wanted = logits.argmax(-1), golden["logits_bf16"].argmax(-1)
    assert np.mean(choice == wanted) >= 0.97
    assert_same_choices(choice, wanted, golden["top2_gap_bf16"])


def generate(folder: Path, prompts: list[np.ndarray], engine: EngineConfig):
    """Greedy outputs of prompts submitted together, and the engine's final statistics."""
    client, _ = build_engine(resolve_model(str(folder)), engine)
    outputs: queue.SimpleQueue = queue.SimpleQueue()
    client.start(outputs.put)
    for index, prompt in enumerate(prompts):
        ids = tuple(prompt.tolist())
        client.submit(NewRequest(str(index), ids, OUTPUT, SamplingParams(temperature=0, seed=0)))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    running = len(prompts)
    while running:
        for output in outputs.get(timeout=120):
            tokens[output.id] += output.token_ids
            running -= output.finish is not None
    stats = client.stats()
    client.shutdown(10)
    return [np.array(tokens[str(index)]) for index in range(len(prompts))], stats


def check_greedy(golden, got):
    prompt_len = int(golden["prompt_len"])
    wanted = golden["tokens"][prompt_len:]
    gaps = golden["top2_gap"][prompt_len - 1 : -1]
    assert_same_generations(got, [wanted] * len(got), [gaps] * len(got))


def test_greedy_continuations_equal_transformers_in_uneven_chunks_and_after_preemption(
    name, golden, tmp_path
):
    tiny.write_checkpoint(name, tmp_path, shards=2)
    prompt = golden["tokens"][: int(golden["prompt_len"])]
    page_bytes = KVLayout.of(resolve_model(str(tmp_path)).config, 1, PAGE, "float32").page_bytes
    pages = 24  # two prompts of 150 tokens fit, their 64 further tokens each do not
    config = EngineConfig(
        max_model_len=256,
        max_num_seqs=2,
        max_num_batched_tokens=37,
        page_size=PAGE,
        kv_cache_memory_bytes=pages * page_bytes,
        enable_prefix_caching=False,  # or the prompts share their pages and nobody gives way
    )
    got, stats = generate(tmp_path, [prompt, prompt, prompt[:90], prompt], config)
    assert stats.preemptions > 0
    check_greedy(golden, [got[0], got[1], got[3]])
