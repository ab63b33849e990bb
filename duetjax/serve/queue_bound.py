"""How many requests may wait: what comes beyond is told when to come again."""

import math

from prometheus_client import Counter

from duetjax.config import InvalidRequest
from duetjax.engine import EngineClient
from duetjax.serve.errors import HttpError

_LONGEST_SECONDS = 60
_HIGH_WATER, _LOW_WATER = 0.9, 0.5


class QueueBound:
    """Turns requests away once as many are live as may run and wait; None as bound takes all.

    Live is what has been submitted and has not ended, so nothing need be given back. Used on the
    event loop's thread alone, where all submissions are made. refused: counts what was turned away.
    """

    def __init__(self, client: EngineClient, max_queued: int | None, refused: Counter) -> None:
        self._client = client
        self._most = None if max_queued is None else client.num_slots + max_queued
        self._refused = refused
        self._waits_for_low_water = False

    def check(self, count: int) -> None:
        """Raises a 429 where `count` generations more are too many now; 400 where they always are.

        Retry-After is the predicted time until all prompts before it have been computed, from 1 to
        60 seconds; 1 where nobody predicts.
        """
        if self._most is None:
            return
        if count > self._most:
            raise InvalidRequest(
                f"the request asks for {count} generations; this server takes at most {self._most}"
                " at once, running and waiting",
                param="n",
            )
        self.why_full()  # between two looks of a probe it may have been
        live = self._client.num_live
        if live + count > self._most:
            self._refused.inc()
            seconds = self.seconds()
            raise HttpError(
                429,
                "queue_full",
                f"the queue is full: {live} generations run or wait and at most {self._most} may;"
                f" try again in {seconds} s",
                headers={"retry-after": str(seconds)},
            )

    def why_full(self) -> str | None:
        """Why to send work elsewhere, in words; None where there is no reason.

        From high water on, nine tenths of the queue, until it has gone down to low water, a half.
        """
        if self._most is None:
            return None
        live, slots = self._client.num_live, self._client.num_slots
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
