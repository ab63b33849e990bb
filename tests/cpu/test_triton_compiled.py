"""Triton's kernels compiled for absent GPUs: what they take there, and programs of many layers."""

import re
import subprocess
from importlib.metadata import distribution

import jax
import jax.numpy as jnp
import pytest
from device_table import HAS_CUDA_WHEELS, WHY_NOT

from duetjax.model.kv_pages import KVLayout
from duetjax.runtime.inspection import inspect_program
from duetjax.runtime.placeholders import mark
from duetjax.runtime.target import absent_gpu
from pallas_kernels.choice import ModelShapes
from pallas_kernels.triton_gpu import TritonKernels, missing_package

pytestmark = [
    pytest.mark.skipif(not HAS_CUDA_WHEELS, reason=WHY_NOT),
    pytest.mark.skipif(missing_package() is not None, reason=f"no package {missing_package()}"),
]

B, M, P, T, R = 8, 64, 32, 256, 4
CAPABILITIES = {"a100-sxm-80gb": 80, "l40s": 89}
SHARED_MEMORY = {"a100-sxm-80gb": 166912, "l40s": 101376}


def calls(target, shapes):
    """Decode and prefill with what each is called with."""
    kernels = TritonKernels(CAPABILITIES[target.name])
    K, S, D, dtype = shapes.num_kv_heads, shapes.page_size, shapes.head_dim, shapes.dtype
    pages = target.abstract((P, K, 2, S, D), dtype)

    def queries(count):
        return target.abstract((count, shapes.num_heads, D), dtype)

    def numbers(*shape):
        return target.abstract(shape, jnp.int32)

    yield kernels.decode_attention, (queries(B), pages, numbers(B, M), numbers(B))
    rows = numbers(R, M), numbers(R + 1), numbers(R)
    yield kernels.prefill_attention, (queries(T), pages, *rows)


@pytest.fixture
def compiled(monkeypatch):
    """Compiles a call for a GPU; gives what Triton made of its kernels on the way there."""
    from jax_triton import triton_lib

    from pallas_kernels import triton_kernels

    made, compile_kernel = [], triton_lib.compile_ttir_inplace

    def recorded(*arguments):
        made.append(compile_kernel(*arguments))
        return made[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", recorded)
    for kernel in (triton_kernels._decode, triton_kernels._combine, triton_kernels._prefill):
        monkeypatch.setattr(kernel, "_jT_kernel_cache", {}, raising=False)

    def run(target, function, arguments):
        with target.context():
            lowered = jax.jit(function).lower(*arguments)
        target.compile(lowered)
        found, made[:] = {each.name: each for each in made}, []
        return found

    return run


def assembled(kernel, folder):
    """Registers and bytes of spills of a kernel, by the assembler that XLA uses."""
    nvcc = distribution("nvidia-cuda-nvcc")
    [ptxas] = [file for file in nvcc.files if file.name == "ptxas"]
    [architecture] = re.findall(r"^\.target (\w+)", kernel.binary, re.MULTILINE)
    (folder / "kernel.ptx").write_text(kernel.binary)
    command = [nvcc.locate_file(ptxas), "-v", f"-arch={architecture}", "kernel.ptx"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    [registers] = re.findall(r"Used (\d+) registers", run.stderr)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))


FORMS = [
    ("a100-sxm-80gb", ModelShapes(32, 8, 128, 64, "bfloat16")),
    ("a100-sxm-80gb", ModelShapes(16, 1, 256, 128, "float16")),
    ("l40s", ModelShapes(4, 4, 64, 16, "float16")),
    ("l40s", ModelShapes(15, 3, 96, 32, "bfloat16")),
]


@pytest.mark.parametrize(("gpu", "shapes"), FORMS, ids=str)
def test_a_form_spills_nothing_and_fits_the_gpu(gpu, shapes, compiled, tmp_path):
    target, names = absent_gpu(gpu), set()
    for function, arguments in calls(target, shapes):
        for name, kernel in compiled(target, function, arguments).items():
            registers, spilled = assembled(kernel, tmp_path)
            assert spilled == 0, name
            assert registers < 255, name
            assert kernel.shared_mem_bytes <= SHARED_MEMORY[gpu], name
            assert kernel.global_scratch_size is None, name  # a replay would need its address
            assert f".target sm_{CAPABILITIES[gpu]}" in kernel.binary
            assert ".version 8.0" in kernel.binary  # for assemblers from CUDA 12.0 on
            names.add(name)
    assert names == {"decode_chunk", "combine_chunks", "prefill_tile"}


@pytest.mark.parametrize(("gpu", "is_decode"), [("a100-sxm-80gb", True), ("l40s", False)])
def test_all_layers_update_their_pages_in_place_and_can_be_replayed(gpu, is_decode):
    num_layers, count = 12, B if is_decode else T
    target, layout = absent_gpu(gpu), KVLayout(128, 64, 8, 128, num_layers, "bfloat16")
    kernels = TritonKernels(CAPABILITIES[gpu])
    attend = kernels.decode_attention if is_decode else kernels.prefill_attention

    def program(kv, x, place, rows):
        written = []
        for pages in kv:
            k = x[:, ::4]  # any keys
            written.append(kernels.write_kv(pages, k, k * 2, *place))
            x = x + attend(x, written[-1], *rows)
        return mark([*written, x])

    def numbers(*shape):
        return target.abstract(shape, jnp.int32)

    pages = [target.abstract(layout.shape, layout.dtype)] * num_layers
    x, place = target.abstract((count, 32, 128), "bfloat16"), [numbers(count)] * 2
    decode_rows, prefill_rows = (
        [numbers(B, M), numbers(B)],
        [numbers(R, M), numbers(R + 1), numbers(R)],
    )
    with target.context():
        jitted = jax.jit(program, donate_argnums=0)
        lowered = jitted.lower(pages, x, place, decode_rows if is_decode else prefill_rows)
    launches = 2 if is_decode else 1
    assert lowered.as_text().count("@triton_kernel_call_ffi") == launches  # for all layers
    facts = inspect_program(lowered, target, layout)
    assert facts.violations == ()
    assert facts.alias_bytes == layout.num_pages * layout.page_bytes
    assert facts.custom_calls["triton_kernel_call_ffi"] == num_layers * launches
