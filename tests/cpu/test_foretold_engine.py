"""Engines that foretell their launches, on the demo model: what they answer, learn and keep."""

import json
import os
from pathlib import Path

import httpx
import pytest
from server_process import metric, serving

import duetjax
from duetjax import LLM, SamplingParams
from duetjax.cli import main
from duetjax.config import ConfigError
from duetjax.policy.calibration import Calibration
from duetjax.policy.profiles import HardwareProfile

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 2**26}
PROMPTS = [list(range(20, 20 + n)) for n in (5, 700, 9, 400, 3, 30)]


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A processor of four cores, as no test needs to know how many there are."""
    shipped = Path(duetjax.__file__).parent / "presets" / "hardware" / "h200-sxm.json"
    document = json.loads(shipped.read_text()) | {"name": "four-cores"}
    for name, value in {
        "cores": 4,
        "core_step": 1,
        "min_decode_cores": 1,
        "min_prefill_cores": 1,
        "curve_cores": [1, 4],
        "curve_flops_per_s": [5e10, 2e11],
        "curve_bytes_per_s": [1e10, 1e10],
    }.items():
        document[name] = document[name] | {"value": value}
    HardwareProfile.from_json(document, "four-cores")
    file = tmp_path_factory.mktemp("card") / "four-cores.json"
    file.write_text(json.dumps(document))
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder whose programs are this run's, but whose calibrations are the test's."""
    programs = Path(os.environ["DUETJAX_CACHE_DIR"]) / "programs"
    programs.mkdir(mode=0o700, exist_ok=True)
    (tmp_path / "programs").symlink_to(programs)
    monkeypatch.setenv("DUETJAX_CACHE_DIR", str(tmp_path))
    return tmp_path / "calibrations"


def answers(**settings):
    with LLM(**SMALL, **settings) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        stats = llm._model.engine.stats()
    return [each.outputs[0].token_ids for each in outputs], stats


def calibration(folder):
    [file] = folder.iterdir()
    return Calibration.from_json(
        json.loads(file.read_text()), "a", model="duetjax-demo", hardware="four-cores"
    )


@pytest.fixture(scope="module")
def aggregated():
    return answers(policy="aggregated")[0]


@pytest.mark.parametrize(
    ("policy", "tbt_slo_ms"), [("aggregated-slo", 0.1), ("duet", 0.1), ("duet", 1e6)]
)
def test_a_policy_that_looks_ahead_gives_the_tokens_that_any_other_gives(
    policy, tbt_slo_ms, card, cache, aggregated
):
    got, stats = answers(policy=policy, hardware_profile=card, tbt_slo_ms=tbt_slo_ms, look_ahead=4)
    assert [tokens[0] for tokens in got] == [tokens[0] for tokens in aggregated]
    assert [len(tokens) for tokens in got] == [24] * len(PROMPTS)
    assert stats.prediction_error > 0
    decided = {str(why) for why, _ in stats.decisions}
    if policy == "aggregated-slo" or tbt_slo_ms > 1:
        assert decided <= {"aggregated", "distrusted"}
    else:
        assert decided - {"aggregated", "distrusted"}, "the objective was never missed"


def test_the_second_engine_begins_with_what_the_first_one_learned(card, cache, caplog):
    with LLM(**SMALL, policy="aggregated-slo", hardware_profile=card) as llm:
        assert not cache.exists()
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        engine = llm._model.engine
    first = calibration(cache)
    assert engine.stats().prediction_error == first.median_error > 0
    with LLM(**SMALL, policy="duet", hardware_profile=card) as llm:
        stats = llm._model.engine.stats()
        assert (stats.steps, stats.prediction_error) == (0, first.median_error)
    assert calibration(cache).to_json() == first.to_json()
    assert not [record for record in caplog.records if "calibration" in record.getMessage()]


def test_profiles_are_refused_before_anything_is_loaded(card, caplog):
    caplog.set_level("INFO")
    with pytest.raises(ConfigError, match="--hardware-profile"):
        LLM(policy="duet")
    llama = Path(duetjax.__file__).parent / "presets" / "profiles" / "llama-3.1-8b.json"
    with pytest.raises(ConfigError, match="another model"):
        LLM(policy="duet", hardware_profile=card, model_profile=llama)
    assert "loading weights" not in caplog.text


def test_the_command_line_refuses_in_one_line(capsys):
    assert main(["generate", "x", "--policy", "duet"]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "--hardware-profile" in line
    assert main(["serve", "--max-num-queued-reqs", "-1"]) == 1
    assert "--max-num-queued-reqs -1" in capsys.readouterr().err


def test_serve_foretells_shows_it_and_keeps_it(card, cache):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += ["--policy", "duet", "--hardware-profile", str(card), "--tbt-slo-ms", "0.1"]
    with serving(*flags, "--max-num-queued-reqs", "0") as (process, url):
        body = {"model": "duetjax-demo", "prompt": [7] * 300, "max_tokens": 20, "ignore_eos": True}
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            assert http.post("/v1/completions", json=body).status_code == 200
            assert http.post("/v1/completions", json=body | {"n": 5}).status_code == 400
            assert http.post("/v1/completions", json=body | {"n": 4}).status_code == 200
        assert metric(url, "duetjax_prediction_error") > 0
        assert metric(url, "duetjax_refused_requests_total", "queue_full") == 0
        process.terminate()
        assert process.wait(60) == 0
    assert calibration(cache).median_error > 0
