"""Factors follow what is measured and nothing else; trust is lost and comes back."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duetjax.policy.calibration import Calibration
from duetjax.policy.launch import Lane, Program

WHOLE, DECODE = Lane.WHOLE, Program.DECODE
USELESS = [float("nan"), float("inf"), -float("inf"), 0.0, -3.0]


def fresh():
    return Calibration("model", "card")


def fed(ratios, calibration=None, lane=WHOLE, program=DECODE):
    """A calibration that saw launches which took `ratios` times as long as predicted."""
    calibration = calibration or fresh()
    for ratio in ratios:
        calibration.observe(lane, program, 2.0, 2.0 * ratio)
    return calibration


def test_a_factor_starts_at_one_point_three_and_is_trusted():
    calibration = fresh()
    assert all(calibration.factor(lane, each) == 1.3 for lane in Lane for each in Program)
    assert calibration.is_trusted
    assert calibration.median_error == 0


def test_a_factor_becomes_the_median_of_what_was_measured():
    assert fed([1.9, 2.0, 2.1] * 30).factor(WHOLE, DECODE) == pytest.approx(2.0)


def test_the_first_measurement_does_not_decide_alone():
    assert fed([2.9]).factor(WHOLE, DECODE) == 1.3


def test_nine_measurements_outweigh_the_start():
    assert fed([2.0] * 8).factor(WHOLE, DECODE) == pytest.approx((1.3 + 2.0) / 2)
    assert fed([2.0] * 9).factor(WHOLE, DECODE) == 2.0


@pytest.mark.parametrize(("ratio", "factor"), [(0.01, 0.5), (100.0, 3.0), (1e300, 3.0)])
def test_a_factor_stays_within_its_bounds(ratio, factor):
    assert fed([ratio] * 100).factor(WHOLE, DECODE) == factor


def test_outliers_fewer_than_half_do_not_move_a_factor():
    calibration = fed(([1.0] * 6 + [50.0] * 4) * 30)
    assert calibration.factor(WHOLE, DECODE) == 1.0


def test_a_lasting_change_shows_within_200_launches():
    calibration = fed([1.0] * 500)
    assert fed([2.0] * 40, calibration).factor(WHOLE, DECODE) == 2.0


def test_each_lane_and_program_has_a_factor_of_its_own():
    calibration = fed([2.0] * 50, lane=Lane.DECODE)
    assert calibration.factor(Lane.DECODE, Program.DECODE) == 2.0
    assert calibration.factor(Lane.PREFILL, Program.PREFILL) == 1.3
    assert calibration.factor(WHOLE, DECODE) == 1.3


@pytest.mark.parametrize("measured", USELESS)
def test_a_useless_measurement_teaches_nothing(measured):
    calibration = fed([1.0] * 30)
    before = calibration.to_json()
    calibration.observe(WHOLE, DECODE, 1.0, measured)
    assert calibration.to_json() == before


@pytest.mark.parametrize("predicted", USELESS)
def test_a_useless_prediction_is_the_caller_s_fault(predicted):
    with pytest.raises(ValueError, match="must be finite and positive, not"):
        fresh().observe(WHOLE, DECODE, predicted, 1.0)


def test_an_error_is_that_of_the_calibrated_prediction():
    assert fed([1.3]).median_error == pytest.approx(0)
    assert fed([2.6]).median_error == pytest.approx(0.5)
    assert fed([0.65]).median_error == pytest.approx(1.0)


def test_a_device_that_is_steadily_slower_is_trusted_all_along():
    calibration = fresh()
    for _ in range(300):
        calibration.observe(WHOLE, DECODE, 1.0, 2.0)
        assert calibration.is_trusted


def test_what_no_factor_can_explain_ends_trust():
    assert not fed([6.0] * 30).is_trusted


def test_a_few_bad_launches_do_not_end_trust():
    assert fed([6.0] * 19).is_trusted


def test_trust_comes_back_within_200_launches():
    calibration = fed([6.0] * 400)
    assert not calibration.is_trusted
    assert fed([1.5] * 200, calibration).is_trusted


def test_between_the_two_bounds_trust_stays_as_it_was():
    # 3.0 * 1.0 against 4.0: an error of 25 %, where a factor may not follow.
    assert fed([4.0] * 300).median_error == pytest.approx(0.25)
    assert fed([4.0] * 300).is_trusted
    assert not fed([4.0] * 200, fed([6.0] * 200)).is_trusted


def test_slack_is_what_nine_launches_in_ten_do_not_exceed():
    calibration = fed([1.3] * 20)  # as foretold
    assert calibration.slack == pytest.approx(1.0)
    assert fed([1.56] * 3, calibration).slack == pytest.approx(1.2)


def test_launches_as_foretold_or_shorter_leave_no_slack():
    assert fed([1.3] * 300).slack == 1.0
    assert fed([1.3] * 195 + [0.6] * 5).slack == 1.0


def test_fewer_than_twenty_launches_say_nothing_about_slack():
    assert fed([2.6] * 19).slack == 1.0
    assert fed([2.6] * 20).slack > 1.0


@pytest.mark.parametrize("ratio", [100.0, 1e300])
def test_slack_is_bounded_however_long_launches_take(ratio):
    assert fed([ratio] * 100).slack == 2.0


def test_launches_long_ago_leave_no_slack():
    assert fed([1.3] * 200, fed([2.0, 0.8] * 100)).slack == pytest.approx(1.0)


def test_what_was_learned_survives_a_round_trip():
    draw = random.Random(1)
    calibration = fed([draw.uniform(0.3, 8) for _ in range(150)])
    document = json.loads(json.dumps(calibration.to_json()))
    again = Calibration.from_json(document, "f", model="model", hardware="card")
    for one in (calibration, again):
        fed([5.0, 0.7, 2.2] * 40, one)
    assert again.to_json() == calibration.to_json()
    assert again.factor(WHOLE, DECODE) == calibration.factor(WHOLE, DECODE)
    assert again.slack == calibration.slack > 1.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Lane),
            st.sampled_from(Program),
            st.floats(min_value=5e-324, allow_infinity=False, allow_nan=False),
            st.floats(),
        ),
        max_size=300,
    )
)
def test_whatever_is_measured_factors_stay_in_bounds_and_documents_readable(launches):
    calibration = fresh()
    for launch in launches:
        calibration.observe(*launch)
    assert all(0.5 <= calibration.factor(lane, each) <= 3 for lane in Lane for each in Program)
    document = json.loads(json.dumps(calibration.to_json(), allow_nan=False))
    again = Calibration.from_json(document, "f", model="model", hardware="card")
    assert again.to_json() == calibration.to_json()


@given(st.lists(st.floats(0.01, 100), min_size=70, max_size=200))
def test_a_factor_is_the_clipped_median_of_the_last_64(ratios):
    calibration = fresh()
    for ratio in ratios:
        calibration.observe(WHOLE, DECODE, 1.0, ratio)
    window = sorted(min(max(ratio, 0.5), 3.0) for ratio in ratios[-64:])
    assert calibration.factor(WHOLE, DECODE) == pytest.approx((window[31] + window[32]) / 2)
