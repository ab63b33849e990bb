"""`duetjax simulate` and `duetjax plan` as users type them: tables, JSON, pictures, bad flags."""

import json
from xml.etree import ElementTree

import pytest

from duetjax import arrangements, simulate, simulate_report
from duetjax.arrangements import Arrangement
from duetjax.cli import main
from duetjax.config import ConfigError

LOAD = ("--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--trace", "fixed:2048x64", "--jobs", "1")
SHORT = (*LOAD, "--duration", "20", "--rate", "4,8")


def run(capsys, *args):
    assert main(args) == 0
    out = capsys.readouterr().out.splitlines()
    return out[:-1], json.loads(out[-1])


@pytest.fixture
def short(monkeypatch):
    """Searches for a rate simulate a sixth of the time that they would."""
    monkeypatch.setattr(simulate, "_LEAST_SECONDS", 10.0)


def error_of(capsys, *args):
    assert main(args) == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


# simulate.


def test_a_row_for_each_policy_and_rate_then_json_with_the_same_numbers(capsys):
    lines, document = run(capsys, "simulate", *SHORT, "--policy", "duet,aggregated")
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["policy"])
    cells = [line.split() for line in lines[head + 1 : head + 5]]
    assert [(row[0], row[1]) for row in cells] == [
        *(("duet", f"{rate:.2f}") for rate in (4, 8)),
        *(("aggregated", f"{rate:.2f}") for rate in (4, 8)),
    ]
    assert document["simulation"] is True
    for row, said in zip(document["rows"], cells, strict=True):
        assert row["requests"] == row["finished"] == 80
        assert f"{row['output_per_s']:.0f}" == said[2]
        assert f"{row['attained'][0]:.1%}" == said[4]
        assert f"{row['tbt_ms']['p99']:.1f}" == said[8]
    assert lines[0].startswith("simulation of llama-3.1-8b on h200-sxm: 80 requests")
    assert lines[-1].startswith("simulated, not measured")


def test_what_nobody_measured_is_named(capsys):
    lines, _ = run(capsys, "simulate", *SHORT, "--policy", "aggregated")
    assert "contention_decode" in lines[-1]
    assert "curve_flops_per_s" in lines[-1]


def test_processes_change_nothing(capsys):
    _, one = run(capsys, "simulate", *SHORT, "--policy", "duet,aggregated")
    assert run(capsys, "simulate", *SHORT, "--policy", "duet,aggregated")[1] == one


def test_a_sweep_finds_the_rate_beyond_which_the_objectives_are_missed(capsys, short):
    args = ("--policy", "aggregated-slo", "--sweep", "--tbt-slo-ms", "25", "--duration", "60")
    lines, document = run(capsys, "simulate", *LOAD, "--rate", "4", *args)
    ninety, most = document["sweep"]
    assert (ninety["target"], most["target"]) == (0.9, 0.99)
    best = ninety["figures"]["rate"]
    assert most["figures"]["rate"] <= best
    assert any(f"90% of the requests keep both objectives up to {best:.2f}" in x for x in lines)
    rates = f"4,{best * 0.99},{best * 1.05}"  # the first one says how many there are
    _, around = run(
        capsys, "simulate", *LOAD, "--rate", rates, *(a for a in args if a != "--sweep")
    )
    _, below, above = (row["attained"][0] for row in around["rows"])
    assert below >= 0.9 > above


def test_a_picture_shows_every_policy_and_the_splits_over_time(capsys, tmp_path):
    file = tmp_path / "load.svg"
    args = ("--policy", "duet,aggregated-slo", "--tbt-slo-ms", "25", "--plot", str(file))
    _, document = run(capsys, "simulate", *SHORT, *args)
    assert document["rows"][1]["splits"] > 0
    text = "".join(ElementTree.parse(file).getroot().itertext())
    for wanted in ("duet", "aggregated-slo", "objective 25 ms", "Cores that decode"):
        assert wanted in text


def test_a_picture_that_cannot_be_written_is_an_error(capsys, tmp_path):
    line = error_of(capsys, "simulate", *SHORT, "--plot", str(tmp_path / "no" / "x.svg"))
    assert "--plot" in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "fastest"), "--policy fastest: choose from aggregated"),
        (("--rate", "0"), "--rate 0"),
        (("--rate", "many"), "--rate many"),
        (("--tbt-slo-ms", "0"), "--tbt-slo-ms"),
        (("--ttft-slo-ms", "-1"), "--ttft-slo-ms"),
        (("--noise", "2"), "--noise"),
        (("--contention", "0.5/1"), "--contention 0.5/1"),
        (("--contention", "1"), "--contention 1:"),
        (("--tensor-parallel", "0"), "--tensor-parallel"),
        (("--tensor-parallel", "3"), "--tensor-parallel 3"),
        (("--gpu", "h300"), "--gpu h300"),
        (("--gpu", "rtx-4090", "--max-num-batched-tokens", "32768"), "no memory is left for KV"),
        (("--max-model-len", "1048577", "--gpu-memory-utilization", "0.5"), "--max-model-len"),
        (("--policy", "static-split", "--split", "100/100"), "--split 100/100"),
        (("--trace", "nothing-such"), "nothing-such"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(capsys, args, said):
    line = error_of(capsys, "simulate", *LOAD, "--duration", "5", "--policy", "aggregated", *args)
    assert said in line


def test_contention_and_noise_change_what_comes_of_it(capsys):
    args = ("--policy", "duet", "--tbt-slo-ms", "25")
    plain, free, noisy = (
        run(capsys, "simulate", *SHORT, *args, *more)[1]["rows"][1]
        for more in ((), ("--contention", "1/1"), ("--noise", "0.3"))
    )
    assert free["ttft_ms"]["mean"] < plain["ttft_ms"]["mean"]
    assert noisy["tbt_ms"] != plain["tbt_ms"]


# plan.


def test_arrangements_divide_the_gpus():
    found = list(arrangements.arrangements(8, ("duet", "disaggregated")))
    assert found == [
        Arrangement("duet", 8, 1),
        Arrangement("disaggregated", 4, 1),
        Arrangement("duet", 4, 2),
        Arrangement("disaggregated", 2, 2),
        Arrangement("duet", 2, 4),
        Arrangement("disaggregated", 1, 4),
        Arrangement("duet", 1, 8),
    ]
    assert {each.gpus for each in found} == {8}


def test_gpus_that_no_replica_uses_are_left_over():
    assert [each.gpus for each in arrangements.arrangements(3, ("duet",))] == [3, 2]


def test_a_plan_ranks_arrangements_by_requests_per_gpu(capsys, short):
    args = ("--gpus", "2", "--policy", "aggregated-slo", "--duration", "10", "--price", "2")
    lines, document = run(capsys, "plan", *LOAD, *args)
    found = document["arrangements"]
    per_gpu = [each["rate"] / each["gpus"] for each in found]
    assert per_gpu == sorted(per_gpu, reverse=True)
    assert {each["arrangement"]["policy"] for each in found} == {"aggregated-slo", "disaggregated"}
    assert len(found) == 3
    best = found[0]
    output = best["figures"]["output_per_s"] * best["arrangement"]["replicas"]
    assert f"{output * 3600 / (2 * best['gpus']):,.0f}" in lines[3]


def test_an_arrangement_that_cannot_be_says_why(capsys):
    gpu = ("--model", "qwen3-14b", "--gpu", "rtx-4090", "--trace", "fixed:512x16", "--jobs", "1")
    args = ("--gpus", "2", "--policy", "aggregated-slo", "--duration", "20")
    lines, document = run(capsys, "plan", *gpu, *args)
    alone = next(each for each in document["arrangements"] if each["arrangement"]["shards"] == 1)
    assert alone["figures"] is None
    assert "no memory is left for KV pages" in alone["why_not"]
    assert any("no memory is left" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--gpus", "0"), "--gpus 0"),
        (("--gpus", "2", "--attainment", "1"), "--attainment"),
        (("--gpus", "2", "--price", "0"), "--price"),
        (("--gpus", "2", "--policy", "best"), "--policy best"),
    ],
)
def test_a_bad_flag_of_plan_is_one_line_that_names_it(capsys, args, said):
    assert said in error_of(capsys, "plan", *LOAD, "--duration", "5", *args)


def test_where_nothing_can_be_arranged_the_reasons_are_given():
    load = simulate_report.SimulateRequest("qwen3-14b", "rtx-4090", "fixed:512x16", jobs=1)
    request = arrangements.PlanRequest(load, 1, ("aggregated",), 0.9, None)
    with pytest.raises(ConfigError, match="none of 1 arrangements of 1 GPUs: no memory is left"):
        arrangements.plan(request)
