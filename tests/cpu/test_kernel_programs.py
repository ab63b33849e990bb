"""Serving programs of a few layers with the kernels that a GPU gets, compiled for absent GPUs."""

from dataclasses import replace
from functools import cache

import pytest
from device_table import HAS_CUDA_WHEELS, WHY_NOT, key_name, read_table, versions

from duetjax.checkpoint.source import resolve_model
from duetjax.model.kv_pages import KVLayout
from duetjax.policy.launch import Program
from duetjax.policy.shape_profile import shape_profile
from duetjax.runtime.inspection import inspect_program
from duetjax.runtime.profile import BUCKETS, PAGE_SIZE, absent_programs, model_profile
from duetjax.runtime.target import absent_gpu, gpu_facts
from pallas_kernels.choice import Asked, ModelShapes, choose
from pallas_kernels.triton_gpu import missing_package

pytestmark = pytest.mark.skipif(not HAS_CUDA_WHEELS, reason=WHY_NOT)

NAME, NUM_LAYERS = "llama-3.1-8b", 3
MODEL = replace(resolve_model(NAME, load_format="dummy").config, num_layers=NUM_LAYERS)
KEYS = ((Program.DECODE, 64), (Program.PREFILL, 2048))
LAUNCHES = {  # of kernels of our own, per layer; rows of one query are decode's
    (Asked.MOSAIC, Program.DECODE): {"mosaic_gpu_v2": 2},
    (Asked.MOSAIC, Program.PREFILL): {"mosaic_gpu_v2": 3},
    (Asked.TRITON, Program.DECODE): {"triton_kernel_call_ffi": 2},
    (Asked.TRITON, Program.PREFILL): {"triton_kernel_call_ffi": 1},
}
GPUS = (
    "h200-sxm",
    pytest.param(
        "a100-sxm-80gb",
        marks=pytest.mark.skipif(
            missing_package() is not None, reason=f"no package {missing_package()}"
        ),
    ),
)


@cache
def choice(gpu):
    heads = MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim
    [device] = absent_gpu(gpu).mesh.devices.flat
    return choose(device.compute_capability, ModelShapes(*heads, PAGE_SIZE, MODEL.dtype))


@pytest.mark.parametrize("key", KEYS, ids=key_name)
@pytest.mark.parametrize("gpu", GPUS)
def test_a_program_with_its_own_kernels_can_be_replayed_and_needs_no_more_memory(gpu, key):
    target, chosen, table = absent_gpu(gpu), choice(gpu), read_table()
    programs = absent_programs(MODEL, target, kernels=chosen.kernels)
    facts = inspect_program(programs.lower(key), target, programs.layout)
    assert facts.violations == ()
    [(name, launches)] = LAUNCHES[chosen.name, key[0]].items()
    assert facts.custom_calls[name] == NUM_LAYERS * launches
    if table["versions"] == versions():  # another compiler needs other memory
        without = table["programs"][f"{NAME} {gpu}"][key_name(key)]  # kernels, and all layers
        assert facts.temp_bytes <= 1.01 * without["temp_bytes"]


@pytest.mark.parametrize("key", KEYS, ids=key_name)
def test_kv_pages_that_fill_the_gpu_make_xla_compute_nothing_again(key):
    """It counts them twice, and to make room would rather do products twice as well."""
    target = absent_gpu("h200-sxm")
    page_bytes = KVLayout.of(MODEL, 1, PAGE_SIZE, MODEL.dtype).page_bytes
    pages = gpu_facts("h200-sxm")["device_memory_size"] * 9 // 10 // page_bytes
    programs = absent_programs(MODEL, target, num_pages=pages, kernels=choice("h200-sxm").kernels)
    facts = inspect_program(programs.lower(key), target, programs.layout)
    assert facts.violations == ()
    profile = model_profile(NAME, MODEL, programs, {key: facts})  # refuses more FLOPs
    assert profile.costs[key].bytes < 2 * shape_bytes(key)


def shape_bytes(key):
    keys = [(Program.DECODE, 64), (Program.PREFILL, 2048)]
    return shape_profile(NAME, MODEL, 2, keys, BUCKETS.prefill_rows).costs[key].bytes
