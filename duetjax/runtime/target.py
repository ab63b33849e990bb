"""What programs are compiled for: the default device, or a GPU that this machine does not have.

An absent GPU is described by numbers (presets/gpus/*.json, each with its source). XLA's CUDA
compiler needs no driver for it, only jax's CUDA plugin, ptxas and libdevice.
"""

import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.typing import DTypeLike

from duetjax.config import ConfigError
from duetjax.runtime.placeholders import HAS_LAUNCHER, register_placeholders

type Option = str | bool | int

CUDA_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "xla_gpu_enable_command_buffer": "",
        "xla_gpu_enable_pdl": False,
        "xla_disable_hlo_passes": "rematerialization",
    }
)
"""The launcher captures programs itself: no graphs or dependent launches of XLA's own in them.

And memory is planned by us: XLA counts a KV pool that is updated in place twice over, and with one
that fills the GPU would compute values again, in vain, to make room.
"""

_PLUGIN_SWITCH = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
_VERSIONS = {
    "driver_version": "13.0.0",
    "runtime_version": "13.0.0",
    "compile_time_toolkit_version": "13.0.0",
    "dnn_version": "9.10.0",
}
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "device_address_bits": 64,
}
_FACTS = (
    "threads_per_core_limit",
    "core_count",
    "fpus_per_core",
    "memory_bandwidth",
    "device_memory_size",
    "l2_cache_size",
    "shared_memory_per_core",
    "shared_memory_per_block_optin",
    "clock_rate_ghz",
)


@dataclass(frozen=True, slots=True)
class Target:
    """A device to compile for. `platform` is "cpu" or "cuda".

    identity: changes when programs compiled for the target may no longer fit it.
    has_marker: programs end in the launcher's marker. mesh: of an absent device alone.
    """

    name: str
    platform: str
    identity: str
    compiler_options: Mapping[str, Option]
    has_marker: bool
    mesh: jax.sharding.Mesh | None = None

    def abstract(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """An argument of a program, as lowering takes it."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        sharding = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def context(self) -> AbstractContextManager[Any]:
        """Surrounds lowering: kernels ask it which GPU they are traced for."""
        if self.mesh is None:
            return nullcontext()
        entered: AbstractContextManager[Any] = jax.sharding.use_abstract_mesh(
            self.mesh.abstract_mesh
        )
        return entered

    def compile(self, lowered: jax.stages.Lowered, dump: Path | None = None) -> jax.stages.Compiled:
        """Compiles with the target's options; may be called from several threads.

        dump: a folder for XLA's account of the compilation, its path free of glob characters.
        """
        options: dict[str, Option] = dict(self.compiler_options)
        if dump is not None:
            options["xla_dump_to"] = str(dump)
        with self.context():
            return lowered.compile(options)


def local_target() -> Target:
    """The default device. On a GPU programs have the marker where the launcher has been built.

    Raises `ConfigError` for a device that is neither a CPU nor an NVIDIA GPU.
    """
    device = jax.devices()[0]
    version = " ".join(device.client.platform_version.split())
    identity = f"{device.device_kind}; {version}"
    if device.platform == "cpu":
        return Target("cpu", "cpu", identity, MappingProxyType({}), has_marker=False)
    if "cuda" not in version:
        raise ConfigError(
            f"no programs for the device {device.device_kind!r} ({device.platform});"
            " set JAX_PLATFORMS=cpu to run on the processor"
        )
    name = device.device_kind.lower().replace(" ", "-")
    register_placeholders()
    return Target(name, "cuda", identity, CUDA_OPTIONS, has_marker=HAS_LAUNCHER)


def gpu_names() -> tuple[str, ...]:
    """The GPUs that can be compiled for without having one."""
    return tuple(sorted(file.stem for file in _presets_folder().glob("*.json")))


def absent_gpu(name: str) -> Target:
    """A GPU of presets/gpus, which this machine need not have; its programs cannot run here.

    Loads jax's CUDA plugin. Raises `ConfigError` for an unknown name, and saying what to install
    where the plugin does not load.
    """
    if name not in gpu_names():
        raise ConfigError(f"unknown GPU {name!r}; known are {', '.join(gpu_names())}")
    text = gpu_description(name)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology="1x1x1", target_config=text
        )
    except NotImplementedError:
        raise ConfigError(_how_to_load_the_plugin()) from None
    register_placeholders()
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    identity = f"absent {name}; {digest}"
    return Target(name, "cuda", identity, CUDA_OPTIONS, has_marker=True, mesh=mesh)


def check_options(target: Target) -> None:
    """Compiles a trivial program with the target's options; takes a fraction of a second.

    Raises `ConfigError` naming an option that this version of jax does not know.
    """
    with target.context():
        lowered = jax.jit(lambda x: x + 1).lower(target.abstract((8,), np.float32))
    try:
        target.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        at_fault = [option for option in target.compiler_options if f"'{option}'" in str(error)]
        if not at_fault:
            raise
        raise ConfigError(
            f"jax {jax.__version__} refuses the compile option {at_fault[0]} for"
            f" {target.name}; install a version within pyproject.toml's bounds"
        ) from error


def gpu_facts(name: str) -> dict[str, Any]:
    """The numbers of a GPU of presets/gpus, by their names there."""
    facts = json.loads((_presets_folder() / f"{name}.json").read_text(encoding="utf-8"))
    return {key: fact["value"] for key, fact in facts.items()}


def gpu_description(name: str) -> str:
    """A GPU of presets/gpus as text of XLA's GpuTargetConfigProto."""
    values = gpu_facts(name)
    major, minor = values["compute_capability"].rstrip("a").split(".")
    accelerated = values["compute_capability"].endswith("a")
    feature = "ACCELERATED_FEATURES" if accelerated else "NONE"
    label = json.dumps(values["device_name"])
    numbers = _COMMON | {key: values[key] for key in _FACTS}
    lines = [f"{key}: {value}" for key, value in numbers.items()]
    lines += [f'{key}: "{value}"' for key, value in _VERSIONS.items()]
    capability = f"major: {major} minor: {minor} feature_extension: {feature}"
    return (
        f"gpu_device_info {{ {' '.join(lines)} name: {label}"
        f" cuda_compute_capability {{ {capability} }} }}"
        ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
        f" device_description_str: {label}"
    )


def _how_to_load_the_plugin() -> str:
    if not os.environ.get(_PLUGIN_SWITCH) and "cpu" not in (jax.config.jax_platforms or ""):
        return (
            "jax's CUDA plugin does not load without a driver; set"
            f" {_PLUGIN_SWITCH}=1 before jax is imported"
        )
    return (
        "compiling for an absent GPU needs jax's CUDA plugin and NVIDIA's assembler: pip install"
        f" jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        " 'nvidia-cuda-nvcc>=13,<13.1' 'nvidia-nvvm>=13,<13.1'"
    )


def _presets_folder() -> Path:
    return Path(str(importlib.resources.files("duetjax.presets"))) / "gpus"
