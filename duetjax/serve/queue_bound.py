"""How much may wait: what comes beyond is told when to come again."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from duetjax.config import InvalidRequest
from duetjax.engine import Engine
from duetjax.serve.errors import HttpError
from duetjax.serve.limits import Limits

_LONGEST_SECONDS = 60
_HIGH_WATER, _LOW_WATER = 0.9, 0.5


class QueueBound:
    """Turns requests away once too many are live, too many tokens wait, or they would come late.

    Live is what has been submitted and has not ended, so no place need be given back; before that,
    what has `places`. Used on the event loop's thread alone, where all submissions are made.
    queued_tokens: of prompts that were submitted and whose first token has not come; arrivals: when
    such requests came, by id, the oldest first, in seconds of time.perf_counter. Whoever submits
    adds them and takes them off.
    """

    def __init__(self, client: Engine, limits: Limits) -> None:
        self._client = client
        self._limits = limits
        queued = limits.max_num_queued_reqs
        self._most = None if queued is None else client.num_slots + queued
        self._waits_for_low_water = False
        self._num_unsubmitted = 0
        self.queued_tokens = 0
        self.arrivals: dict[str, float] = {}

    def oldest_seconds(self) -> float:
        """How long the oldest of `arrivals` has waited; 0 where there is none."""
        first = next(iter(self.arrivals.values()), None)
        return 0.0 if first is None else time.perf_counter() - first

    def check(self, count: int, tokens: int = 0, ttft_slo_ms: float | None = None) -> None:
        """Raises a 429 where `count` generations of `tokens` prompt tokens are too many now.

        400 where they always are. ttft_slo_ms: their objective; None is the server's. Retry-After
        is the predicted time until all prompts before it have been computed, from 1 to 60 seconds;
        1 where nobody predicts.
        """
        self._check_requests(count)
        self._check_tokens(tokens)
        self._check_ttft(tokens, ttft_slo_ms)

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Counts generations that cannot be submitted yet; who leaves may submit them at once.

        Raises what `check` does where they are too many.
        """
        self._check_requests(count)
        self._num_unsubmitted += count
        try:
            yield
        finally:
            self._num_unsubmitted -= count

    @property
    def _num_live(self) -> int:
        return self._client.num_live + self._num_unsubmitted

    def _check_requests(self, count: int) -> None:
        if self._most is None:
            return
        if count > self._most:
            raise InvalidRequest(
                f"the request asks for {count} generations; this server takes at most {self._most}"
                " at once, running and waiting",
                param="n",
                reason="max_num_queued_reqs",
            )
        self.why_full()  # between two looks of a probe it may have been
        live = self._num_live
        if live + count > self._most:
            raise self._full(f"{live} generations run or wait and at most {self._most} may")

    def _check_tokens(self, tokens: int) -> None:
        most = self._limits.max_num_queued_tokens
        if most is not None and self.queued_tokens and self.queued_tokens + tokens > most:
            raise self._full(
                f"{self.queued_tokens} prompt tokens wait and at most {most} may",
                reason="max_num_queued_tokens",
            )

    def _check_ttft(self, tokens: int, objective_ms: float | None) -> None:
        if objective_ms is None:
            objective_ms = self._limits.ttft_slo_ms
        if objective_ms is None or not self.queued_tokens:
            return
        ms_per_token = self._client.stats().ms_per_prompt_token or 0.0
        predicted_ms = (self.queued_tokens + tokens) * ms_per_token
        if predicted_ms > objective_ms:
            raise self._full(
                f"the first token is predicted to come in {predicted_ms:.0f} ms, later than the"
                f" objective of {objective_ms:g} ms",
                reason="ttft_slo_ms",
            )

    def _full(self, why: str, reason: str | None = None) -> HttpError:
        seconds = self.seconds()
        return HttpError(
            429,
            "queue_full",
            f"the queue is full: {why}; try again in {seconds} s",
            headers={"retry-after": str(seconds)},
            reason=reason,
        )

    def why_full(self) -> str | None:
        """Why to send work elsewhere, in words; None where there is no reason.

        From high water on, nine tenths of the queue, until it has gone down to low water, a half.
        """
        if self._most is None:
            return None
        live, slots = self._num_live, self._client.num_slots
        high = slots + math.ceil(_HIGH_WATER * (self._most - slots))
        low = min(high - 1, slots + int(_LOW_WATER * (self._most - slots)))
        if live >= high or live <= low:
            self._waits_for_low_water = live >= high
        if not self._waits_for_low_water:
            return None
        return f"{live} generations run or wait; ready again at {low}"

    def seconds(self) -> int:
        """The predicted time until all prompts before have been computed, from 1 to 60 s."""
        predicted_ms = self._client.stats().predicted_ttft_ms
        if predicted_ms is None:
            return 1
        return math.ceil(min(max(1, predicted_ms / 1e3), _LONGEST_SECONDS))
