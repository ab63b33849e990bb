"""Objectives that a request brings in its headers."""

import re

from starlette.datastructures import Headers

from duetjax.config import InvalidRequest

_TBT_HEADERS = ("x-slo-tbt-ms", "x-slo-tpot-ms")  # the second is what load tools send
_MILLISECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


def tbt_slo_ms(headers: Headers) -> float | None:
    """The longest time between tokens that a request asks for; None where it says nothing.

    Raises `InvalidRequest` for what is no time, and for two that differ.
    """
    given = {name: _milliseconds(name, headers[name]) for name in _TBT_HEADERS if name in headers}
    if len(set(given.values())) > 1:
        raise InvalidRequest(
            f"{' and '.join(given)} differ; send one of them", param=_TBT_HEADERS[0]
        )
    return next(iter(given.values()), None)


def _milliseconds(name: str, text: str) -> float:
    if not _MILLISECONDS.fullmatch(text) or float(text) < 1e-3:
        raise InvalidRequest(f"{name} must be milliseconds above 0, such as 50", param=name)
    return float(text)
