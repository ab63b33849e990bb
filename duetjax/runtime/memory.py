"""How many KV pages fit, and the longest context that leaves."""

from dataclasses import dataclass

from duetjax.config import ConfigError, EngineConfig, ModelConfig
from duetjax.model.kv_pages import KVLayout

_PAGE_STEP = 256  # pools are rounded down, so that a little more memory is not a new program


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The KV layout and the context length that it was sized for."""

    layout: KVLayout
    max_model_len: int

    @property
    def table_width(self) -> int:
        """Page-table entries M per row."""
        return -(-self.max_model_len // self.layout.page_size)


def plan_memory(model: ModelConfig, engine: EngineConfig, dtype: str) -> MemoryPlan:
    """Sizes the KV pool: all that max_num_seqs full contexts need, as far as the memory allows.

    Where max_model_len is left open it is the model's (its sliding window, if it has one), or less
    if one such context does not fit.
    Raises `ConfigError` naming the flag when what was asked for does not fit.
    """
    page_bytes = KVLayout.of(model, 1, engine.page_size, dtype).page_bytes
    fit = engine.kv_cache_memory_bytes // page_bytes
    room = (fit - 1) * engine.page_size  # page 0 is the dummy
    longest = min(
        model.max_position_embeddings, model.sliding_window or model.max_position_embeddings
    )
    wanted = engine.max_model_len or max(2, min(longest, room))
    if wanted > room:
        need = (-(-wanted // engine.page_size) + 1) * page_bytes
        raise ConfigError(
            f"one context of {wanted} tokens needs {need} bytes of KV pages, but"
            f" --kv-cache-memory-bytes is {engine.kv_cache_memory_bytes}; raise it or lower"
            " --max-model-len"
        )
    context_pages = -(-wanted // engine.page_size)
    rounded = fit // _PAGE_STEP * _PAGE_STEP
    if rounded > context_pages:
        fit = rounded
    pages = min(fit, engine.max_num_seqs * context_pages + 1)
    layout = KVLayout.of(model, pages, engine.page_size, dtype)
    return MemoryPlan(layout, wanted)
