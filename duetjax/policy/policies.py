"""What sets policies apart: from a few numbers, how the next launch shares the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.launch import Split


@dataclass(frozen=True, slots=True, eq=False)
class Details:
    """What a policy that looks ahead has to know.

    contexts: of the decoding rows, tokens in KV. prompts: (start, left) of the admitted prompts, in
    order. tbt_slo_ms: tightest objective of what decodes. max_k: decode steps that the row with
    most left may take, and that KV pages allow. split: of the episode in progress. handed_over_ms:
    how long rows have waited for their first decode step since the last prefill launch ended beside
    others; 0 where there are none.
    """

    contexts: NDArray[np.int64]
    prompts: tuple[tuple[int, int], ...]
    tbt_slo_ms: float
    max_k: int
    split: Split | None = None
    handed_over_ms: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What could run now: decoding rows, and tokens of admitted prompts not computed yet.

    look: the details, found out when asked for.
    """

    rows: int
    prompt_tokens: int
    look: Callable[[], Details]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One launch on the whole device: the decoding rows if `decodes`, then prompt chunks.

    budget: tokens of the launch, a decoding row being one. k: steps, where it only decodes. why: in
    one word, to be counted.
    """

    budget: int
    decodes: bool = True
    k: int = 1
    why: str = "aggregated"


@dataclass(frozen=True, slots=True)
class Duet:
    """Prefill on one part of the device and k decode steps per launch on the other.

    budget: tokens of a prefill launch. why: as in `Aggregate`.
    """

    split: Split
    k: int
    budget: int
    why: str = "split"


type Decision = Aggregate | Duet


class Policy(Protocol):
    """Decides whenever a launch can be planned, from what it is given and decided before."""

    def decide(self, load: Load) -> Decision:
        """How to run `load`; one of its numbers is positive."""


@dataclass(frozen=True, slots=True)
class Aggregated:
    """Mixed batches under a fixed token budget: chunked prefill, the usual way."""

    budget: int

    def decide(self, load: Load) -> Decision:
        """Everything that decodes, and prompts in what is left of the budget."""
        return Aggregate(self.budget)


@dataclass(frozen=True, slots=True)
class PrefillFirst:
    """Prompts as soon as there are any, at the price of whatever decodes."""

    budget: int

    def decide(self, load: Load) -> Decision:
        """Decodes when no prompt can be computed."""
        return Aggregate(self.budget, decodes=load.prompt_tokens == 0)


@dataclass(frozen=True, slots=True)
class StaticSplit:
    """The same split whenever there is something for both of its sides."""

    budget: int
    split: Split
    k: int

    def decide(self, load: Load) -> Decision:
        """The whole device for whoever is alone."""
        if load.rows and load.prompt_tokens:
            return Duet(self.split, self.k, self.budget)
        return Aggregate(self.budget)
