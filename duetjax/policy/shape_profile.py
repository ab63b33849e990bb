"""What a model's programs cost by its shapes alone: nothing is compiled for it.

XLA's own count of programs for a processor is of no use: attention over all of the KV cache is in
it, and slot state, however few rows are touched. See `runtime.profile` for programs of a GPU.
"""

from collections.abc import Iterable

from duetjax.config import ModelConfig
from duetjax.policy.launch import Program
from duetjax.policy.profiles import Cost, ModelProfile

SOURCE = "no device: from the model's shapes"
"""Stands for the GPU that other profiles were compiled for."""


def shape_profile(
    name: str,
    config: ModelConfig,
    dtype_bytes: int,
    programs: Iterable[tuple[Program, int]],
    prefill_rows: int,
) -> ModelProfile:
    """The profile of a model that no compilation was analysed for.

    programs: kinds with their buckets. prefill_rows: most rows of a prefill program. Of each
    product of N rows with a matrix [o, i]: 2 N i o FLOPs and (N i + i o + N o) s bytes, s being
    dtype_bytes (DuetServe, arXiv 2511.04791, its table of operators).
    """
    matrices = [(o, i) for o, i in config.layer_matrices for _ in range(config.num_layers)]
    head = (config.vocab_size, config.hidden_size)

    def cost(program: Program, size: int) -> Cost:
        rows = size if program is Program.DECODE else min(prefill_rows, size)
        products = [*((size, o, i) for o, i in matrices), (rows, *head)]
        flops = sum(2 * n * o * i for n, o, i in products)
        values = sum(n * i + i * o + n * o for n, o, i in products)
        return Cost(float(flops), float(values * dtype_bytes))

    return ModelProfile(
        model=name,
        compiled_for=SOURCE,
        dtype_bytes=dtype_bytes,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        costs={key: cost(*key) for key in programs},
    )
