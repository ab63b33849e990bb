"""What the compiled programs and the KV pool allow, and which requests can therefore never run."""

import math
from dataclasses import dataclass

from duetjax.config import MAX_PRIORITY, InvalidRequest
from duetjax.policy.request import NewRequest

LAUNCHES_PER_LANE = 2  # one runs, the next is already there when it ends

_SMALLEST_PREFILL = 64


def decode_buckets(max_num_seqs: int, fewest: int = 2) -> tuple[int, ...]:
    """Rows of the decode programs: powers of 2 from `fewest` on, up to all rows or just beyond."""
    sizes = [fewest]
    while sizes[-1] < max_num_seqs:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def prefill_buckets(largest: int, ratio: int = 2) -> tuple[int, ...]:
    """Tokens of the prefill programs: `largest`, and that divided by powers of `ratio`."""
    sizes = [largest]
    while sizes[0] > 4 * _SMALLEST_PREFILL:
        sizes.insert(0, sizes[0] // ratio)
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes that the compiled programs and the KV pool allow.

    num_pages counts the dummy page 0. num_slots: requests admitted at once (max_num_seqs).
    max_num_batched_tokens: tokens one launch computes, a decoding row being one. decode_buckets
    [rows] and prefill_buckets [tokens]: ascending sizes that programs were compiled for; any of
    the latter takes as many rows as tokens, up to num_slots. prefix_caching: keep the pages of
    ended requests for others that begin alike. deterministic: launches that hold the same for a
    request whatever runs beside it; see `Scheduler`.
    """

    num_pages: int
    page_size: int
    num_slots: int
    max_model_len: int
    max_num_batched_tokens: int
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    prefix_caching: bool = True
    deterministic: bool = False
    launches_per_lane: int = LAUNCHES_PER_LANE

    def __post_init__(self) -> None:
        assert min(self.page_size, self.num_slots, self.launches_per_lane) >= 1, self
        assert min(self.num_pages, self.max_model_len) >= 2, self
        assert self.max_num_batched_tokens > self.num_slots, f"no room for prompts: {self}"
        for buckets in (self.decode_buckets, self.prefill_buckets):
            assert list(buckets) == sorted(set(buckets)) != [], f"not ascending: {buckets}"
        assert self.decode_buckets[-1] >= self.num_slots, f"no bucket for a full batch: {self}"
        largest = min(self.max_num_batched_tokens, self.num_slots * (self.max_model_len - 1))
        assert self.prefill_buckets[-1] >= largest, f"no bucket for {largest} tokens: {self}"

    @property
    def pages_per_chunk(self) -> int:
        """The least number of pages that ends a prompt chunk under `deterministic`, too."""
        chunk = self.max_num_batched_tokens
        return math.lcm(chunk, self.page_size) // self.page_size

    def num_fed(self, new: NewRequest) -> int:
        """Most tokens of a request that are ever fed, so have KV: all but the last one sampled.

        A request of length L = min(prompt + max_tokens, max_model_len) feeds positions [0, L - 1).
        """
        return min(len(new.prompt) + new.max_tokens, self.max_model_len) - 1

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold the KV of positions [0, num_tokens)."""
        return -(-num_tokens // self.page_size)

    def check(self, new: NewRequest) -> None:
        """Raises `InvalidRequest` for a request that could never run, however idle the engine."""
        if not new.prompt:
            raise InvalidRequest(
                "the prompt has no tokens; give at least one to continue from", param="prompt"
            )
        if new.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens must be at least 1, not {new.max_tokens}", param="max_tokens"
            )
        if not -MAX_PRIORITY <= new.priority <= MAX_PRIORITY:
            raise InvalidRequest(
                f"priority {new.priority} is not from -{MAX_PRIORITY} to {MAX_PRIORITY}",
                param="priority",
            )
        if len(new.prompt) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(new.prompt)} tokens, but with one token to generate at most"
                f" {self.max_model_len - 1} fit in max_model_len {self.max_model_len}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        needed, usable = self.num_pages_for(self.num_fed(new)), self.num_pages - 1
        if needed > usable:
            raise InvalidRequest(
                f"prompt and max_tokens together need {needed} KV pages of {self.page_size} tokens,"
                f" but there are {usable}; shorten them or give the KV cache more memory",
                param="max_tokens",
            )
