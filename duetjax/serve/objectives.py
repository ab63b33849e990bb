"""Objectives that a request brings in its headers."""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from duetjax.config import InvalidRequest

TTFT_HEADERS = ("x-slo-ttft-ms",)
TBT_HEADERS = ("x-slo-tbt-ms", "x-slo-tpot-ms")  # the second is what load tools send
# From 0.001 on. Load tools that take "25" for a number send "025".
MILLISECONDS = re.compile(r"0{0,8}([1-9][0-9]{0,8}(\.[0-9]{1,9})?|0\.0{0,2}[1-9][0-9]{0,6})")


@dataclass(frozen=True, slots=True)
class Objectives:
    """The longest times to the first token and between tokens, in ms; None is the server's."""

    ttft_ms: float | None
    tbt_ms: float | None


def objectives(headers: Headers) -> Objectives:
    """What a request asks for; raises `InvalidRequest` for no time, and for two that differ."""
    return Objectives(_objective(headers, TTFT_HEADERS), _objective(headers, TBT_HEADERS))


def _objective(headers: Headers, names: tuple[str, ...]) -> float | None:
    given = {name: _milliseconds(name, headers[name]) for name in names if name in headers}
    if len(set(given.values())) > 1:
        raise InvalidRequest(f"{' and '.join(given)} differ; send one of them", param=names[0])
    return next(iter(given.values()), None)


def _milliseconds(name: str, text: str) -> float:
    if not MILLISECONDS.fullmatch(text):
        raise InvalidRequest(f"{name} must be milliseconds above 0, such as 50", param=name)
    return float(text)
