"""What a benchmark came to: numbers named as `vllm bench serve` names them, and some of our own."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from duetjax.bench_client import Record
from duetjax.sim.ledger import LATE_SHARE

type Floats = NDArray[np.float64]

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "worst_tbt": ("worst TBT", "Longest Gap of Each Request"),
    "client_queue_time": ("queue time", "Waiting for --max-concurrency"),
}
"""What percentiles are told of; the last two but one are not vLLM's."""
GOODPUT = ("ttft", "tpot", "e2el")
"""What `--goodput` may name, as in vLLM."""
_WIDTH = 50
_LATE_MS, _LATE_OF_TTFT, _BUSY = 2.0, 0.05, 0.7
"""From where on the client has spoiled what it measured."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """In milliseconds. goodput: of some of `GOODPUT`."""

    ttft_slo_ms: float
    tbt_slo_ms: float
    goodput: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a run. records: of the requests that had their turn; some may not be over.

    began: of time.monotonic, when the first was due; seconds: from then to the end.
    cpu_share: of a core, that the client's thread took. was_stopped: by Ctrl-C.
    """

    records: Sequence[Record]
    began: float
    seconds: float
    cpu_share: float
    was_stopped: bool


class Measured:
    """Numbers of the requests that were answered, each by name.

    values: milliseconds of each metric: a request's, or for itl of each gap between two events.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.over = [each for each in outcome.records if each.is_over]
        self.good = [each for each in self.over if each.error is None]
        self.gaps = [1e3 * np.diff(each.events) for each in self.good]
        first = 1e3 * np.array([each.events[0] - each.sent for each in self.good])
        whole = 1e3 * np.array([each.events[-1] - each.sent for each in self.good])
        tokens = np.array([each.tokens for each in self.good], np.int64)
        self.tpot_or_0 = np.where(tokens > 1, (whole - first) / np.maximum(tokens - 1, 1), 0.0)
        self.values: dict[str, Floats] = {
            "ttft": first,
            "tpot": self.tpot_or_0[tokens > 1],
            "itl": np.concatenate([np.zeros(0), *self.gaps]),
            "e2el": whole,
            "worst_tbt": np.array([gaps.max() for gaps in self.gaps if len(gaps)]),
            "client_queue_time": 1e3
            * np.maximum([each.sent - each.began for each in self.good], 0.0),
        }
        sent = [each for each in outcome.records if each.began == each.began]
        self.lateness_ms = 1e3 * np.array([each.began - each.due for each in sent])

    def kept(self, objectives: Objectives) -> tuple[float, float, float]:
        """Shares of the requests that kept the objective for the first token, that between tokens,
        and both: of all that are over, so that who failed has kept none.

        Of a request's gaps, `LATE_SHARE` may be longer, as in `duetjax simulate`.
        """
        soon = self.values["ttft"] <= objectives.ttft_slo_ms
        slo = objectives.tbt_slo_ms
        late = [np.count_nonzero(gaps > slo) <= floor(LATE_SHARE * len(gaps)) for gaps in self.gaps]
        steady = np.array(late, np.bool_)
        of = max(len(self.over), 1)
        ttft, tbt, both = (float(kept.sum() / of) for kept in (soon, steady, soon & steady))
        return ttft, tbt, both

    def goodput(self, objectives: Mapping[str, float]) -> float | None:
        """Requests/s that keep all of these; one of one token has a TPOT of 0, as in vLLM."""
        if not objectives:
            return None
        values = self.values | {"tpot": self.tpot_or_0}
        kept = [values[name] <= limit for name, limit in objectives.items()]
        return float(np.all(kept, axis=0).sum() / self.outcome.seconds)

    def peaks(self) -> tuple[float, int]:
        """Most output tokens of a second, counted from the first request on; most at a time."""
        if not self.good:
            return 0.0, 0
        began = min([each.sent for each in self.good])
        events = np.concatenate([each.events for each in self.good])
        changes = [(each.sent, 1) for each in self.good]
        changes += [(each.events[-1], -1) for each in self.good]
        open_now = np.cumsum([change for _, change in sorted(changes)])
        return float(np.bincount((events - began).astype(np.int64)).max()), int(open_now.max())

    def document(
        self, metrics: Sequence[str], percentiles: Sequence[float], objectives: Objectives
    ) -> dict[str, object]:
        """The fields of the result that were measured."""
        outcome, seconds = self.outcome, self.outcome.seconds
        prompt = sum([each.prompt_tokens for each in self.good])
        output = sum([each.tokens for each in self.good])
        most_tokens, most_requests = self.peaks()
        ttft, tbt, both = self.kept(objectives)
        found: dict[str, object] = {
            "duration": seconds,
            "completed": len(self.good),
            "failed": len(self.over) - len(self.good),
            "unfinished": len(outcome.records) - len(self.over),
            "errors_by_code": dict(Counter([each.error for each in self.over if each.error])),
            "total_input_tokens": prompt,
            "total_output_tokens": output,
            "total_output_events": sum([len(each.events) for each in self.good]),
            "request_throughput": len(self.good) / seconds,
            "request_goodput": self.goodput(objectives.goodput),
            "output_throughput": output / seconds,
            "total_token_throughput": (prompt + output) / seconds,
            "max_output_tokens_per_s": most_tokens,
            "max_concurrent_requests": most_requests,
            "ttft_attainment": ttft,
            "tbt_attainment": tbt,
            "attainment": both,
            "ttft_slo_ms": objectives.ttft_slo_ms,
            "tbt_slo_ms": objectives.tbt_slo_ms,
            "client_cpu_share": outcome.cpu_share,
            "client_lateness_ms": dict(zip(("p50", "p99", "max"), self.lateness(), strict=True)),
            "warnings": list(self.warnings()),
        }
        for name in metrics:
            values = self.values[name] if len(self.values[name]) else np.zeros(1)
            found |= {
                f"mean_{name}_ms": float(values.mean()),
                f"median_{name}_ms": float(np.median(values)),
                f"std_{name}_ms": float(values.std()),
            }
            found |= {
                f"p{share:g}_{name}_ms": float(np.percentile(values, share))
                for share in percentiles
            }
        return found

    def lateness(self) -> list[float]:
        """How late requests left, in milliseconds: p50, p99, longest."""
        late = self.lateness_ms if len(self.lateness_ms) else np.zeros(1)
        return [float(np.percentile(late, share)) for share in (50, 99, 100)]

    def warnings(self) -> Iterator[str]:
        """What makes the numbers doubtful."""
        late = self.lateness()[1]
        ttft = float(np.median(self.values["ttft"])) if self.good else 0.0
        if late > max(_LATE_MS, _LATE_OF_TTFT * ttft):
            yield f"1 % of the requests left {late:.1f} ms late or more: the client cannot keep up"
        if self.outcome.cpu_share > _BUSY:
            yield (
                f"the client took {self.outcome.cpu_share:.0%} of a core: gaps are also its own;"
                " send less, or from several processes"
            )
        tokens = sum([each.tokens for each in self.good])
        events = sum([len(each.events) for each in self.good])
        if tokens != events:
            yield f"{tokens} tokens came in {events} events: ITL is between events"
        if self.outcome.was_stopped:
            yield "stopped before its end"

    def detailed(self) -> dict[str, object]:
        """Request by request, in seconds, named as in vLLM; failed ones have no times."""
        began = self.outcome.began
        return {
            "input_lens": [each.prompt_tokens for each in self.over],
            "output_lens": [each.tokens for each in self.over],
            "start_times": [each.sent - began for each in self.over],
            "ttfts": [each.events[0] - each.sent if each.events else 0.0 for each in self.over],
            "itls": [np.diff(each.events).tolist() for each in self.over],
            "errors": [each.error or "" for each in self.over],
        }


def lines(document: Mapping[str, object], metrics: Sequence[str]) -> Iterator[str]:
    """The result as a table, from its own fields."""
    yield f"{' Serving Benchmark Result ':=^{_WIDTH}}"
    for label, name, form in _ROWS:
        if (value := document[name]) is not None:
            yield f"{label + ':':<40} {value:{form if isinstance(value, float) else ''}}"
    lateness = document["client_lateness_ms"]
    assert isinstance(lateness, dict)
    late = "/".join([f"{each:.2f}" for each in lateness.values()])
    yield f"{'Client lateness p50/p99/max (ms):':<40} {late}"
    for name in metrics:
        short, title = METRICS[name]
        yield f"{title:-^{_WIDTH}}"
        for field, value in document.items():
            if field.endswith(f"_{name}_ms") and not field.startswith("std"):
                statistic = field.removesuffix(f"_{name}_ms").capitalize()
                yield f"{f'{statistic} {short} (ms):':<40} {value:.2f}"
    yield "=" * _WIDTH
    errors = document["errors_by_code"]
    assert isinstance(errors, dict)
    for error, count in errors.items():
        yield f"failed: {count} x {error}"
    warnings = document["warnings"]
    assert isinstance(warnings, list)
    yield from (f"warning: {warning}" for warning in warnings)


_ROWS = (
    ("Successful requests", "completed", ""),
    ("Failed requests", "failed", ""),
    ("Maximum request concurrency", "max_concurrency", ""),
    ("Request rate configured (RPS)", "request_rate", ".2f"),
    ("Benchmark duration (s)", "duration", ".2f"),
    ("Total input tokens", "total_input_tokens", ""),
    ("Total generated tokens", "total_output_tokens", ""),
    ("Request throughput (req/s)", "request_throughput", ".2f"),
    ("Request goodput (req/s)", "request_goodput", ".2f"),
    ("Output token throughput (tok/s)", "output_throughput", ".2f"),
    ("Peak output token throughput (tok/s)", "max_output_tokens_per_s", ".2f"),
    ("Peak concurrent requests", "max_concurrent_requests", ""),
    ("Total token throughput (tok/s)", "total_token_throughput", ".2f"),
    ("First tokens within the objective", "ttft_attainment", ".1%"),
    ("Gaps within the objective", "tbt_attainment", ".1%"),
    ("Both", "attainment", ".1%"),
)
