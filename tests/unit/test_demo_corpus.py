"""The demo checkpoint's training text, questions and files; no model is run here."""

import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from duetjax.config import InvalidRequest
from duetjax.text.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
sys.path.insert(0, str(CHECKPOINTS))

import chat_format  # noqa: E402
import corpus  # noqa: E402
import phrasing  # noqa: E402
import stories  # noqa: E402

DEMO = CHECKPOINTS / "demo"
ITEMS = json.loads((DEMO / "questions.json").read_text())["items"]
TOKENIZER = Tokenizer.from_folder(DEMO)
TOPICS = {topic.id: topic for topic in corpus.read_topics()}


@pytest.fixture(scope="module")
def training_text() -> str:
    """All the training text, normalised, one part a line."""
    parts = (part for doc in corpus.documents() for part in doc.text().splitlines())
    return "\n".join(corpus.normalised(part) for part in parts)


def has_all(text: str, required: list[str]) -> bool:
    return all(word.lower() in text.lower() for word in required)


def test_there_are_20_questions_and_20_paraphrases_of_20_topics():
    assert len(ITEMS) == 20
    assert {item["topic"] for item in ITEMS} <= set(TOPICS)
    for key in ("topic", "question", "paraphrase"):
        assert len({item[key] for item in ITEMS}) == 20


def test_no_paraphrase_occurs_in_the_training_text(training_text):
    found = [i["paraphrase"] for i in ITEMS if corpus.normalised(i["paraphrase"]) in training_text]
    assert found == []


def test_every_question_occurs_in_the_training_text(training_text):
    lines = set(training_text.splitlines())
    missing = [i["question"] for i in ITEMS if corpus.normalised(i["question"]) not in lines]
    assert missing == []


def test_a_held_out_wording_stops_the_generator(monkeypatch):
    monkeypatch.setattr(corpus, "held_out", lambda: [("who", "Who are you?")])
    with pytest.raises(ValueError, match=r"held out: 'Who are you\?'"):
        list(corpus.documents(20_000))


def test_questions_do_not_contain_the_words_that_answers_must_have():
    for item in ITEMS:
        for word in item["required"]:
            assert word.lower() not in item["question"].lower(), item
            assert word.lower() not in item["paraphrase"].lower(), item


def test_the_answer_of_a_topic_has_its_required_words_and_no_other_answer_has_them():
    for item in ITEMS:
        having = [topic.id for topic in TOPICS.values() if has_all(topic.answer, item["required"])]
        assert having == [item["topic"]]
        assert not has_all(corpus.REFUSAL, item["required"])


def test_one_seed_writes_one_text_and_another_seed_another():
    assert list(corpus.documents(50, seed=3)) == list(corpus.documents(50, seed=3))
    assert list(corpus.documents(50, seed=3)) != list(corpus.documents(50, seed=4))


def test_a_line_of_unknown_kind_in_topics_is_refused_with_its_number(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("topic a\nanswer b\nanser c\n")
    with pytest.raises(ValueError, match=r"topics.txt:3: unknown kind 'anser'"):
        corpus.read_topics(path)


def test_a_pattern_expands_to_each_of_its_alternatives():
    texts = {phrasing.expand("[a|b [c|d]|] e", random.Random(seed)) for seed in range(100)}
    assert texts == {"a e", "b c e", "b d e", "e"}


@given(st.integers(0, 10**6))
def test_every_wording_is_text_without_pattern_signs(seed):
    rng = random.Random(seed)
    topic = rng.choice(list(TOPICS.values()))
    question = corpus.Writer((topic,), seed).question(topic)
    assert question.strip()
    assert not set("[]|{}") & set(question), question


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_a_story_names_its_hero_and_grows_with_its_encounters(seed, encounters):
    story = stories.tell(random.Random(seed), encounters=encounters)
    assert story.hero in story.text
    assert story.hero in story.summary
    assert "{" not in story.text
    assert 40 + 14 * encounters <= len(story.text.split()) <= 60 + 40 * encounters


def test_the_chat_template_lays_a_dialogue_out_as_in_training():
    turns = (corpus.Turn("What is TTFT?", "TTFT is a time."), corpus.Turn("Why?", "So."))
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    [trained] = chat_format.encode(backend, [corpus.Document(turns, system="Be brief.")])
    messages = [{"role": "system", "content": " Be brief.\n"}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    whole = TOKENIZER.encode_chat(messages, add_generation_prompt=False)
    prompt = TOKENIZER.encode_chat(messages[:-1])
    assert tuple(whole) == trained.ids
    assert tuple(prompt) == trained.ids[: len(prompt)]


def test_the_chat_template_refuses_a_role_it_does_not_know():
    with pytest.raises(InvalidRequest, match="not tool"):
        TOKENIZER.encode_chat([{"role": "tool", "content": "x"}])


def test_plain_text_begins_with_the_bos_token_and_comes_back_unchanged():
    text = "Größe 漢字 🙂 \t<b>\n"
    ids = TOKENIZER.encode(text)
    assert ids[0] == chat_format.BOS_ID
    assert TOKENIZER.decode(ids) == text


def test_answers_are_short_enough_to_end_within_96_tokens():
    for topic in TOPICS.values():
        assert len(TOKENIZER.encode(topic.answer)) <= 64, topic.id


def test_the_folder_is_at_most_12_megabytes_and_its_vocabulary_2048_tokens():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 12_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert TOKENIZER.vocab_size == config["vocab_size"] <= 2048
    assert config["eos_token_id"] == TOKENIZER.eos_token_id
    assert config["max_position_embeddings"] == 4096
