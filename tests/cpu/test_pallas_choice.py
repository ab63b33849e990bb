"""Which kernels a GPU gets, the table of tunings, the work list, and what the kernels cost."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_profiles import small_hardware, small_model

from duetjax.policy.launch import Program
from duetjax.policy.roofline import Roofline
from pallas_kernels import choice as choice_module
from pallas_kernels import triton_gpu
from pallas_kernels.choice import Asked, ModelShapes, choose
from pallas_kernels.cost import Heads, decode_cost, write_cost
from pallas_kernels.shapes import DTYPES, HEAD_DIMS, PAGE_SIZES, Scores, Tuning, why_not
from pallas_kernels.triton_gpu import TritonKernels
from pallas_kernels.tuning import TABLE, Case, Entry, read_table, table_text, tuning_for
from pallas_kernels.work_list import MOST_CHUNKS, Chunks, work_list

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ModelShapes(32, 8, 128, 64, "bfloat16")


@pytest.mark.parametrize("capability", ["9.0", "9.0a"])
def test_hopper_gets_mosaics_kernels_with_the_tables_tuning_and_its_source(capability):
    choice = choose(capability, LLAMA)
    entry = tuning_for(Case("sm_90", 128, 64, "bfloat16"))
    assert choice.name is Asked.MOSAIC
    assert choice.kernels.tuning == entry.tuning
    assert entry.date in choice.why
    assert entry.source in choice.why


def test_hopper_gets_mosaics_kernels_for_pages_in_fp8_too():
    choice = choose("9.0", IN_FP8)
    assert choice.mosaic.tuning == tuning_for(Case("sm_90", 128, 64, "float8_e4m3fn")).tuning


@pytest.fixture
def triton_is_here(monkeypatch):
    monkeypatch.setattr(triton_gpu, "missing_package", lambda: None)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9"])
def test_ampere_and_ada_get_tritons_kernels_which_nobody_has_run(capability, triton_is_here):
    choice = choose(capability, LLAMA)
    assert choice.name is Asked.TRITON
    assert choice.kernels == TritonKernels(int(capability.replace(".", "")))
    assert choice.why == f"compute capability {capability}; compiled, never run"


def test_a_file_with_results_says_that_tritons_kernels_have_run(triton_is_here, monkeypatch):
    files = {"8.0": "benchmarks/results/a100/triton.json"}
    monkeypatch.setattr(choice_module, "RESULTS_OF_TRITON", files)
    assert choose("8.0", LLAMA).why.endswith("seen to be right in " + files["8.0"])
    assert choose("8.9", LLAMA).why.endswith("compiled, never run")


def test_every_file_with_results_is_there():
    files = choice_module.RESULTS_OF_TRITON
    assert [file for file in files.values() if not (ROOT / file).is_file()] == []


def test_without_their_package_tritons_kernels_are_not_chosen_and_the_reason_names_it(monkeypatch):
    monkeypatch.setattr(triton_gpu, "missing_package", lambda: "jax-triton")
    choice = choose("8.0", LLAMA)
    assert choice.name is Asked.XLA
    assert choice.kernels is None
    command = "pip install '.[triton]'"
    assert command in (ROOT / "README.md").read_text()
    assert f"8.0, but jax-triton is not installed: {command} in DuetJAX's folder" in choice.why
    with pytest.raises(ValueError, match="jax-triton is not installed"):
        choose("8.0", LLAMA, Asked.TRITON)


def test_the_package_that_is_missing_is_the_first_that_cannot_be_found(monkeypatch):
    here = {"triton"}
    monkeypatch.setattr(triton_gpu, "find_spec", lambda name: name if name in here else None)
    assert triton_gpu.missing_package() == "jax-triton"
    here.add("jax_triton")
    assert triton_gpu.missing_package() is None


def test_hopper_runs_tritons_kernels_for_whoever_asks(triton_is_here):
    choice = choose("9.0a", LLAMA, Asked.TRITON)
    assert choice.kernels == TritonKernels(90)
    assert choice.why.startswith("asked for; ")
    assert choose("9.0a", LLAMA).name is Asked.MOSAIC


OTHERS = [
    (None, LLAMA, "not an NVIDIA GPU"),
    ("7.5", LLAMA, "compute capability 7.5"),
    ("10.0a", LLAMA, "compute capability 10.0"),
]
IN_FP8 = replace(LLAMA, dtype="float8_e4m3fn")
UNSUITED = [
    (ModelShapes(32, 8, 80, 64, "bfloat16"), "head_dim 80"),
    (ModelShapes(71, 1, 64, 64, "bfloat16"), "71 heads on 1 KV heads"),
    (ModelShapes(32, 8, 128, 64, "float32"), "pages of float32"),
]


@pytest.mark.parametrize(
    ("capability", "shapes", "why"),
    [
        *OTHERS,
        *((capability, *each) for each in UNSUITED for capability in ("8.0", "9.0")),
        ("8.0", IN_FP8, "pages of float8_e4m3fn"),
        ("9.0", replace(IN_FP8, page_size=32), "fp8 pages of 32 tokens; it takes 64"),
    ],
)
def test_others_get_xlas_kernels_and_are_told_why(capability, shapes, why, triton_is_here):
    choice = choose(capability, shapes)
    assert choice.name is Asked.XLA
    assert re.search(why, choice.why)
    for asked in (Asked.MOSAIC, Asked.TRITON):
        with pytest.raises(ValueError, match="cannot run"):
            choose(capability, shapes, asked)


def test_xlas_kernels_can_be_asked_for_unless_the_scores_are_special():
    assert choose("9.0", LLAMA, Asked.XLA).kernels is None
    with pytest.raises(ValueError, match="window=100"):
        choose("9.0", LLAMA, Asked.XLA, Scores(window=100))


def test_special_scores_are_refused_where_only_others_kernels_know_them(triton_is_here):
    with pytest.raises(ValueError, match=r"Triton's have no .*window=100"):
        choose("8.0", LLAMA, scores=Scores(window=100))


def test_the_table_has_every_shape_that_the_kernel_takes_and_reads_back_as_written():
    table = read_table(TABLE)
    shapes = {(case.head_dim, case.page_size, case.dtype) for case in table}
    assert shapes == {
        (D, S, dtype)
        for D in HEAD_DIMS
        for S in PAGE_SIZES
        for dtype in DTYPES
        if why_not(8, 8, S, D, dtype) is None
    }
    assert TABLE.read_text() == table_text(table)
    assert all(entry.date and entry.source for entry in table.values())


@pytest.mark.parametrize("text", ["[", '[{"case": 1}]', '[{"case": {"a": 1}}]'])
def test_a_table_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match="is not a table of tunings"):
        read_table(tmp_path / "table.json")


def test_a_table_is_a_line_per_entry():
    entry = Entry(Tuning(512, 64, 3, 264), "2026-11-21", "measured")
    text = table_text({Case("sm_90", 128, 64, "float16"): entry})
    assert len(text.splitlines()) == 3
    assert json.loads(text)[0]["tuning"] == asdict(entry.tuning)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda: Tuning(500, 64, 2, 1), "chunks and spans are powers of two"),
        (lambda: Tuning(64, 64, 2, 1), "chunks and spans are powers of two"),
        (lambda: Tuning(512, 32, 2, 1), r"steps \(64, 128\)"),
        (lambda: Tuning(512, 64, 0, 1), "stages and blocks are 1 or more"),
        (lambda: Scores(soft_cap=0.0), "caps and windows are positive"),
        (lambda: Scores(window=0), "caps and windows are positive"),
    ],
)
def test_tunings_and_scores_that_no_kernel_can_have_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        wrong()


@given(
    lengths=st.lists(st.integers(0, 1000), min_size=6, max_size=6),
    window=st.sampled_from([None, 1, 100, 129, 1200]),
)
def test_the_work_list_has_every_chunk_with_keys_once_and_in_order(lengths, window):
    chunks = Chunks.of(1000, 128, window)
    items, total = jax.jit(work_list, static_argnums=1)(np.array(lengths, np.int32), chunks)
    first = [0 if window is None else max(0, length - window) for length in lengths]
    want = [
        row * chunks.per_row + chunk
        for row, length in enumerate(lengths)
        for chunk in range(chunks.per_row)
        if chunk * 128 < length and (chunk + 1) * 128 > first[row]
    ]
    assert int(total[0]) == len(want)
    assert items[: len(want)].tolist() == want


@given(most=st.integers(1, 2**20), least=st.sampled_from([128, 256, 512]))
def test_chunks_cover_every_row_and_are_few(most, least):
    chunks = Chunks.of(most, least)
    assert chunks.per_row <= MOST_CHUNKS
    assert (chunks.per_row - 1) * least < most
    for length in {1, most // 3 + 1, most - 1, most, min(most, least * MOST_CHUNKS + 1)} - {0}:
        tokens = int(chunks.tokens(jnp.int32(length)))
        assert least <= tokens <= chunks.most
        assert length <= chunks.per_row * tokens
        assert tokens == least or length > MOST_CHUNKS * tokens // 2


@given(length=st.integers(0, 40_000), room=st.integers(0, 2**20))
def test_a_row_s_cuts_depend_on_its_length_and_not_on_how_long_it_may_become(length, room):
    narrow, wide = Chunks.of(max(length, 1), 512), Chunks.of(length + room + 1, 512)
    found = [[int(end) for end in each.bounds(jnp.int32(length))] for each in (narrow, wide)]
    assert found[0] == found[1]
    assert narrow.tokens(jnp.int32(length)) == wide.tokens(jnp.int32(length))


@given(lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=9), layers=st.integers(1, 80))
@pytest.mark.parametrize("kv_bytes", [None, 1])
def test_costs_are_those_of_the_roofline(kv_bytes, lengths, layers):
    heads = Heads(num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2, kv_itemsize=kv_bytes)
    shapes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads, strict=False))
    model = small_model(num_layers=layers, dtype_bytes=2, kv_dtype_bytes=kv_bytes, **shapes)
    roofline = Roofline(model, small_hardware())
    rows = roofline.rows(1, np.array(lengths) - 1)
    cost = decode_cost([*lengths, 0], heads)
    assert rows.flops == pytest.approx(layers * cost.flops)
    assert rows.num_bytes == pytest.approx(layers * cost.num_bytes)
    [(_, with_writes), _] = roofline.parts(Program.PREFILL, 16, rows)
    without = model.costs[Program.PREFILL, 16].bytes
    writes = write_cost(len(lengths), heads)
    assert with_writes - without == pytest.approx(layers * writes.num_bytes)


def test_keys_that_a_window_hides_cost_nothing():
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=64, itemsize=2)
    assert decode_cost([1000, 5], heads, window=100) == decode_cost([100, 5], heads)
