"""The headline experiment's statistics against planted data, and its load and measuring."""

import json
import math
import random
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.request import FinishReason, StepOutputs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from duet_cells import BACKENDS, POLICIES, RATES, Cell, Results, Variant, tuning, variant
from duet_load import Load, attackers, random_prompt
from duet_measure import Window, account, observe
from duet_report import best_budgets, cell_of, judge, losses, summary, write_report
from duet_statistics import (
    draws,
    figures,
    highest_kept,
    interval,
    measured,
    percentile,
    ratios,
)

LOAD = Load()
TUNED = {15: 256, 25: 1024, 50: 2048}


def document(cell, gap=10.0, tokens=1000.0, ttft=100.0, *, scale=1.0, blocks=3):
    """A cell whose every gap, block and attacker is alike; ttft None: no first token."""
    block = {
        "gaps": [[gap, 99], [gap * 2, 1]],
        "ttft_ms": [ttft] * 4,
        "prompt_tokens": tokens - 100,
        "output_tokens": 100,
    }
    return {
        "benchmark": "duet",
        "backend": "sim",
        "simulation": True,
        "is_brief": False,
        "hardware_profile": "h200-sxm",
        "commit": "abc",
        "versions": {},
        "start_s": 1.0,
        "cell": {
            "variant": {
                "policy": cell.variant.policy,
                "budget": cell.variant.budget,
                "objective": cell.variant.objective,
            },
            "rate": cell.rate,
            "seed": cell.seed,
        },
        "capacity": {
            "prefill_tokens_per_s": 3e4,
            "decode_step_ms": 7.5,
            "objective_scale": scale,
        },
        "window_s": float(blocks),
        "blocks": [block] * blocks,
        "victims_decoding": 31.5,
        "pauses_ms": {"count": 3, "p50": 20.0, "p99": 30.0, "worst": 40.0},
        "decisions": {"split": 4, "aggregated": 0},
        "launches": [],
    }


def planted(gap, tokens, ttft, *, seeds=(0, 1, 2), leave_out=(), objective=25):
    """A cell of every policy, rate and seed; figures are functions of policy and rate."""
    return [
        document(Cell(variant(policy, objective, LOAD, TUNED), rate, seed), *figures_of)
        for policy, rate, seed in product(POLICIES, RATES, seeds)
        for figures_of in [(gap(policy, rate), tokens(policy, rate), ttft(policy, rate))]
        if (policy, rate, seed) not in leave_out
    ]


def duet_wins(policy, rate):
    return rate * (13.0 if policy == "duet" else 10.0)


# Arrivals.


def test_the_same_seed_brings_the_same_attackers():
    assert attackers(LOAD, 2e4, 30, 5) == attackers(LOAD, 2e4, 30, 5)
    assert attackers(LOAD, 2e4, 30, 5) != attackers(LOAD, 2e4, 30, 6)


def test_another_rate_brings_the_same_prompts_closer_together():
    slow, fast = attackers(LOAD, 1e4, 200, 3), attackers(LOAD, 2e4, 100, 3)
    assert [each.prompt for each in slow] == [each.prompt for each in fast]
    assert [each.at / 2 for each in slow] == pytest.approx([each.at for each in fast])


def test_attackers_bring_as_many_tokens_as_asked_for():
    found = attackers(LOAD, 3e4, 4000, 1)
    assert sum(each.prompt for each in found) / 4000 == pytest.approx(3e4, rel=0.03)
    assert min(each.prompt for each in found) >= LOAD.shortest
    assert max(each.prompt for each in found) <= LOAD.longest
    logs = [math.log2(each.prompt / LOAD.shortest) for each in found]
    assert Counter(map(int, logs)).keys() == {0, 1, 2, 3}
    assert np.mean(logs) == pytest.approx(2, abs=0.05)


def test_prompts_differ_by_seed():
    assert random_prompt(2048, 64, 1, 2) == random_prompt(2048, 64, 1, 2)
    assert random_prompt(2048, 64, 1, 2) != random_prompt(2048, 64, 1, 3)


def test_scaled_load_can_run():
    for each in BACKENDS.values():
        load = each.load
        assert load.victims * 2 == load.slots
        assert min(load.budgets) > load.slots
        assert sorted(set(load.budgets)) == list(load.budgets)
        assert load.context > load.page


# Measuring.


def step(*names, finished=()):
    ended = tuple((name, FinishReason.LENGTH) for name in finished)
    return StepOutputs(ids=names, tokens=(0,) * len(names), finished=ended)


def test_gaps_count_in_the_block_where_they_end():
    seen = [(t, step("v-0")) for t in (0.5, 1.0, 1.5, 2.5, 4.0)]
    found = observe(seen, (), {}, Window(1.0, 3.0, 2, 4.0))
    assert [block.gaps for block in found.blocks] == [
        Counter({500.0: 1}),
        Counter({1000.0: 1, 1500.0: 1}),
    ]
    assert [block.output_tokens for block in found.blocks] == [2, 1]


def test_a_stall_through_the_whole_window_counts():
    seen = [(0.2, step("v-0", "v-1")), (0.4, step("v-1"))]
    found = observe(seen, (), {}, Window(1.0, 2.0, 1, 3.0))
    assert found.blocks[0].gaps == Counter({2800.0: 1, 2600.0: 1})


def test_a_pause_between_victims_is_no_gap():
    seen = [(1.1, step("v-0")), (1.2, step("v-0", finished=["v-0"])), (1.7, step("v-1"))]
    found = observe(seen, (), {}, Window(1.0, 2.0, 1, 2.0))
    assert found.blocks[0].gaps == Counter({100.0: 1, 300.0: 1})  # the latter has not ended
    assert found.pauses_ms == [pytest.approx(500)]
    assert found.decoding == pytest.approx(0.1 + 0.3)


def test_ttft_is_of_those_that_came_in_the_window():
    seen = [(1.5, step("a-0", "a-1")), (2.5, step("a-2"))]
    arrivals = {"a-0": 0.9, "a-1": 1.2, "a-2": 1.9, "a-3": 1.95, "a-4": 2.1}
    found = observe(seen, (), arrivals, Window(1.0, 2.0, 1, 2.6))
    assert found.blocks[0].ttft_ms == [pytest.approx(300), pytest.approx(600), None]
    assert not found.blocks[0].gaps


def launch(began, ended, tokens, lane=Lane.WHOLE, split=None, k=1):
    program = Program.PREFILL if tokens else Program.DECODE
    return CompletedLaunch(
        *(1, lane, split, program, 64, k, 8, 1, tokens, "why", None, 1e3 * (ended - began)),
        *(began, ended, 8, 0, 100, (), 0, ()),
    )


def test_prompt_tokens_are_shared_out_by_time():
    launches = [launch(0.5, 1.5, 100), launch(1.5, 2.5, 60)]
    found = observe((), launches, {}, Window(1.0, 3.0, 2, 3.0))
    assert [block.prompt_tokens for block in found.blocks] == pytest.approx([80, 30])


def test_launches_are_accounted_for_by_lane_and_split():
    split = Split(56, 76)
    launches = [
        launch(1.0, 1.02, 0, Lane.DECODE, split, k=2),
        launch(1.02, 1.06, 0, Lane.DECODE, split, k=4),
        launch(1.0, 1.5, 128, Lane.PREFILL, split),
        launch(0.0, 0.9, 5),
    ]
    decode, prefill = account(launches, Window(1.0, 2.0, 1, 2.0))
    assert (decode["split"], decode["launches"], decode["k"]) == ("56/76", 2, 3.0)
    assert decode["step_ms"] == pytest.approx(10)
    assert (prefill["lane"], prefill["prompt_tokens"]) == ("prefill", 128)


# Statistics.


def test_percentiles_are_the_least_value_with_its_share():
    values = np.array([1.0, 2.0, 5.0])
    counts = np.array([[98, 1, 1], [99, 0, 1], [0, 0, 3], [0, 0, 0]], float)
    assert percentile(values, counts, 0.99).tolist()[:3] == [2.0, 1.0, 5.0]
    assert math.isnan(percentile(values, counts, 0.99)[3])
    assert percentile(values, counts, 1.0).tolist()[:2] == [5.0, 5.0]


def test_percentiles_agree_with_numpy():
    random_ = random.Random(4)
    values = np.array(sorted(random_.sample(range(1000), 60)), float)
    counts = np.array([[random_.randrange(9) for _ in values]], float)
    whole = np.repeat(values, counts[0].astype(int))
    for share in (0.1, 0.5, 0.9, 0.99, 1.0):
        wanted = np.quantile(whole, share, method="inverted_cdf")
        assert percentile(values, counts, share)[0] == wanted


def test_draws_take_whole_seeds():
    taken = draws(3, 4, 50)
    assert taken.shape == (50, 12)
    assert (taken.sum(axis=1) == 12).all()
    assert (taken.reshape(50, 3, 4).sum(axis=2) % 4 == 0).all()
    assert (taken == draws(3, 4, 50)).all()


@pytest.mark.parametrize("name", ["tokens_per_s", "ttft_p50"])
def test_intervals_cover_what_was_planted(name):
    random_, covered, rounds = random.Random(11), 0, 60
    cell = Cell(Variant("duet", 8192, 25), 50, 0)
    for _ in range(rounds):
        documents = []
        for _ in range(8):
            of_seed = random_.gauss(0, 50)
            one = document(cell)
            one["blocks"] = [
                {
                    "gaps": [[10.0, 1]],
                    "ttft_ms": [random_.gauss(500, 100) for _ in range(9)],
                    "prompt_tokens": 1000 + of_seed + random_.gauss(0, 50),
                    "output_tokens": 0,
                }
                for _ in range(6)
            ]
            documents.append(one | {"window_s": 6.0})
        low, high = interval(getattr(figures(measured(documents), draws(8, 6, 400)), name))
        covered += low <= {"tokens_per_s": 1000, "ttft_p50": 500}[name] <= high
        assert high - low < 200
    assert covered >= 0.8 * rounds


def by_rate(**values):
    """Figures of one draw by rate: (p99, tokens/s)."""
    found = {}
    for name, (p99, tokens) in values.items():
        one = measured([document(Cell(Variant("duet", 8192), 50, 0), p99, tokens)])
        found[int(name[1:])] = figures(one, np.ones((1, 3)))
    return found


def test_the_highest_rate_kept_need_not_be_the_first():
    kept = highest_kept(by_rate(r25=(20, 900), r50=(30, 1000), r75=(24, 800)), 25)
    assert (kept.rate[0], kept.tokens_per_s[0], kept.worst[0]) == (75, 800, 48)


def test_a_gap_as_long_as_the_objective_keeps_it():
    assert highest_kept(by_rate(r25=(25.0, 900)), 25).rate[0] == 25
    assert highest_kept(by_rate(r25=(25.01, 900)), 25).rate[0] == 0


def test_who_keeps_nothing_serves_nothing():
    kept = highest_kept(by_rate(r25=(26, 900)), 25)
    assert (kept.rate[0], kept.tokens_per_s[0], kept.ttft_p50[0]) == (0, 0, math.inf)
    assert math.isnan(kept.worst[0])


def test_ratios_are_to_the_best_other_and_ties_go_to_the_first():
    ours = highest_kept(by_rate(r50=(20, 1300)), 25)
    others = {
        "late": highest_kept(by_rate(r50=(26, 5000)), 25),
        "first": highest_kept(by_rate(r50=(20, 1000)), 25),
        "second": highest_kept(by_rate(r25=(20, 1000)), 25),
    }
    found = ratios(ours, others)
    assert (found.best, found.tokens[0], found.ttft[0]) == (["first"], 1.3, 1.0)
    alone = ratios(ours, {"late": others["late"]})
    assert alone.tokens[0] == math.inf
    assert math.isnan(ratios(others["late"], {"late": others["late"]}).tokens[0])


# Verdicts.


def test_duet_wins_where_it_was_planted():
    documents = planted(lambda *_: 20.0, duet_wins, lambda *_: 100.0)
    found = summary(judge(documents, 25, TUNED, LOAD))
    assert found["ratio"]["tokens"] == {"value": 1.3, "interval": [1.3, 1.3]}
    assert found["goal_met"]
    assert found["stretch_met"]
    assert found["missing"] == 0
    assert found["policies"]["duet"]["rate"]["value"] == 125
    assert losses(judge(documents, 25, TUNED, LOAD)) == []


def test_too_late_first_tokens_miss_the_goal():
    late = planted(lambda *_: 20.0, duet_wins, lambda p, _: 151.0 if p == "duet" else 100.0)
    verdict = judge(late, 25, TUNED, LOAD)
    assert summary(verdict)["ratio"]["ttft_p50"]["value"] == 1.51
    assert not summary(verdict)["goal_met"]
    assert losses(verdict)[0] == "25 %, aggregated-slo: TTFT p50 100.0, not 151.0 ms"


def test_first_tokens_that_nobody_saw_miss_the_goal():
    never = planted(lambda *_: 20.0, duet_wins, lambda p, _: None if p == "duet" else 100.0)
    found = summary(judge(never, 25, TUNED, LOAD))
    assert found["policies"]["duet"]["ttft_p50"]["value"] is None
    assert not found["goal_met"]


def test_losing_cells_are_said():
    def breaks(policy, rate):
        return 30.0 if policy == "duet" and rate > 50 else 20.0

    verdict = judge(planted(breaks, lambda *_: 500.0, lambda *_: 9.0), 25, TUNED, LOAD)
    lines = losses(verdict)
    assert len(lines) == 3 * 4
    assert lines[0] == "75 %, aggregated-slo: keeps the objective, which duet does not"
    assert not summary(verdict)["goal_met"]


def test_who_breaks_the_objective_less_is_said():
    def all_break(policy, rate):
        return 50.0 if policy == "duet" else 40.0 if policy == "aggregated" else 60.0

    verdict = judge(planted(all_break, duet_wins, lambda *_: 9.0), 25, TUNED, LOAD)
    assert losses(verdict) == [
        f"{rate} %, aggregated: breaks it less, gap p99 40.0, not 50.0 ms" for rate in RATES
    ]


def test_duet_alone_keeps_the_objective():
    def only_duet(policy, rate):
        return 20.0 if policy == "duet" else 30.0

    found = summary(judge(planted(only_duet, duet_wins, lambda *_: 9.0), 25, TUNED, LOAD))
    assert found["ratio"]["alone"]
    assert found["ratio"]["best_other"] is None
    assert found["policies"]["aggregated"]["tokens_per_s"]["value"] == 0


def test_a_seed_counts_with_all_cells_that_any_has(tmp_path):
    documents = planted(lambda *_: 20.0, duet_wins, lambda *_: 9.0, leave_out={("duet", 125, 1)})
    verdict = judge(documents, 25, TUNED, LOAD)
    assert verdict.missing == ("duet_8192_25ms_rate125_seed1",)
    assert (verdict.seeds, verdict.left_out) == ((0, 2), (1,))
    assert summary(verdict)["policies"]["duet"]["rate"]["value"] == 125
    page = written(Results(tmp_path), documents)[1]
    assert "Seed 1 is left out: it lacks cells that seed 0 has." in page


def test_an_objective_has_the_seeds_of_its_own_cells(tmp_path):
    planted_of = (lambda *_: 10.0), duet_wins, lambda *_: 9.0
    documents = planted(*planted_of) + planted(*planted_of, seeds=(0,), objective=50)
    found = written(Results(tmp_path), documents)[0]
    assert [each["objective"] for each in found["objectives"]] == [25, 50]
    assert [each["seeds"] for each in found["objectives"]] == [[0, 1, 2], [0]]
    assert all(set(each["policies"]) == set(POLICIES) for each in found["objectives"])


def test_no_cell_takes_a_row_away():
    planted_of = (lambda *_: 10.0), duet_wins, lambda *_: 9.0
    documents, rows = planted(*planted_of), 0
    random.Random(3).shuffle(documents)
    for count in range(1, len(documents) + 1):
        verdict = judge(documents[:count], 25, TUNED, LOAD)
        before, rows = rows, sum(len(rates) for rates in verdict.groups.values())
        assert rows >= before
    assert (rows, verdict.seeds) == (len(POLICIES) * len(RATES), (0, 1, 2))


def test_seeds_that_nobody_measured_are_missing():
    verdict = judge(
        planted(lambda *_: 20.0, duet_wins, lambda *_: 9.0, seeds=(0,)), 25, TUNED, LOAD
    )
    assert verdict.seeds == (0,)
    assert len(verdict.missing) == 2 * len(POLICIES) * len(RATES)


def test_without_a_tuned_budget_aggregated_is_missing():
    verdict = judge(planted(lambda *_: 20.0, duet_wins, lambda *_: 9.0), 25, None, LOAD)
    assert verdict.missing == ("aggregated: no budget has been tuned",)
    assert "aggregated" not in verdict.exact


def test_objectives_are_scaled():
    cells = [Cell(variant(p, 25, LOAD, TUNED), 50, 0) for p in POLICIES]
    documents = [document(cell, 60.0, scale=2.0) for cell in cells]
    assert judge(documents, 25, TUNED, LOAD).objective_ms == 50
    assert judge(documents, 25, TUNED, LOAD).kept["duet"].rate[0] == 0


def test_the_best_budget_is_each_objectives_own():
    p99 = {256: 10.0, 512: 14.0, 1024: 24.0, 2048: 40.0, 4096: 90.0, 8192: 200.0}
    documents = [
        document(cell, p99[cell.variant.budget], cell.variant.budget * cell.rate)
        for cell in tuning(LOAD)
    ]
    assert best_budgets(documents) == {15: 512, 25: 1024, 50: 2048}


def test_where_no_budget_keeps_an_objective_the_least_p99_is_taken():
    documents = [document(cell, 100.0 - cell.variant.budget / 100, 1000.0) for cell in tuning(LOAD)]
    assert best_budgets(documents) == {15: 8192, 25: 8192, 50: 8192}


def written(results, documents):
    """The report's document and page, of these cells."""
    for each in documents:
        results.write(cell_of(each).name, each)
    results.write("tuned", {"budgets": TUNED})
    found = write_report(results, LOAD)
    return found, (results.folder / "headline.md").read_text()


def test_the_report_is_written_from_the_cells(tmp_path):
    results = Results(tmp_path / "cells")
    documents = planted(lambda _, rate: 20.0 + rate / 20, duet_wins, lambda *_: 9.0)
    found, page = written(results, documents)
    assert "SIMULATED" in page
    assert "Simulation, not measurement" in page
    assert "1.30 (1.30 to 1.30) x the tokens/s" in page
    assert "| duet | 100 | 25.0 | 50.0 | 1300 |" in page
    assert "| duet | 125 | **26.2** |" in page
    assert "Missing" not in page
    assert "as well, not every other" not in page
    kept = json.loads((results.folder / "headline.json").read_text())
    assert kept == json.loads(json.dumps(found))
    assert (results.folder / "headline.svg").read_text().startswith("<svg")
    assert [each["objective"] for each in found["objectives"]] == [25]


def test_rates_that_only_some_were_measured_at_are_said(tmp_path):
    def breaks(policy, rate):
        return 30.0 if policy == "duet" and rate == 50 else 20.0

    left = {(policy, 125, seed) for policy in POLICIES[1:] for seed in (0, 1, 2)}
    documents = planted(breaks, duet_wins, lambda *_: 9.0, leave_out=left)
    page = written(Results(tmp_path), documents)[1]
    assert "duet was measured at 125 % as well, not every other policy." in page
    assert "duet keeps 125 %, but breaks the objective at 50 %." in page
    assert "- aggregated_1024, seed 2, rates 125" in page


@pytest.mark.parametrize(
    "harm",
    [
        lambda each: each["capacity"].update(objective_scale=1.5),
        lambda each: each["capacity"].update(prefill_tokens_per_s=1e4),
        lambda each: each.update(hardware_profile="h100-sxm"),
        lambda each: each.update(model_profile="model-profile.json"),
        lambda each: each.update(profile_digest="0123"),
    ],
)
def test_cells_of_another_capacity_or_profile_are_refused(tmp_path, harm):
    documents = planted(lambda *_: 20.0, duet_wins, lambda *_: 9.0)
    harm(documents[-1])
    with pytest.raises(SystemExit, match=r"; delete static-split_8192_rate125_seed2\.json$"):
        written(Results(tmp_path), documents)


def test_cells_of_an_earlier_capacity_are_refused(tmp_path):
    results = Results(tmp_path)
    documents = planted(lambda *_: 20.0, duet_wins, lambda *_: 9.0)[:2]
    newer = documents[0]["capacity"] | {"hardware_profile": "h200-sxm", "objective_scale": 2.0}
    results.write("capacity", newer)
    results.write("tuned", {"budgets": TUNED, "capacity": documents[0]["capacity"]})
    for each in documents:
        results.write(cell_of(each).name, each)
    with pytest.raises(SystemExit) as refused:
        results.refuse_mixed()
    for name in (*(cell_of(each).name for each in documents), "tuned"):
        assert f"{name}.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_versions_that_differ_are_said(tmp_path):
    documents = planted(lambda *_: 20.0, duet_wins, lambda *_: 9.0)
    for each in documents:
        each["versions"] = {"jax": "0.11.2", "flax": None}
    documents[3]["versions"] = {"jax": "0.12.0", "flax": None}
    found, page = written(Results(tmp_path), documents)
    assert found["versions"] == {"jax": ["0.11.2", "0.12.0"], "flax": None}
    assert "Cells differ in the version of jax: 0.11.2, 0.12.0." in page


def test_no_cells_make_no_report(tmp_path):
    with pytest.raises(SystemExit, match="no cells"):
        write_report(Results(tmp_path), LOAD)


def test_a_call_of_the_gpu_plan_fits_its_limit():
    from duet_cells import seconds_of

    timing = BACKENDS["cuda"].timing
    cells = [Cell(variant(p, 15, LOAD, TUNED), r, 0) for p in POLICIES for r in RATES[:3]]
    assert seconds_of(cells, timing, timing.start) <= timing.limit <= 540
