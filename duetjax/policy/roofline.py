"""How long a step should take on so many cores: the attention-aware roofline of DuetServe.

time = max(F / Pi, B / BW) for the program without attention, from the model profile, and the same
for attention, from every request's own tokens and context. Pi [FLOP/s] and BW [bytes/s] are what
the hardware profile says that many cores reach. Source: DuetServe (arXiv 2511.04791), section on
the roofline; where this differs from it the docstrings say so. No calibration, and no clock.
"""

from bisect import bisect
from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate

import numpy as np
from numpy.typing import ArrayLike, NDArray

from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import HardwareProfile, ModelProfile

type Floats = NDArray[np.float64]
type Parts = tuple[list[float], list[float]]

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
        of_layers = float(model.num_layers * model.head_dim * model.dtype_bytes)
        self._flops_per_pair = float(model.num_layers * model.num_heads * (4 * model.head_dim + 2))
        self._bytes_per_query = 2 * model.num_heads * of_layers
        self._bytes_per_key = 2 * model.num_kv_heads * of_layers
        reached = zip(*((at.flops_per_s, at.bytes_per_s) for at in hardware.curve), strict=True)
        self._ms_per_unit = tuple([_ms_per_unit(hardware, column) for column in reached])

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

        new, cached [R]: tokens computed now, and tokens in the KV cache before, of each row; `new`
        may be one number for all rows, as 1 for decoding ones. contended: the lane it runs on
        beside the other one. Monotone in new, cached and bucket, non-increasing in cores, always
        finite. A bucket that the model profile has not is interpolated between its neighbours;
        below the first it costs what that one does, above the last it follows the last two. Raises
        ValueError for counts that are negative or not finite, for more new tokens than the bucket
        holds, and for cores that the device has not.
        """
        return self.ms(self.work(program, bucket, new, cached), cores, contended)

    def work(self, program: Program, bucket: int, new: ArrayLike, cached: ArrayLike) -> Floats:
        """FLOPs and bytes of the parts of one step, [2, parts]: the program, then attention.

        A part takes the longer of its FLOPs' and its bytes' time. Arguments and errors as in
        `step_ms`, from which it is apart for whoever asks for one step on several lanes.
        """
        return np.array(self.parts(program, bucket, Rows(new, cached)))

    def parts(self, program: Program, bucket: int, rows: "Rows") -> Parts:
        """The same as plain numbers: FLOPs of each part, and bytes of each."""
        if rows.tokens > bucket:
            raise ValueError(f"{rows.tokens:g} new tokens do not fit into {program} {bucket}")
        flops, num_bytes = self._curves[program].at(bucket)
        num_bytes += rows.tokens * self._bytes_per_key  # the keys and values that they write
        if self._attention is Attention.FUSED:
            of_rows, moved = self._sums(rows)
            return [flops, of_rows], [num_bytes, moved]
        by_row, moved_by_row = self._by_row(*rows.columns())
        return [flops, *by_row.tolist()], [num_bytes, *moved_by_row.tolist()]

    def ms_on(self, parts: Parts, cores: int, contended: Lane | None = None) -> float:
        """Milliseconds of such a step on so many cores, 1 or more."""
        per_flop, per_byte = (float(column[cores]) for column in self._ms_per_unit)
        longest = sum(max(per_flop * f, per_byte * b) for f, b in zip(*parts, strict=True))
        return longest * self._contention[contended] + self._launch_ms

    def ms(self, work: Floats, cores: ArrayLike, contended: Lane | None = None) -> Floats:
        """Milliseconds of such a step for each candidate number of cores [S], as `step_ms`.

        Of several steps at once, [J, 2, parts], it is [S, J].
        """
        index, most = np.asarray(cores), len(self._ms_per_unit[0]) - 1
        is_whole = index.ndim == 1 and index.dtype.kind in "iu"
        if not is_whole or (index.size and not 1 <= index.min() <= index.max() <= most):
            raise ValueError(f"cores must be a row of integers from 1 to {most}, not {index}")
        per_flop, per_byte = self._ms_per_unit
        flops, num_bytes = work[..., 0, :], work[..., 1, :]
        each = np.multiply.outer
        parts = np.maximum(each(per_flop[index], flops), each(per_byte[index], num_bytes))
        ms: Floats = np.add.reduce(parts, -1)
        ms *= self._contention[contended]
        ms += self._launch_ms
        return ms

    def _by_row(self, q: Floats, c: Floats) -> tuple[Floats, Floats]:
        """FLOPs and bytes of each row's attention over all layers, [R] both.

        Per layer F = (4 D + 2) H pairs, two products and the softmax over every pair of query and
        key, and B = 2 H q D s + 2 K (q + c) D s: queries in, outputs out, keys and values once.
        """
        context = q + c
        computed = self._share * q + (1 - self._share)  # queries of the average layer
        pairs = q * (context - 0.5 * (q - 1) if self._causal else context)
        pairs = self._share * pairs + (1 - self._share) * context
        moved = computed * self._bytes_per_query + context * self._bytes_per_key
        return pairs * self._flops_per_pair, moved

    def _sums(self, rows: "Rows") -> tuple[float, float]:
        """The sums of `_by_row` over the rows, multiplied out: every array costs microseconds."""
        tokens, context = rows.tokens, rows.context + rows.tokens
        squares = (rows.squares + tokens) / 2 if self._causal else rows.squares
        pairs = self._share * (rows.products + squares) + (1 - self._share) * context
        computed = self._share * tokens + (1 - self._share) * rows.count
        moved = computed * self._bytes_per_query + context * self._bytes_per_key
        return pairs * self._flops_per_pair, moved


class Rows:
    """The rows with new tokens, the others costing nothing; sums over them, which add up.

    tokens: new; context: cached; squares: of new; products: of new and cached.
    """

    __slots__ = ("_columns", "context", "count", "products", "squares", "tokens")

    def __init__(self, new: ArrayLike, cached: ArrayLike) -> None:
        self._columns: list[tuple[ArrayLike, ArrayLike]] = [(new, cached)]
        if isinstance(new, list) and isinstance(cached, list):
            self._add_up(new, cached)
            return
        q, c = np.asarray(new, np.float64), np.asarray(cached, np.float64)
        if q.ndim > 1 or c.ndim != 1 or q.shape not in ((), c.shape):
            raise ValueError(f"new and cached must be rows of one length: {q.shape}, {c.shape}")
        fewest = np.minimum.reduce(q, None, initial=1)
        self.context = float(np.add.reduce(c))
        self.tokens = float(np.add.reduce(q)) if q.ndim else float(q) * len(c)
        self._check(fewest >= 0 and np.minimum.reduce(c, initial=0) >= 0)
        if fewest < 1:
            busy = np.broadcast_to(q, c.shape) > 0
            q, c = np.broadcast_to(q, c.shape)[busy], c[busy]
            self.context = float(np.add.reduce(c))
        self.count = len(c)
        if q.ndim:
            self.squares, self.products = float(q @ q), float(q @ c)
        else:
            self.squares, self.products = float(q) * self.tokens, float(q) * self.context

    def __add__(self, other: "Rows") -> "Rows":
        both = object.__new__(Rows)
        both._columns = self._columns + other._columns
        both.count = self.count + other.count
        both.tokens = self.tokens + other.tokens
        both.context = self.context + other.context
        both.squares = self.squares + other.squares
        both.products = self.products + other.products
        return both

    def columns(self) -> tuple[Floats, Floats]:
        """New and cached tokens of each row."""
        pairs = [np.broadcast_arrays(q, c) for q, c in self._columns]
        new, cached = (np.concatenate(column) for column in zip(*pairs, strict=True))
        return new[new > 0].astype(np.float64), cached[new > 0].astype(np.float64)

    def _add_up(self, new: list[int], cached: list[int]) -> None:
        """The same for a few rows, where arrays would take longer than the sums."""
        if len(new) != len(cached):
            raise ValueError(
                f"new and cached must be rows of one length: {len(new)}, {len(cached)}"
            )
        count, tokens, context, squares, products = 0, 0.0, 0.0, 0.0, 0.0
        is_positive = True
        for q, c in zip(new, cached, strict=True):
            is_positive = is_positive and q >= 0 and c >= 0
            if q != 0:
                count += 1
                tokens += q
                context += c
                squares += q * q
                products += q * c
        self.count, self.tokens, self.context = count, tokens, context
        self.squares, self.products = squares, products
        self._check(is_positive)

    def _check(self, is_positive: bool) -> None:
        """NaN fails any comparison, and so does a sum with it or with infinity."""
        if not (is_positive and self.tokens < MOST_TOKENS and self.context < MOST_TOKENS):
            raise ValueError(
                f"new and cached must be from 0 to {MOST_TOKENS:g}, not {self._columns}"
            )


class _Curve:
    """What a program costs by bucket: nowhere less than a smaller bucket's cost."""

    def __init__(self, model: ModelProfile, program: Program) -> None:
        sizes = sorted(size for kind, size in model.costs if kind is program)
        if not sizes:
            raise ValueError(f"the profile of {model.model} has no {program} program")
        costs = [model.costs[program, size] for size in sizes]
        flops = accumulate([cost.flops for cost in costs], max)
        num_bytes = accumulate([cost.bytes for cost in costs], max)
        self._costs = dict(zip(sizes, zip(flops, num_bytes, strict=True), strict=True))
        self._sizes = sizes

    def at(self, bucket: int) -> tuple[float, float]:
        """FLOPs and bytes."""
        if bucket in self._costs or bucket < self._sizes[0] or len(self._sizes) == 1:
            return self._costs.get(bucket, self._costs[self._sizes[0]])
        place = min(bisect(self._sizes, bucket), len(self._sizes) - 1)
        low, high = self._sizes[place - 1], self._sizes[place]
        part = (bucket - low) / (high - low)
        (flops, num_bytes), (more_flops, more_bytes) = self._costs[low], self._costs[high]
        return flops + part * (more_flops - flops), num_bytes + part * (more_bytes - num_bytes)


def _ms_per_unit(hardware: HardwareProfile, reached: Sequence[float]) -> Floats:
    """Milliseconds of one FLOP or byte by number of cores; infinite on none."""
    cores = np.arange(hardware.cores + 1)
    per_s = np.interp(cores, [0, *(at.cores for at in hardware.curve)], [0.0, *reached])
    return np.divide(1e3, per_s, out=np.full_like(per_s, np.inf), where=per_s > 0)
