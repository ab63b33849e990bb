"""How long a request's parts took: for the histograms at /metrics, and for the clients who ask."""

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from duetjax.config import InvalidRequest

TIMINGS_HEADER = "x-duetjax-timings"


def wants_timings(headers: Headers) -> bool:
    """Whether a request asks for them; raises `InvalidRequest` unless it says 1 or 0."""
    given = headers.get(TIMINGS_HEADER, "0")
    if given not in ("0", "1"):
        raise InvalidRequest(f"{TIMINGS_HEADER} must be 1, or 0 for none", param=TIMINGS_HEADER)
    return given == "1"


@dataclass(frozen=True, slots=True)
class Timings:
    """Of a generation that has ended, in seconds.

    queue: from its submission to its first launch; prefill: to its first token; decode: to its
    last. ttft, e2e: from the HTTP request's arrival to the first token and to the last. launches:
    planned with it; 0 where a stop string ended it, as the engine does not tell then.
    """

    queue: float
    prefill: float
    decode: float
    ttft: float
    e2e: float
    launches: int

    def told(self, index: int) -> dict[str, Any]:
        """What a client sees of choice `index`: milliseconds."""
        return {
            "index": index,
            "queue_ms": round(1e3 * self.queue, 3),
            "prefill_ms": round(1e3 * self.prefill, 3),
            "decode_ms": round(1e3 * self.decode, 3),
            "ttft_ms": round(1e3 * self.ttft, 3),
            "launches": self.launches or None,
        }
