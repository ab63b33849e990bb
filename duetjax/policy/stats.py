"""What there is to say about a scheduler at one moment, in plain values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler at one moment: gauges, then counters since the start.

    running: requests with a slot. pages_total: usable pages, the dummy left out; those not named
    are held. preempted_tokens: computed KV that preemption threw away. prompt_tokens: of prompts
    computed to their end, each counted once. prefix_queries, prefix_hits: tokens of admitted
    requests, and those found in the prefix cache. steps: finished. busy_seconds: with a launch
    in flight. decode_cores, prefill_cores: of the split of the episode in progress, 0 where there
    is none. decisions: of launches, (why they were made so, how many). predicted_ttft_ms: of a
    short prompt that came now, if it finds a slot; ms_per_prompt_token: at which pace prompts are
    computed; both None before the first launch foretold.
    prediction_error: see `Durations`, None where nobody foretells; predictions_trusted too.
    """

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_quarantined: int
    preemptions: int
    preempted_tokens: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    busy_seconds: float
    decode_cores: int
    prefill_cores: int
    decisions: tuple[tuple[str, int], ...]
    predicted_ttft_ms: float | None
    ms_per_prompt_token: float | None
    prediction_error: float | None
    predictions_trusted: bool

    @property
    def pages_held(self) -> int:
        """Pages of running requests, shared ones counted once."""
        return self.pages_total - self.pages_free - self.pages_cached - self.pages_quarantined
