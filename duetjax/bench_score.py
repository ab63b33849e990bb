"""`duetjax bench --score`: questions to an endpoint, and how often its answers are right for how
many tokens, budget by budget.

Each of n samples is a request of its own, whose seed is --seed plus its number: so n has no bound,
each answer has its own count of tokens, and budgets are compared over the same random bits.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from duetjax.bench import (
    SECRET,
    allow_many_connections,
    client_of,
    fields_of,
    plain,
    write_result,
)
from duetjax.bench_client import Answer, ask
from duetjax.bench_endpoint import first_model
from duetjax.bench_load import CHAT
from duetjax.bench_questions import Question, questions_of
from duetjax.bench_score_report import Figures, Round, Sample, figures, name_of, warnings
from duetjax.bench_score_report import draw as picture
from duetjax.bench_score_report import lines as table
from duetjax.config import ConfigError, flag
from duetjax.progress import progress_bar

BUDGET = "max_reasoning_tokens"
"""The field of a chat that bounds its thinking."""
_OWN = ("messages", "n", "seed", "stream", BUDGET)
"""Fields that --extra-body may not give."""
USUAL_CONCURRENCY = 16
"""Requests at a time where nothing is said."""
_RANGES = {
    "samples": (1, 1024),
    "max_tokens": (1, 2**31 - 1),
    "max_concurrency": (1, 2**16),
    "seed": (0, 2**32 - 1),
}
_MOST_DIGITS = 9
"""Of a budget."""
_MALFORMED = (AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """The flags of `duetjax bench --score`, by their names.

    budgets: numbers and "none", with commas between. temperature, top_p, max_tokens: None is what
    the server does of itself.
    """

    base_url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    header: Sequence[str] = ()
    model: str | None = None
    questions: Path | None = None
    samples: int = 4
    budgets: str = "none"
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    extra_body: str | None = None
    max_concurrency: int | None = None
    request_timeout_s: float = 600.0
    save_result: bool = False
    save_detailed: bool = False
    result_filename: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it. document: the JSON line."""

    document: Mapping[str, object]
    was_stopped: bool

    @property
    def has_answers(self) -> bool:
        """Whether any request was answered."""
        return bool(self.document["completed"])


def score(request: ScoreRequest) -> Report:
    """Asks and grades; Ctrl-C ends it, and what was answered until then is told.

    Writes the result's file where one was asked for. Raises `ConfigError` with one line that names
    the flag and says what to give.
    """
    budgets = _checked(request)
    questions = questions_of(request.questions)
    rounds = [
        Round(budget, [Sample(q, n) for q in range(len(questions)) for n in range(request.samples)])
        for budget in budgets
    ]
    run = _Run(request, questions)
    allow_many_connections()
    model, was_stopped = asyncio.run(run.all_of(rounds))
    begun = [each for each in rounds if any(sample.is_over for sample in each.samples)]
    found = [figures(each, request.seed) for each in begun]
    document = _document(request, model, len(questions), rounds, found)
    doubts = list(warnings(begun, found))
    if request.temperature == 0 and request.samples > 1:
        doubts.append("temperature 0: all samples of a question are alike")
    if was_stopped:
        doubts.append("stopped before its end")
    document["warnings"] = doubts
    if request.save_result or request.save_detailed or request.result_filename is not None:
        detailed = _detailed(questions, begun) if request.save_detailed else {}
        usual = f"score-{model.rpartition('/')[2]}-{document['date']}.json"
        write_result(request.result_filename or Path(usual), document | detailed)
    return Report(document, was_stopped)


def lines(report: Report) -> Iterator[str]:
    """The report as a table."""
    return table(report.document)


def draw(report: Report) -> str:
    """The report as SVG. Raises `ConfigError` where nothing was answered."""
    return picture(report.document)


class _Run:
    """Asks an endpoint; belongs to one event loop."""

    def __init__(self, request: ScoreRequest, questions: Sequence[Question]) -> None:
        self._request, self._questions = request, questions
        self._client = client_of(request.base_url, request.api_key, request.header)
        self._places = asyncio.Semaphore(_concurrency(request))
        self._usual = _usual(request)

    async def all_of(self, rounds: Sequence[Round]) -> tuple[str, bool]:
        """One after another; returns the model's name, and whether Ctrl-C ended it."""
        model = self._request.model or await first_model(self._client)
        try:
            for each in rounds:
                await self._round(each, model)
        except asyncio.CancelledError:
            return model, True
        return model, False

    async def _round(self, round_: Round, model: str) -> None:
        began = time.monotonic()
        fields = {"model": model} | self._usual
        if round_.budget is not None:
            fields[BUDGET] = round_.budget
        try:
            with progress_bar(len(round_.samples), name_of(round_.budget), "answer") as bar:
                async with asyncio.TaskGroup() as group:
                    for sample in round_.samples:
                        task = group.create_task(self._one(sample, fields))
                        task.add_done_callback(lambda _: bar.update())
        finally:
            round_.seconds = time.monotonic() - began

    async def _one(self, sample: Sample, fields: dict[str, Any]) -> None:
        question = self._questions[sample.question]
        asked = {"messages": [{"role": "user", "content": question.prompt}]}
        body = orjson.dumps(asked | {"seed": self._request.seed + sample.number} | fields)
        async with self._places:
            try:
                async with asyncio.timeout(self._request.request_timeout_s):
                    answer = await ask(self._client, "POST", CHAT, body)
            except TimeoutError:
                sample.error = "timeout"
            except OSError as error:
                sample.error = f"connection {error.strerror or error}".lower()
            else:
                _take(answer, question, sample)
        sample.is_over = True


def _take(answer: Answer, question: Question, sample: Sample) -> None:
    """Reads a response and grades it."""
    if answer.status != 200:
        sample.error = answer.refusal
        return
    try:
        document = orjson.loads(answer.body)
        [choice] = document["choices"]
        details = document["usage"].get("completion_tokens_details") or {}
        text, told = choice["message"].get("content") or "", details.get("reasoning_tokens")
        sample.answer = question.answer_in(text)
        sample.tokens = int(document["usage"]["completion_tokens"])
        sample.reasoning_tokens = None if told is None else int(told)
        sample.finish_reason = str(choice["finish_reason"])
    except _MALFORMED:
        sample.error, sample.answer = "malformed", None
        return
    sample.text, sample.is_right = text, question.is_right(sample.answer)
    sample.ignored = answer.headers.get("x-duetjax-ignored", "")


# From flags to settings.


def _checked(request: ScoreRequest) -> list[int | None]:
    """The budgets. Raises `ConfigError` for any flag at fault that no other place refuses."""
    for name, (least, most) in _RANGES.items():
        if (value := getattr(request, name)) is not None and not least <= value <= most:
            raise ConfigError(f"{flag(name)} {value}: give a number from {least} to {most}")
    if not 0 < request.request_timeout_s < 1e9:
        value = request.request_timeout_s
        raise ConfigError(f"--request-timeout-s {value:g}: give a number above 0")
    for name in ("result_filename", "plot"):
        file = getattr(request, name)
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{flag(name)} {file}: its folder is not there")
    names = [name.strip() for name in request.budgets.split(",")]
    budgets = [_budget(name) for name in names if name == "none" or _is_count(name)]
    if len(set(budgets)) < len(names):
        raise ConfigError(
            f"--budgets {request.budgets}: give different numbers of tokens or none, as in"
            " 256,1024,none"
        )
    return budgets


def _is_count(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= _MOST_DIGITS


def _budget(name: str) -> int | None:
    return None if name == "none" else int(name)


def _concurrency(request: ScoreRequest) -> int:
    return request.max_concurrency or USUAL_CONCURRENCY


def _usual(request: ScoreRequest) -> dict[str, Any]:
    """Fields of every body."""
    given = {name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p")}
    asked = {name: value for name, value in given.items() if value is not None}
    extra = fields_of(request.extra_body)
    for name in _OWN:
        if name in extra:
            raise ConfigError(f"--extra-body: {name} is given by --score's own flags; leave it out")
    return asked | extra


# The result.


def _document(
    request: ScoreRequest,
    model: str,
    num_questions: int,
    rounds: Sequence[Round],
    found: Sequence[Figures],
) -> dict[str, object]:
    errors = Counter[str]()
    for each in found:
        errors.update(each.errors_by_code)
    flags = asdict(request)
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "model_id": model,
        "num_questions": num_questions,
        "samples": request.samples,
        "max_concurrency": _concurrency(request),
        "arguments": {name: plain(flags[name]) for name in flags if name not in SECRET},
        "duration": sum([each.seconds for each in rounds]),
        "completed": sum([each.completed for each in found]),
        "failed": sum([each.failed for each in found]),
        "unfinished": sum([not sample.is_over for each in rounds for sample in each.samples]),
        "errors_by_code": dict(errors),
        "budgets": [asdict(each) for each in found],
    }


def _detailed(questions: Sequence[Question], rounds: Sequence[Round]) -> dict[str, object]:
    """Answer by answer."""
    return {
        "questions": [asdict(each) for each in questions],
        "answers": [
            {"max_reasoning_tokens": round_.budget} | asdict(sample)
            for round_ in rounds
            for sample in round_.samples
            if sample.is_over
        ],
    }
