"""Targets: the device that is there, and GPUs that are not."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from importlib import resources

import jax
import jax.numpy as jnp
import pytest
from device_table import HAS_CUDA_WHEELS, WHY_NOT
from jax.experimental import topologies

from duetjax.config import ConfigError
from duetjax.model.kv_pages import Kernels
from duetjax.runtime import placeholders
from duetjax.runtime.target import absent_gpu, check_options, gpu_names, local_target
from pallas_kernels import xla

needs_cuda_wheels = pytest.mark.skipif(not HAS_CUDA_WHEELS, reason=WHY_NOT)
KERNELS = ("write_kv", "decode_attention", "prefill_attention")


def test_the_local_target_compiles_what_it_describes():
    target = local_target()
    with target.context():
        lowered = jax.jit(lambda x: x * 2).lower(target.abstract((3,), jnp.float32))
    assert target.compile(lowered)(jnp.ones(3)).tolist() == [2, 2, 2]
    check_options(target)


@needs_cuda_wheels
@pytest.mark.parametrize("name", gpu_names())
def test_every_described_gpu_takes_the_options_that_programs_are_compiled_with(name):
    target = absent_gpu(name)
    assert target.platform == "cuda"
    assert target.has_marker
    check_options(target)


@needs_cuda_wheels
def test_the_compiler_sees_the_numbers_of_the_description(tmp_path):
    target = absent_gpu("a100-sxm-80gb")
    lowered = jax.jit(lambda x: x + 1).lower(target.abstract((8,), jnp.float32))
    target.compile(lowered, dump=tmp_path)
    (seen,) = tmp_path.glob("*.gpu_target_config.pbtxt")
    text = seen.read_text()
    for number in ("core_count: 108", "major: 8", "memory_bandwidth: 2039000000000"):
        assert number in text


@needs_cuda_wheels
def test_an_option_that_xla_does_not_know_is_named():
    options = {"xla_gpu_enable_pdl": False, "xla_gpu_no_such_thing": True}
    target = dataclasses.replace(absent_gpu("h200-sxm"), compiler_options=options)
    with pytest.raises(ConfigError, match="refuses the compile option xla_gpu_no_such_thing"):
        check_options(target)


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown GPU 'h900'; known are a100-sxm-80gb, .*l40s"):
        absent_gpu("h900")


def test_a_missing_plugin_is_refused_with_what_to_install(monkeypatch):
    def absent(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    with pytest.raises(ConfigError, match=f"pip install jax-cuda13-plugin=={jax.__version__}"):
        absent_gpu("h200-sxm")


@needs_cuda_wheels
def test_a_plugin_that_wants_a_driver_is_refused_with_the_variable_to_set():
    hidden = ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "JAX_PLATFORMS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    code = (
        "from duetjax.config import ConfigError\n"
        "from duetjax.runtime.target import absent_gpu\n"
        "try:\n    absent_gpu('h200-sxm')\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    if not done.stdout:
        pytest.skip("this machine has a driver, so the plugin loads")
    assert "set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before jax is imported" in done.stdout


@pytest.mark.parametrize("name", gpu_names())
def test_every_fact_about_a_gpu_has_a_source(name):
    file = resources.files("duetjax.presets") / "gpus" / f"{name}.json"
    facts = json.loads(file.read_text())
    assert [key for key, fact in facts.items() if not (fact["value"] and fact["source"])] == []


def test_placeholders_are_called_like_the_kernels_and_give_their_shapes():
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    q, pages, new = shape(6, 8, 64), shape(5, 2, 2, 16, 64), shape(6, 2, 64)
    ids, table = shape(6, dtype=jnp.int32), shape(6, 4, dtype=jnp.int32)
    offsets = shape(7, dtype=jnp.int32)
    arguments = {
        "write_kv": (pages, new, new, ids, ids),
        "decode_attention": (q, pages, table, ids),
        "prefill_attention": (q, pages, table, offsets, ids),
    }
    for name in KERNELS:
        stand_in, kernel = getattr(placeholders, name), getattr(xla, name)
        names = list(inspect.signature(stand_in).parameters)
        assert names == list(inspect.signature(kernel).parameters)
        assert names == list(inspect.signature(getattr(Kernels, name)).parameters)[1:]
        wanted = jax.eval_shape(kernel, *arguments[name])
        assert jax.eval_shape(stand_in, *arguments[name]) == wanted


def test_a_placeholder_that_is_run_fails():
    jax.ffi.register_ffi_target("duetjax_test_placeholder", placeholders.capsule(), platform="cpu")
    call = jax.ffi.ffi_call("duetjax_test_placeholder", jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="placeholder cannot run"):
        jax.jit(call)(jnp.ones(3)).block_until_ready()
