"""How long a step should take on so many cores: the attention-aware roofline of DuetServe.

time = max(F / Pi, B / BW) for the program without attention, from the model profile, and the same
for attention, from every request's own tokens and context. Pi [FLOP/s] and BW [bytes/s] are what
the hardware profile says that many cores reach. Source: DuetServe (arXiv 2511.04791), section on
the roofline; where this differs from it the docstrings say so. No calibration, and no clock.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import HardwareProfile, ModelProfile

type Floats = NDArray[np.float64]

MOST_TOKENS = 2.0**40
"""Above every number of tokens that is meant; attention's square of it is still finite."""


class Attention(StrEnum):
    """How one step's attention is estimated from that of its requests.

    FUSED: one kernel, so one max() over the sums. PER_REQUEST: the sum of each one's max(), as the
    paper has it; never less, and pessimistic where compute-bound and memory-bound rows mix.
    """

    FUSED = "fused"
    PER_REQUEST = "per-request"


class Roofline:
    """Predicts steps of one model on one device; stateless, so shared freely.

    causal: a token attends to those before it alone, q (c + (q + 1) / 2) pairs in place of the
    paper's q (q + c). token_shares [L]: which share of a prompt's tokens each layer computes; the
    last token passes through all of them. Default: all of them do.
    """

    def __init__(
        self,
        model: ModelProfile,
        hardware: HardwareProfile,
        *,
        causal: bool = True,
        attention: Attention = Attention.FUSED,
        token_shares: Sequence[float] = (),
    ) -> None:
        shares = token_shares or (1.0,) * model.num_layers
        if len(shares) != model.num_layers or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"token_shares must be {model.num_layers} numbers from 0 to 1, not {token_shares}"
            )
        self._model = model
        self._causal = causal
        self._attention = Attention(attention)
        self._share = sum(shares) / len(shares)
        self._curves = {program: _Curve(model, program) for program in Program}
        self._launch_ms = hardware.launch_us / 1e3
        self._contention = {
            None: 1.0,
            Lane.WHOLE: 1.0,
            Lane.DECODE: hardware.contention_decode,
            Lane.PREFILL: hardware.contention_prefill,
        }
        cores = np.arange(hardware.cores + 1)
        ends = [0, *(at.cores for at in hardware.curve)]
        reached = [0.0, *(at.flops_per_s for at in hardware.curve)]
        self._flops_per_ms = np.interp(cores, ends, reached) / 1e3
        reached = [0.0, *(at.bytes_per_s for at in hardware.curve)]
        self._bytes_per_ms = np.interp(cores, ends, reached) / 1e3

    def step_ms(
        self,
        program: Program,
        bucket: int,
        new: ArrayLike,
        cached: ArrayLike,
        cores: ArrayLike,
        contended: Lane | None = None,
    ) -> Floats:
        """Milliseconds of one step for each candidate number of cores [S], launch included.

        new, cached [R]: tokens computed now, and tokens in the KV cache before, of each row. A
        decoding row has one new token. contended: the lane it runs on beside the other one.
        Monotone in new, cached and bucket, non-increasing in cores, always finite. A bucket that
        the model profile has not is interpolated between its neighbours; below the first it costs
        what that one does, above the last it follows the last two. Raises ValueError for counts
        that are negative or not finite, and for cores that the device has not.
        """
        q, c = _rows(new, cached)
        tokens = q.sum()
        if not tokens <= bucket:
            raise ValueError(f"{tokens:g} new tokens do not fit into {program} {bucket}")
        flops_per_ms, bytes_per_ms = self._reach(cores)
        flops, num_bytes = self._curves[program].at(bucket)
        num_bytes += tokens * self._kv_bytes
        ms = np.maximum(flops / flops_per_ms, num_bytes / bytes_per_ms)
        ms += self._attention_ms(q, c, flops_per_ms, bytes_per_ms)
        ms *= self._contention[contended]
        ms += self._launch_ms
        return ms

    def attention_cost(self, new: ArrayLike, cached: ArrayLike) -> tuple[Floats, Floats]:
        """FLOPs and bytes of each row's attention over all layers, [R] both.

        Per layer F = (4 D + 2) H pairs, two products and the softmax over every pair of query and
        key, and B = 2 H q D s + 2 K (q + c) D s: queries in, outputs out, keys and values once.
        """
        return self._attention_cost(*_rows(new, cached))

    @property
    def _kv_bytes(self) -> float:
        """Bytes of the keys and values that one token writes: 2 L K D s."""
        m = self._model
        return 2.0 * m.num_layers * m.num_kv_heads * m.head_dim * m.dtype_bytes

    def _attention_cost(self, q: Floats, c: Floats) -> tuple[Floats, Floats]:
        m = self._model
        computed = np.minimum(q, 1.0 + (q - 1.0) * self._share)  # queries of the average layer
        context = c + (q + 1.0) / 2 if self._causal else q + c
        flops = computed * context * float(m.num_layers * m.num_heads * (4 * m.head_dim + 2))
        unit = 2.0 * m.num_layers * m.head_dim * m.dtype_bytes
        moved = (computed * m.num_heads + (q + c) * m.num_kv_heads) * unit
        return flops, np.where(q > 0, moved, 0.0)

    def _attention_ms(self, q: Floats, c: Floats, *reach: Floats) -> Floats:
        flops, moved = self._attention_cost(q, c)
        flops_per_ms, bytes_per_ms = reach
        if self._attention is Attention.FUSED:
            return np.maximum(flops.sum() / flops_per_ms, moved.sum() / bytes_per_ms)
        times = np.maximum(flops[:, None] / flops_per_ms, moved[:, None] / bytes_per_ms)
        total: Floats = times.sum(0)
        return total

    def _reach(self, cores: ArrayLike) -> tuple[Floats, Floats]:
        index, most = np.asarray(cores), len(self._flops_per_ms) - 1
        is_whole = index.ndim == 1 and index.dtype.kind in "iu"
        if not is_whole or (index.size and not 1 <= index.min() <= index.max() <= most):
            raise ValueError(f"cores must be a row of integers from 1 to {most}, not {index}")
        return self._flops_per_ms[index], self._bytes_per_ms[index]


class _Curve:
    """What a program costs by bucket: nowhere less than a smaller bucket's cost."""

    def __init__(self, model: ModelProfile, program: Program) -> None:
        sizes = sorted(size for kind, size in model.costs if kind is program)
        if not sizes:
            raise ValueError(f"the profile of {model.model} has no {program} program")
        costs = [model.costs[program, size] for size in sizes]
        self._sizes = np.array(sizes, np.float64)
        self._flops: Floats = np.maximum.accumulate([cost.flops for cost in costs])
        self._bytes: Floats = np.maximum.accumulate([cost.bytes for cost in costs])

    def at(self, bucket: int) -> tuple[float, float]:
        """FLOPs and bytes."""
        return self._at(bucket, self._flops), self._at(bucket, self._bytes)

    def _at(self, bucket: int, values: Floats) -> float:
        sizes = self._sizes
        if bucket > sizes[-1] and len(sizes) > 1:
            slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
            return float(values[-1] + slope * (bucket - sizes[-1]))
        return float(np.interp(bucket, sizes, values))


def _rows(new: ArrayLike, cached: ArrayLike) -> tuple[Floats, Floats]:
    q, c = np.asarray(new, np.float64), np.asarray(cached, np.float64)
    if q.ndim != 1 or q.shape != c.shape:
        raise ValueError(f"new and cached must be rows of one length, not {q.shape} and {c.shape}")
    for name, values in (("new", q), ("cached", c)):
        # NaN fails any comparison.
        if values.size and not (values.min() >= 0 and values.max() < MOST_TOKENS):
            raise ValueError(f"{name} must be from 0 to {MOST_TOKENS:g}, not {values}")
    return q, c
