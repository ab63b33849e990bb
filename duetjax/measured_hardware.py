"""The hardware profile of the device at hand, measured: what every number of its cores reaches."""

import gc
import importlib.metadata
import logging

import jax

from duetjax.devices import Device, memory_share
from duetjax.host import host_memory
from duetjax.policy.profiles import Basis, HardwareProfile, Origin
from duetjax.profile_files import shipped_like, slug
from duetjax.runtime import gpu_rates
from duetjax.runtime.gpu_rates import GpuRates
from duetjax.runtime.host_rates import host_profile, host_rates

_log = logging.getLogger(__name__)

_REPEATS = 5
_UNKNOWN = {
    "contention_decode": 1.25,
    "contention_prefill": 1.1,
    "interconnect_bytes_per_s": 450e9,
    "board_watts": 700.0,
}
"""What is assumed of a GPU that no shipped profile knows."""


def measure_hardware(device: Device) -> HardwareProfile:
    """Takes some ten seconds. Raises `ConfigError` where parts of the device cannot be timed."""
    if device.is_host:
        found = []
        for each in host_rates(_REPEATS):
            _log.info(str(each))
            found.append(each)
        name, version = f"cpu-{found[-1].cores}-cores", importlib.metadata.version("jax")
        return host_profile(name, found, host_memory(), version)
    loads = gpu_rates.loads()
    rates = gpu_rates.gpu_rates(*loads)
    del loads
    gc.collect()  # an engine plans with all of the memory
    kind = jax.devices()[0].device_kind
    known = shipped_like(kind, rates.curve[-1].cores, device.memory / memory_share())
    return gpu_profile(kind, rates, device.memory, known)


def gpu_profile(
    kind: str, rates: GpuRates, memory: int, known: HardwareProfile | None
) -> HardwareProfile:
    """What was measured, and what a shipped profile says of the rest. memory: bytes XLA has."""
    measured = {
        "cores": rates.curve[-1].cores,
        "core_step": rates.core_step,
        "min_decode_cores": rates.least_cores,
        "min_prefill_cores": rates.least_cores,
        "contention_decode": rates.contention_decode,
        "contention_prefill": rates.contention_prefill,
        "launch_us": rates.launch_us,
    }
    values = {name: value for name, value in measured.items() if value is not None}
    for name in ("contention_decode", "contention_prefill"):
        if name in values:
            values[name] = max(values[name], 1.0)
    told = {name: Origin(Basis.MEASURED, source) for name, source in _sources(kind).items()}
    if not rates.are_shares_told:
        assumed = Origin(Basis.ASSUMED, "a share of any GPU with green contexts; not told by this")
        told |= dict.fromkeys(_SHARES, assumed)
    unknown = {**_UNKNOWN, "memory_bytes": memory}
    origins = {name: told[name] for name in (*values, *_CURVE)}
    for name in unknown:
        if name in values:
            continue
        values[name] = unknown[name] if known is None else getattr(known, name)
        assumed = Origin(Basis.ASSUMED, f"nobody has described the GPU {kind}")
        origins[name] = assumed if known is None else known.origins[name]
    return HardwareProfile(
        name=slug(kind),
        curve=rates.curve,
        origins=origins,
        **values,  # type: ignore[arg-type]
    )


_SHARES = ("core_step", "min_decode_cores", "min_prefill_cores")
_CURVE = ("curve_cores", "curve_flops_per_s", "curve_bytes_per_s")


def _sources(kind: str) -> dict[str, str]:
    """How each value was measured."""
    version = importlib.metadata.version("jax")
    shares = f"splits as the driver makes them, {kind}"
    replayed = f"recorded once and replayed on both shares of every split, JAX {version}"
    size, copied = gpu_rates.PRODUCT_SIZE, gpu_rates.COPY_BYTES >> 20
    beside = "a copy for decode beside a product for prefill, the median over some splits"
    return {
        **dict.fromkeys(("cores", *_SHARES), shares),
        "contention_decode": beside,
        "contention_prefill": beside,
        "launch_us": "replay of one recorded kernel, waited for",
        "curve_cores": f"shares of every split, {kind}",
        "curve_flops_per_s": f"bfloat16 product of {size} by {size} matrices, {replayed}",
        "curve_bytes_per_s": f"copies of {copied} MiB, both ways counted, {replayed}",
    }
