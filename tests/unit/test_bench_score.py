"""`duetjax bench --score`: what counts as an answer, what is sent, and what is made of it."""

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree

import pytest
from fake_engine import PATIENCE, wait_until
from serve_setup import serving
from test_bench import INTERRUPTIBLE

from duetjax.bench_questions import Question, questions_of
from duetjax.bench_score import ScoreRequest, draw, lines, score
from duetjax.bench_score_report import Round, Sample, figures
from duetjax.cli import main
from duetjax.config import ConfigError

ANSWERS = {"one?": 1, "two?": 2, "three?": "three"}
SVG = "{http://www.w3.org/2000/svg}"


# Answers.


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("36", "Answer: 36"),
        ("36", "First 12, then 24.\n**Answer:** 36 euros"),
        ("36", "12 + 24 = 36."),
        ("36", "Answer: 12 + 24 = 36"),
        ("36", "Answer:\n\\[ \\boxed{36} \\]\nas 12 and 24 show"),
        ("36", "so \\boxed{35}, no, \\boxed{{\\text{36}}} of 40"),
        ("36", "Answer: 35. No:\nanswer is: 36"),
        ("36", "<think>Answer: 35</think>36"),
        ("36", "Answer: 36.00"),
        ("1234", "Answer: 1,234"),
        ("1,234.50", "\\boxed{1234.5}"),
        ("-5", "Answer: \N{MINUS SIGN}5"),
        ("5", "10-5"),
        ("0.5", "Answer: .5"),
        ("9" * 5000, f"Answer: {'9' * 5000}"),
        ("Friday", "Answer: **friday**."),
        ("Friday", "It is Monday or Friday. It must be Friday!"),
        ("Friday", "\\boxed{\\text{Friday}}"),
        ("New York", "I think of new  york."),
        ("23:55", "Answer: 23:55."),
    ],
)
def test_an_answer_is_found_and_right(expected, text):
    question = Question("?", expected)
    assert question.is_right(question.answer_in(text))


@pytest.mark.parametrize(
    ("expected", "text", "found"),
    [
        ("36", "Answer: 35", "35"),
        ("36", "36, or rather 35", "35"),
        ("36", "Answer: 35\nthough 36 is nice", "35"),
        ("36", "\\boxed{35} and not 36", "35"),
        ("36", "Answer: 3.6", "3.6"),
        ("36", "Answer: -36", "-36"),
        ("36", "36 it is. Answer: none", None),
        ("36", "<think>36", None),
        ("36", "", None),
        ("both", "Answer: not both", "not both"),
        ("both", "Answer:", None),
        ("Friday", "Friday comes after Thursday", "thursday"),
    ],
)
def test_what_is_not_the_answer_is_not_right(expected, text, found):
    question = Question("?", expected)
    assert question.answer_in(text) == found
    assert not question.is_right(found)


# Questions.


def test_forty_questions_ship_each_with_an_answer_that_is_graded_right():
    questions = questions_of(None)
    assert len({each.question for each in questions}) == 40
    for each in questions:
        assert each.is_right(each.answer_in(f"By 1 and 2.\nAnswer: {each.answer}"))
        assert not each.is_right(each.answer_in("Answer: 31 or nothing"))
        assert 'says "Answer:"' in each.prompt


def written(tmp_path, *rows):
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return file


def test_questions_of_ones_own_are_read(tmp_path):
    file = written(
        tmp_path, {"question": "a", "answer": 1}, "", {"id": 7, "question": "b", "answer": "x"}
    )
    assert questions_of(file) == (Question("a", "1"), Question("b", "x"))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "line 2, {: no JSON"),
        ([1], r"line 2, \[1\]: write"),
        ({"answer": 1}, "question must be"),
        ({"question": " ", "answer": 1}, "question must be"),
        ({"question": "a"}, "answer must be"),
        ({"question": "a", "answer": True}, "answer must be"),
        ({"question": "a", "answer": "..."}, "answer must be"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, named):
    file = written(tmp_path, {"question": "a", "answer": 1}, row)
    with pytest.raises(ConfigError, match=named) as refused:
        questions_of(file)
    assert "\n" not in str(refused.value)


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no line has a question"):
        questions_of(written(tmp_path, ""))
    with pytest.raises(ConfigError, match="name another file"):
        questions_of(tmp_path / "nowhere.jsonl")


# Numbers.


def sample(question, number, answer, right="1", **facts):
    over = {"tokens": 10, "finish_reason": "stop", "is_over": True} | facts
    return Sample(question, number, answer=answer, is_right=answer == right, **over)


def found_of(*answers, seed=0):
    """Figures of questions whose samples answered so; "1" is right."""
    samples = [
        sample(question, number, answer)
        for question, given in enumerate(answers)
        for number, answer in enumerate(given)
    ]
    return figures(Round(None, samples, 2.0), seed)


def test_one_sample_the_majority_and_the_best_are_told_apart():
    found = found_of("112", "122", "222", "111")
    assert found.accuracy == pytest.approx(6 / 12)
    assert found.maj_at_n == pytest.approx(2 / 4)
    assert found.pass_at_n == pytest.approx(3 / 4)
    assert found.accuracy_per_1k_tokens == pytest.approx(6 / 120 * 1000)
    assert (found.mean_tokens, found.output_throughput) == (10.0, 60.0)


def test_a_vote_that_is_tied_is_shared_and_who_says_nothing_does_not_vote():
    assert found_of("1122").maj_at_n == 0.5
    assert found_of("1234").maj_at_n == 0.25
    assert found_of([None, None, "1"]).maj_at_n == 1.0
    assert found_of([None, None]).maj_at_n == 0.0
    assert found_of([None, None, "1"]).no_answer_share == pytest.approx(2 / 3)


def test_an_interval_is_that_of_questions_however_many_samples_there_are():
    for samples in (1, 8):
        found = found_of(*(20 * ["1" * samples] + 20 * ["2" * samples]))
        low, high = found.accuracy_interval
        # Of 40 that are right or wrong with equal chances: 1.96 x 0.079 to either side.
        assert 0.5 - low == pytest.approx(0.155, abs=0.02)
        assert high - 0.5 == pytest.approx(0.155, abs=0.02)
        assert found.maj_at_n_interval == found.pass_at_n_interval == found.accuracy_interval
    low, high = found_of(*(500 * "12")).accuracy_interval
    assert high - low == pytest.approx(0.062, abs=0.01)
    assert found_of("12", "11").accuracy_interval == found_of("12", "11").accuracy_interval


def test_samples_that_differ_within_questions_alone_leave_no_doubt_of_those():
    assert found_of("12", "12", "12").accuracy_interval == (0.5, 0.5)


def test_who_failed_is_not_right_and_has_no_tokens():
    failed = Sample(0, 1, error="timeout", is_over=True)
    found = figures(Round(None, [sample(0, 0, "1"), failed, Sample(0, 2)], 1.0), 0)
    assert (found.completed, found.failed, found.unfinished) == (1, 1, 1)
    assert (found.accuracy, found.mean_tokens) == (0.5, 10.0)
    assert found.errors_by_code == {"timeout": 1}


# Runs.


def chat(text, tokens=10, *, finish="stop", reasoning=None):
    """A response of the endpoint."""
    usage = {"completion_tokens": tokens}
    if reasoning is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    choice = {"message": {"content": text}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": usage}


def asked(body):
    """The question in a request."""
    return body["messages"][0]["content"].partition("\n")[0]


class Scripted:
    """An endpoint that answers as `script` says of a request's body; it remembers the bodies."""

    def __init__(self, script):
        self.bodies = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, {"data": [{"id": "scripted"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.bodies.append(body)
                self.answer(*script(body))

            def answer(self, status, document):
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self):
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(PATIENCE)


@pytest.fixture
def questions(tmp_path):
    """A file of three."""
    return written(tmp_path, *({"question": q, "answer": a} for q, a in ANSWERS.items()))


def scored(endpoint, questions, **flags):
    usual = {"samples": 2, "request_timeout_s": PATIENCE}
    return score(ScoreRequest(base_url=endpoint.url, questions=questions, **usual | flags))


def always_right(body):
    return chat(f"Answer: {ANSWERS[asked(body)]}", reasoning=4)


def test_every_budget_is_asked_with_all_questions_and_samples(questions):
    with Scripted(always_right).running() as endpoint:
        flags = {"budgets": "16,256,none", "max_tokens": 300, "temperature": 0.6, "top_p": 0.9}
        report = scored(endpoint, questions, seed=7, extra_body='{"min_p": 0.1}', **flags)
    sent = Counter(
        (body.get("max_reasoning_tokens"), asked(body), body["seed"]) for body in endpoint.bodies
    )
    expected = [
        (budget, question, seed)
        for budget in (16, 256, None)
        for question in ("one?", "two?", "three?")
        for seed in (7, 8)
    ]
    assert sent == Counter(expected)
    given = {"model": "scripted", "max_tokens": 300, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1}
    assert all(given.items() <= body.items() for body in endpoint.bodies)
    assert [each["max_reasoning_tokens"] for each in report.document["budgets"]] == [16, 256, None]


def test_what_is_not_said_is_left_to_the_server(questions):
    with Scripted(always_right).running() as endpoint:
        scored(endpoint, questions)
    assert {frozenset(body) for body in endpoint.bodies} == {
        frozenset({"messages", "model", "seed"})
    }


def test_accuracy_and_tokens_of_each_budget_are_told(questions):
    def script(body):
        budget, question, number = body.get("max_reasoning_tokens"), asked(body), body["seed"]
        if budget == 16:  # cut off while it thinks, but for one
            said = ("Answer: 1", "stop") if question == "one?" and number == 0 else (None, "length")
            return chat(said[0], 20, finish=said[1], reasoning=16)
        is_wrong = question == "two?" and number == 1
        return chat("Answer: 9" if is_wrong else f"Answer: {ANSWERS[question]}", 100, reasoning=60)

    with Scripted(script).running() as endpoint:
        report = scored(endpoint, questions, budgets="16,none")
    tight, free = report.document["budgets"]
    assert tight["accuracy"] == pytest.approx(1 / 6)
    assert (tight["maj_at_n"], tight["pass_at_n"]) == pytest.approx((1 / 3, 1 / 3))
    assert tight["length_share"] == tight["no_answer_share"] == pytest.approx(5 / 6)
    assert (tight["mean_tokens"], tight["mean_reasoning_tokens"]) == (20.0, 16.0)
    assert tight["accuracy_per_1k_tokens"] == pytest.approx(1 / 120 * 1000)
    assert free["accuracy"] == pytest.approx(5 / 6)
    assert free["maj_at_n"] == pytest.approx(2.5 / 3)
    assert free["pass_at_n"] == 1.0
    low, high = free["accuracy_interval"]
    assert 0.5 <= low < 5 / 6 < high == 1.0
    assert report.document["warnings"] == []
    assert (report.document["completed"], report.document["failed"]) == (12, 0)
    table = "\n".join(lines(report))
    assert "16.7%" in table
    assert "83.3%" in table
    assert json.dumps(report.document, allow_nan=False)


def test_failures_are_named_counted_and_not_right(questions):
    def script(body):
        if asked(body) == "one?":
            return 429, {"error": {"code": "queue_full"}}
        if asked(body) == "two?" and body["seed"] == 0:
            return 200, b"{"
        return always_right(body)

    with Scripted(script).running() as endpoint:
        report = scored(endpoint, questions)
    document = report.document
    assert (document["completed"], document["failed"]) == (3, 3)
    assert document["errors_by_code"] == {"429 queue_full": 2, "malformed": 1}
    [found] = document["budgets"]
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert report.has_answers
    told = list(lines(report))
    assert "failed: 2 x 429 queue_full" in told
    assert "warning: no budget: 3 of 6 requests failed, and count as not right" in told


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"choices": [], "usage": {"completion_tokens": 1}},
        {"choices": [{"message": {"content": "1"}, "finish_reason": "stop"}]},
        chat(["1"])[1],
        chat("1", "many")[1],
        chat("1", reasoning="many")[1],
    ],
)
def test_what_is_no_completion_has_failed(questions, document):
    with Scripted(lambda _: (200, document)).running() as endpoint:
        report = scored(endpoint, questions, samples=1)
    assert report.document["errors_by_code"] == {"malformed": 3}
    assert not report.has_answers


def test_a_budget_that_is_exceeded_or_unknown_is_told(questions):
    def warned(reasoning, budget):
        script = lambda _: chat("Answer: 1", reasoning=reasoning)  # noqa: E731
        with Scripted(script).running() as endpoint:
            return scored(endpoint, questions, budgets=budget).document["warnings"]

    assert warned(17, "16") == ["budget 16: the longest reasoning had 17 tokens"]
    assert warned(16, "16") == []
    [told] = warned(None, "16")
    assert "tells no reasoning tokens" in told
    assert warned(None, "none") == []


def test_a_server_that_refuses_budgets_is_told_from_one_that_fails(questions):
    def script(body):
        return (400, {"error": {"code": "invalid_value"}}) if len(body) > 3 else always_right(body)

    with Scripted(script).running() as endpoint:
        document = scored(endpoint, questions, budgets="16,none").document
    assert document["errors_by_code"] == {"400 invalid_value": 6}
    assert any("budget 16: `duetjax serve`" in each for each in document["warnings"])
    assert not any("no budget: `duetjax serve`" in each for each in document["warnings"])


def test_numbers_that_look_surer_than_they_are_are_told(questions):
    with Scripted(always_right).running() as endpoint:
        report = scored(endpoint, questions, temperature=0.0)
    sure, alike = report.document["warnings"]
    assert sure.startswith("no budget: all are right")
    assert alike == "temperature 0: all samples of a question are alike"


def test_no_more_requests_run_at_a_time_than_asked_for(questions):
    inside, most = [], []
    pair = threading.Barrier(2)

    def script(body):
        inside.append(body)
        pair.wait(PATIENCE)  # two at a time there must be
        most.append(len(inside))
        pair.wait(PATIENCE)
        inside.remove(body)
        return always_right(body)

    with Scripted(script).running() as endpoint:
        report = scored(endpoint, questions, max_concurrency=2)
    assert report.document["completed"] == 6
    assert max(most) == 2


def test_a_server_of_ours_says_which_fields_it_does_not_know(served, questions):
    report = scored(served, questions, extra_body='{"wobble": 1}', max_tokens=5)
    assert report.document["completed"] == 6
    assert "the server does not know wobble, and went on without" in report.document["warnings"]
    [found] = report.document["budgets"]
    assert (found["accuracy"], found["length_share"], found["mean_tokens"]) == (0.0, 1.0, 5.0)


# Results.


def test_a_result_is_written_with_every_answer_if_asked_for_and_without_the_key(
    questions, tmp_path
):
    file = tmp_path / "score.json"
    with Scripted(always_right).running() as endpoint:
        flags = {"api_key": "secret", "result_filename": file}
        report = scored(endpoint, questions, **flags)
        assert json.loads(file.read_text()) == json.loads(json.dumps(report.document))
        scored(endpoint, questions, save_detailed=True, **flags)
    detailed = json.loads(file.read_text())
    assert "secret" not in file.read_text()
    assert [each["question"] for each in detailed["questions"]] == list(ANSWERS)
    assert [each["answer"] for each in detailed["answers"]] == [
        "1",
        "1",
        "2",
        "2",
        "three",
        "three",
    ]


def test_a_result_has_a_name_of_its_own(questions, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with Scripted(always_right).running() as endpoint:
        report = scored(endpoint, questions, save_result=True)
    [file] = folder.iterdir()
    assert file.name == f"score-scripted-{report.document['date']}.json"


def test_a_picture_shows_each_budget_with_its_interval(questions):
    def script(body):
        long = "max_reasoning_tokens" not in body
        return chat("Answer: 1", 100 if long else 10, reasoning=5)

    with Scripted(script).running() as endpoint:
        several = draw(scored(endpoint, questions, budgets="16,none"))
        alone = draw(scored(endpoint, questions, samples=1))
    texts = [each.text for each in ElementTree.fromstring(several).iter(f"{SVG}text")]
    assert {"budget 16", "no budget", "one sample", "majority of 2", "any of 2"} <= set(texts)
    assert {"95 % interval", "scripted: 3 questions"} <= set(texts)
    texts = [each.text for each in ElementTree.fromstring(alone).iter(f"{SVG}text")]
    assert "one sample" in texts
    assert "majority of 1" not in texts


def test_the_command_ends_with_a_line_of_json_and_draws(questions, tmp_path, capsys):
    picture = tmp_path / "score.svg"
    with Scripted(always_right).running() as endpoint:
        command = ("bench", "--score", "--base-url", endpoint.url, "--questions", str(questions))
        assert main((*command, "--budgets", "8,none", "--plot", str(picture))) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["completed"] == 24
    assert "Score Result" in table[0]
    assert ElementTree.parse(picture).getroot().tag == f"{SVG}svg"


def test_the_command_fails_where_nothing_was_answered(questions, capsys):
    with Scripted(lambda _: (500, {})).running() as endpoint:
        command = ("bench", "--score", "--base-url", endpoint.url, "--questions", str(questions))
        assert main((*command, "--samples", "1")) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["errors_by_code"] == {"500": 3}


def test_ctrl_c_tells_what_was_seen_until_then(folder, questions):
    command = [sys.executable, "-c", INTERRUPTIBLE, "bench", "--score", "--samples", "1"]
    command += ["--max-concurrency", "2", "--questions", str(questions), "--base-url"]
    with serving(folder) as served:
        served.engine.executor.hold()
        process = subprocess.Popen([*command, served.url], stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: len(served.engine.submitted) == 2, "requests under way")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.communicate()
    *table, last = out.splitlines()
    found = json.loads(last)
    assert process.returncode == 130
    assert (found["completed"], found["failed"], found["unfinished"]) == (0, 0, 3)
    assert found["budgets"] == []
    assert "warning: stopped before its end" in table


# Flags.


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"samples": 10**6}, "--samples 1000000"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"max_concurrency": 0}, "--max-concurrency 0"),
        ({"seed": -1}, "--seed -1"),
        ({"budgets": ""}, "--budgets : give"),
        ({"budgets": "16,-1"}, "--budgets 16,-1"),
        ({"budgets": "16,016"}, "--budgets 16,016"),
        ({"budgets": "none,none"}, "--budgets none,none"),
        ({"budgets": "9999999999"}, "--budgets 9999999999"),
        ({"request_timeout_s": 0.0}, "--request-timeout-s 0"),
        ({"extra_body": "[]"}, "--extra-body"),
        ({"extra_body": '{"n": 2}'}, "--extra-body: n is given"),
        ({"extra_body": '{"max_reasoning_tokens": 2}'}, "max_reasoning_tokens is given"),
        ({"header": ("x-name",)}, "--header x-name"),
        ({"base_url": "localhost"}, "--base-url localhost"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, named):
    with pytest.raises(ConfigError, match=named) as refused:
        score(ScoreRequest(**{"base_url": "http://127.0.0.1:1"} | flags))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["result_filename", "plot"])
def test_a_folder_that_is_not_there_is_told_before_anything_is_asked(name, tmp_path):
    file = tmp_path / "nowhere" / "file"
    with pytest.raises(ConfigError, match="its folder is not there"):
        score(ScoreRequest(base_url="http://127.0.0.1:1", **{name: file}))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--score --num-prompts 3", "--num-prompts is not for --score"),
        ("--score --goodput ttft:5", "--goodput is not for --score"),
        ("--score --no-ignore-eos", "--ignore-eos is not for --score"),
        ("--score --in-process", "--in-process is not for --score"),
        ("--score --max-num-seqs 3", "--max-num-seqs needs --in-process"),
        ("--samples 3", "--samples is for --score alone"),
        ("--budgets 16", "--budgets is for --score alone"),
        ("--max-tokens 16", "--max-tokens is for --score alone"),
        ("--plot a.svg --in-process", "--plot is for --score alone"),
    ],
)
def test_flags_of_load_and_of_questions_do_not_mix(flags, named, capsys):
    assert main(["bench", "--base-url", "http://127.0.0.1:1", *flags.split()]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert named in line
