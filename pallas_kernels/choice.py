"""Which kernels a GPU gets, and why: for `doctor` to print, and for a user to override."""

from dataclasses import dataclass
from enum import StrEnum

from pallas_kernels.mosaic import MosaicKernels
from pallas_kernels.shapes import FP8, PLAIN_SCORES, Scores, why_not
from pallas_kernels.tuning import Case, tuning_for


class Asked(StrEnum):
    """Which kernels the user wants. AUTO: the fastest that can run."""

    AUTO = "auto"
    XLA = "xla"
    MOSAIC = "mosaic"


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """What kernels need to know of a model and its pages. dtype: of the pages, as "bfloat16"."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernels, and one line that says why. mosaic None: those of `pallas_kernels.xla`."""

    mosaic: MosaicKernels | None
    why: str

    @property
    def name(self) -> Asked:
        """What to ask for to get these."""
        return Asked.XLA if self.mosaic is None else Asked.MOSAIC


def choose(
    compute_capability: str | None,
    shapes: ModelShapes,
    asked: Asked = Asked.AUTO,
    scores: Scores = PLAIN_SCORES,
) -> Choice:
    """The kernels for a device. compute_capability: as "9.0" or "9.0a"; None: not an NVIDIA GPU.

    Raises ValueError if Mosaic's are asked for and cannot run, or XLA's for scores that these
    do not know.
    """
    if asked is Asked.XLA:
        return _xla("asked for", scores)
    reason, kernels = _mosaic(compute_capability, shapes, scores)
    if kernels is not None:
        return Choice(kernels, reason if asked is Asked.AUTO else f"asked for; {reason}")
    if asked is Asked.MOSAIC:
        raise ValueError(f"the kernels of Mosaic GPU cannot run: {reason}")
    return _xla(reason, scores)


def _mosaic(
    compute_capability: str | None, shapes: ModelShapes, scores: Scores
) -> tuple[str, MosaicKernels | None]:
    """Mosaic's kernels and what speaks for them, or what speaks against them and None."""
    if compute_capability is None:
        return "not an NVIDIA GPU", None
    capability = compute_capability.removesuffix("a")
    if capability != "9.0":
        return f"compute capability {capability}, and Mosaic's are for 9.0 (Hopper)", None
    s = shapes
    if s.dtype == FP8:
        return "fp8 pages, whose scales the KV cache does not keep yet", None
    reason = why_not(s.num_heads, s.num_kv_heads, s.page_size, s.head_dim, s.dtype)
    if reason is not None:
        return reason, None
    case = Case("sm_90", s.head_dim, s.page_size, s.dtype)
    entry = tuning_for(case)
    if entry is None:
        return f"no tuning for {case}; run python -m pallas_kernels.tune", None
    why = f"compute capability {capability}; tuning of {entry.date}: {entry.source}"
    return why, MosaicKernels(entry.tuning, scores)


def _xla(why: str, scores: Scores) -> Choice:
    if scores != PLAIN_SCORES:
        raise ValueError(f"XLA's kernels have no {scores}, and Mosaic's do not run: {why}")
    return Choice(None, why)
