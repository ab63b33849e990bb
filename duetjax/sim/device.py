"""A device that need not be there: what a model leaves of its memory, by arithmetic alone."""

from dataclasses import dataclass, replace

from duetjax.config import ConfigError, EngineConfig, ModelConfig
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Program
from duetjax.policy.limits import SchedulerLimits, decode_buckets, prefill_buckets
from duetjax.policy.memory import DeviceMemory, kv_bytes, plan_pages
from duetjax.policy.profiles import HardwareProfile, ModelProfile
from duetjax.policy.shape_profile import shape_profile

_LOGIT_BYTES = 12
"""Of a row and token of the vocabulary while it is sampled: logits in float32, and copies."""


@dataclass(frozen=True, slots=True)
class SimulatedDevice:
    """A model on a GPU, or on `model.shards` of them that share it.

    model, hardware: what launches are foretold by. limits: what memory and programs allow.
    """

    model: ModelProfile
    hardware: HardwareProfile
    limits: SchedulerLimits

    def foresight(self) -> Foresight:
        """A new one, which has measured nothing."""
        return Foresight(self.model, self.hardware)


def simulated_device(
    config: ModelConfig,
    engine: EngineConfig,
    hardware: HardwareProfile,
    *,
    name: str,
    profile: ModelProfile | None = None,
    shards: int = 1,
) -> SimulatedDevice:
    """A model called `name` on a device under the engine's limits.

    profile: of the model, unsharded; None: by its shapes. shards: devices that share each layer.
    Raises `ConfigError` that names the flag if it does not fit, or cannot be shared so.
    """
    if shards < 1:
        raise ConfigError(f"--tensor-parallel {shards} must be at least 1")
    value_bytes = _value_bytes(config, engine)
    memory = DeviceMemory(
        total=int(hardware.memory_bytes * engine.gpu_memory_utilization),
        weights=config.num_parameters * value_bytes // shards,
        slots=engine.max_num_seqs * config.vocab_size * 2,  # the penalties' counts, int16
        temporaries=_temporaries(config, engine, value_bytes) // shards,
    )
    kv_heads = max(1, config.num_kv_heads // shards)
    page_bytes = replace(config, num_kv_heads=kv_heads).page_bytes(engine.page_size, value_bytes)
    pool = kv_bytes(engine, memory, on_host=False)
    pages, max_model_len = plan_pages(config, engine, page_bytes, pool)
    decode = decode_buckets(engine.max_num_seqs)
    prefill = prefill_buckets(engine.max_num_batched_tokens)
    limits = SchedulerLimits(
        num_pages=pages,
        page_size=engine.page_size,
        num_slots=engine.max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        decode_buckets=decode[-1:] if engine.deterministic else decode,
        prefill_buckets=prefill[-1:] if engine.deterministic else prefill,
        prefix_caching=engine.enable_prefix_caching,
        deterministic=engine.deterministic,
    )
    if profile is None:
        programs = [
            *((Program.DECODE, size) for size in limits.decode_buckets),
            *((Program.PREFILL, size) for size in limits.prefill_buckets),
        ]
        profile = shape_profile(name, config, value_bytes, programs, engine.max_num_seqs)
    try:
        return SimulatedDevice(profile.sharded(shards), hardware, limits)
    except ValueError as error:
        raise ConfigError(f"--tensor-parallel {shards}: {error}; choose another") from None


def _value_bytes(config: ModelConfig, engine: EngineConfig) -> int:
    return 4 if (engine.dtype if engine.dtype != "auto" else config.dtype) == "float32" else 2


def _temporaries(config: ModelConfig, engine: EngineConfig, value_bytes: int) -> int:
    """Roughly what recorded programs keep: activations of a layer, and logits of all rows.

    Each of them keeps its own, prompts' on both lanes, and halving sizes add up to twice the first.
    """
    logits = engine.max_num_seqs * config.vocab_size * _LOGIT_BYTES
    width = 2 * config.hidden_size + sum(out for out, _ in config.layer_matrices)
    prefill = engine.max_num_batched_tokens * width * value_bytes
    return 2 * (prefill + 2 * logits) * 2 + 2 * logits
