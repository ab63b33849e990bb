"""The demo checkpoint does what its model card says, through the engine that serves it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duetjax import LLM, SamplingParams

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
QUIZ = json.loads((DEMO / "questions.json").read_text())
ENGINE = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
"""The sizes of test_llm: its programs are in the store."""


def answers(llm, kind):
    """(finish reason, has all required words) of every item of questions.json."""
    chats = [[{"role": "user", "content": item[kind]}] for item in QUIZ["items"]]
    params = SamplingParams(temperature=0, max_tokens=QUIZ["max_tokens"])
    outputs = [result.outputs[0] for result in llm.chat(chats, params, use_tqdm=False)]
    return [
        (output.finish_reason, all(w.lower() in output.text.lower() for w in item["required"]))
        for item, output in zip(QUIZ["items"], outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def demo():
    with LLM(**ENGINE) as llm:
        yield llm


def test_the_quiz_has_twenty_questions_and_as_many_paraphrases():
    assert len(QUIZ["items"]) == 20
    assert len({item["paraphrase"] for item in QUIZ["items"]}) == 20
    assert QUIZ["max_tokens"] == 96


def test_every_question_is_answered_and_the_answer_ends(demo):
    assert answers(demo, "question") == [("stop", True)] * 20


def test_at_least_fourteen_paraphrases_are_answered_and_all_end(demo):
    results = answers(demo, "paraphrase")
    assert [finish for finish, _ in results] == ["stop"] * 20
    assert sum(right for _, right in results) >= 14


def test_shuffled_weights_answer_nothing(tmp_path):
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, tmp_path)
    rng = np.random.default_rng(0)
    weights = load_file(DEMO / "model.safetensors")
    shuffled = {
        name: rng.permutation(value.ravel()).reshape(value.shape) for name, value in weights.items()
    }
    save_file(shuffled, tmp_path / "model.safetensors")
    with LLM(str(tmp_path), **ENGINE) as llm:
        for kind in ("question", "paraphrase"):
            assert not any(right for _, right in answers(llm, kind))


def test_the_folder_is_small_and_has_between_two_and_three_million_parameters():
    weights = load_file(DEMO / "model.safetensors")
    assert 2_000_000 <= sum(value.size for value in weights.values()) <= 3_000_000
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 12 * 10**6
