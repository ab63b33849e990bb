"""A truth that was planted is found again, and held-out launches are missed by its noise alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
from profiled_setup import HARDWARE, MODEL, a_grid, plain, timed, truth

from duetjax.policy.calibration import FIRST_FACTOR, Calibration
from duetjax.policy.fit import Errors, by_kind, fitted, relative_errors, taught
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import Basis, HardwareProfile

WHOLE_DECODE, WHOLE_PREFILL = (Lane.WHOLE, Program.DECODE), (Lane.WHOLE, Program.PREFILL)
DECODE, PREFILL = (Lane.DECODE, Program.DECODE), (Lane.PREFILL, Program.PREFILL)
PLANTED = {
    "attention_compute": 0.4,
    "attention_memory": 0.7,
    "contention_decode": 1.2,
    "contention_prefill": 1.07,
    "launch_us": 600.0,
}
CASES = a_grid().cases(1120, 1e9)


def halves(points):
    return [one for one, held in points if not held], [one for one, held in points if held]


def errors(correction, points):
    return Errors.of(relative_errors(correction.foretold(MODEL, points), points))


def test_without_noise_what_was_planted_is_found():
    true = truth(**PLANTED)
    seen, held_out = halves(timed(CASES, true))
    found = fitted(MODEL, HARDWARE, seen)
    for name, value in PLANTED.items():
        assert getattr(found.hardware, name) == pytest.approx(value, rel=0.05), name
    for key in (WHOLE_DECODE, WHOLE_PREFILL, DECODE, PREFILL):
        assert found.factors[key] == pytest.approx(true.factors[key], rel=0.02), key
    assert errors(found, held_out).p95 < 0.02
    assert errors(plain(), held_out).p95 > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_under_noise_held_out_launches_are_missed_by_hardly_more_than_it(seed):
    true = truth(**PLANTED)
    seen, held_out = halves(timed(CASES, true, noise=0.04, seed=seed))
    assert len(held_out) >= 500
    found, best = errors(fitted(MODEL, HARDWARE, seen), held_out), errors(true, held_out)
    assert found.median < 1.1 * best.median
    assert found.p95 < 1.1 * best.p95
    assert found.median < 0.05
    assert found.p95 < 0.10


def test_attention_that_is_foretold_well_is_left_as_it_was():
    seen, _ = halves(timed(CASES, truth(), noise=0.05))
    found = fitted(MODEL, HARDWARE, seen).hardware
    assert (found.attention_compute, found.attention_memory) == (1.0, 1.0)
    assert found.launch_us == HARDWARE.launch_us
    assert "attention_compute" not in found.origins


def test_lanes_that_share_all_cores_are_contended_by_what_the_whole_device_is_not():
    """A lane is never alone there, so its factor is that of the whole device."""
    cases = a_grid(has_parts=False).cases(800, 1e9)
    true = truth((1.1, 1.2, 1.1, 1.2), contention_decode=1.5, contention_prefill=1.8)
    seen, held_out = halves(timed(cases, true, noise=0.02))
    found = fitted(MODEL, HARDWARE, seen)
    assert found.hardware.contention_decode == pytest.approx(1.5, rel=0.03)
    assert found.hardware.contention_prefill == pytest.approx(1.8, rel=0.03)
    assert errors(found, held_out).p95 < 0.06


def test_a_lane_that_is_faster_beside_the_other_is_not_said_to_be_contended():
    """What a profile cannot say is left to the factor."""
    cases = a_grid(has_parts=False).cases(800, 1e9)
    true = truth((1.2, 1.2, 0.9, 0.9), contention_decode=1.0, contention_prefill=1.0)
    seen, held_out = halves(timed(cases, true))
    found = fitted(MODEL, HARDWARE, seen)
    assert found.hardware.contention_decode == found.hardware.contention_prefill == 1.0
    assert found.factors[DECODE] == pytest.approx(0.9, rel=0.01)
    assert errors(found, held_out).worst < 0.02


def test_a_few_outliers_move_nothing():
    true = truth(**PLANTED)
    seen, held_out = halves(timed(CASES, true, noise=0.02))
    for place in range(0, len(seen), 20):
        seen[place] = replace(seen[place], ms=10 * seen[place].ms)
    assert errors(fitted(MODEL, HARDWARE, seen), held_out).median < 0.025


def test_kinds_that_were_hardly_timed_keep_what_they_had():
    seen, _ = halves(timed(CASES, truth()))
    whole = [each for each in seen if each.step.lane is Lane.WHOLE]
    found = fitted(MODEL, HARDWARE, whole)
    assert found.hardware.contention_decode == HARDWARE.contention_decode
    assert found.factors[DECODE] == found.factors[WHOLE_DECODE]
    with pytest.raises(ValueError, match="nothing was timed"):
        fitted(MODEL, HARDWARE, [])


def test_what_was_fitted_says_so_in_a_document_that_can_be_read_again():
    seen, _ = halves(timed(CASES, truth(**PLANTED)))
    found = fitted(MODEL, HARDWARE, seen).hardware
    text = json.dumps(found.to_json())
    assert HardwareProfile.from_json(json.loads(text), "f") == found
    for name in PLANTED:
        assert found.origins[name].basis is Basis.MEASURED
        assert f"{len(seen)} timed launches" in found.origins[name].source
    assert found.origins["curve_cores"] == HARDWARE.origins["curve_cores"]


def test_a_calibration_that_was_taught_has_the_factors_and_is_trusted():
    true = truth(**PLANTED)
    seen, held_out = halves(timed(CASES, true, noise=0.04))
    found = fitted(MODEL, HARDWARE, seen)
    kept = taught(Calibration("small", "card"), found, MODEL, seen)
    for key in (WHOLE_DECODE, WHOLE_PREFILL, DECODE, PREFILL):
        assert kept.factor(*key) == pytest.approx(found.factors[key], rel=0.01), key
    assert kept.is_trusted
    assert 0.01 < kept.median_error < 0.05
    assert 1.0 < kept.slack < 1.15
    read = Calibration.from_json(kept.to_json(), "f", model="small", hardware="card")
    assert read.to_json() == kept.to_json()
    foresight = Foresight(MODEL, found.hardware, read)
    of_lanes = [each for each in held_out if each.is_beside or each.step.split is None]
    told = np.array([foresight.step_ms(each.step) for each in of_lanes])
    assert Errors.of(relative_errors(told, of_lanes)).median < 0.05


def test_factors_at_their_bound_are_those_that_a_calibration_has():
    for seed in range(4):
        seen, _ = halves(timed(CASES, truth((0.5,) * 4), noise=0.1, seed=seed))
        found = fitted(MODEL, HARDWARE, seen)
        kept = taught(Calibration("small", "card"), found, MODEL, seen)
        for key in (WHOLE_DECODE, WHOLE_PREFILL):
            assert kept.factor(*key) == pytest.approx(found.factors[key], rel=1e-9), (seed, key)


@pytest.mark.parametrize("num_decode_steps", [1000, 3], ids=["many", "too few"])
def test_what_the_fit_foretells_is_what_a_server_with_its_files_foretells(num_decode_steps):
    """Beside the other lane, as a server runs them."""
    true = truth(**PLANTED)
    seen = [each for each, _ in timed(CASES, true, noise=0.04)]
    seen = [each for each in seen if each.step.split is None or each.is_beside]
    on_lane = [each for each in seen if each.step.lane is Lane.DECODE]
    rest = [each for each in seen if each.step.lane is not Lane.DECODE]
    seen = rest + on_lane[:num_decode_steps]
    found = fitted(MODEL, HARDWARE, seen)
    assert found.hardware.launch_us > 2 * HARDWARE.launch_us
    assert min(found.hardware.contention_decode, found.hardware.contention_prefill) > 1.05
    kept = taught(Calibration("small", "card"), found, MODEL, seen)
    foresight = Foresight(MODEL, found.hardware, kept)
    for lane, program in (WHOLE_DECODE, WHOLE_PREFILL, DECODE, PREFILL):
        of_kind = [e for e in rest + on_lane if (e.step.lane, e.step.program) == (lane, program)]
        some = of_kind[:: len(of_kind) // 8]
        told = [foresight.step_ms(each.step) for each in some]
        assert told == pytest.approx(found.foretold(MODEL, some).tolist(), rel=1e-9)


def test_kinds_that_were_hardly_timed_are_taught_as_they_were_fitted():
    seen = [each for each, _ in timed(CASES, truth())][:3]
    found = fitted(MODEL, HARDWARE, seen)
    kept = taught(Calibration("small", "card"), found, MODEL, seen)
    assert {key: kept.factor(*key) for key in found.factors} == found.factors
    assert set(found.factors.values()) == {FIRST_FACTOR}


def test_errors_are_told_for_each_kind_in_order():
    found = dict(by_kind(["b", "a", "b"], np.array([0.1, 0.5, 0.3])))
    assert list(found) == ["b", "a"]
    assert found["b"] == (2, pytest.approx(0.2), pytest.approx(0.29), pytest.approx(0.3))
    assert Errors.of(np.array([])).num_launches == 0
