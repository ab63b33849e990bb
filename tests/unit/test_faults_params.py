"""Parameters out of place: each is refused, and nobody's tokens change."""

from faults import Faults
from faulty import code, harm, server
from serve_setup import MODEL

from duetjax.config import SamplingParams

FAULTS = Faults("Parameters", server, harm)


def asking(**fields):
    """An attack: a completion with these fields."""

    def attack(served):
        with served.http() as http:
            response = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"} | fields)
            return code(response)

    return attack


def any_choice(monkeypatch):
    monkeypatch.setattr(SamplingParams, "_check_choice", lambda _: None)


FAULTS.add(
    "temperature 2.1",
    asking(temperature=2.1),
    expected="400 invalid_value",
    guard="ranges of SamplingParams",
    off=any_choice,
)

test_guarded, test_unguarded = FAULTS.tests()
