"""What `duetjax bench --score` came to: accuracy against tokens, as numbers, a table, a picture."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duetjax.chart import Line, Mark, Panel, picture
from duetjax.config import ConfigError

type Floats = NDArray[np.float64]
type Interval = tuple[float, float]

_RESAMPLES = 2000
_WIDTH = 120
_COLUMNS = (
    ("budget", 8),
    ("accuracy (95 %)", 22),
    ("maj@n", 8),
    ("pass@n", 8),
    ("tokens", 9),
    ("reasoning", 10),
    ("cut off", 8),
    ("no answer", 10),
    ("right/1k tok", 13),
    ("seconds", 9),
    ("tok/s", 9),
    ("failed", 7),
)


@dataclass(slots=True)
class Sample:
    """What became of one request. question, number: which one, and which of its samples, from 0.

    answer: as it was graded. tokens: of the completion, thinking included. reasoning_tokens: None
    where the server tells none. error: None where all went well. ignored: fields of the body that
    the server said it does not know. is_over: whether it has ended, one way or the other.
    """

    question: int
    number: int
    text: str = ""
    answer: str | None = None
    is_right: bool = False
    tokens: int = 0
    reasoning_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    ignored: str = ""
    is_over: bool = False


@dataclass(slots=True)
class Round:
    """All questions under one budget of reasoning tokens; None: none. seconds: that it took."""

    budget: int | None
    samples: Sequence[Sample]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a round, by the names of the JSON line.

    accuracy: of one sample; who failed is not right. maj_at_n: of the answer most of a question's
    samples gave, shared where several did. pass_at_n: questions that any sample got right.
    Intervals hold 95 % of what a bootstrap over questions gives. Tokens and shares are of completed
    requests; length_share: cut off by a limit, no_answer_share: without an answer. duration: in
    seconds; output_throughput: tokens/s.
    """

    max_reasoning_tokens: int | None
    completed: int
    failed: int
    unfinished: int
    errors_by_code: Mapping[str, int]
    accuracy: float
    accuracy_interval: Interval
    maj_at_n: float
    maj_at_n_interval: Interval
    pass_at_n: float
    pass_at_n_interval: Interval
    mean_tokens: float
    mean_reasoning_tokens: float | None
    longest_reasoning: int | None
    length_share: float
    no_answer_share: float
    accuracy_per_1k_tokens: float
    total_output_tokens: int
    duration: float
    output_throughput: float


def figures(round_: Round, seed: int) -> Figures:
    """The numbers of a round of which something is over. seed: of the bootstrap."""
    over = [each for each in round_.samples if each.is_over]
    good = [each for each in over if each.error is None]
    reasoning = [each.reasoning_tokens for each in good if each.reasoning_tokens is not None]
    by_question: dict[int, list[Sample]] = {}
    for each in over:
        by_question.setdefault(each.question, []).append(each)
    asked = list(by_question.values())
    counts = np.array([len(samples) for samples in asked], np.float64)
    right = np.array([_num_right(samples) for samples in asked], np.float64)
    accuracy, accuracy_interval = _ratio(right, counts, seed)
    majority, majority_interval = _ratio(_each(_majority, asked), np.ones(len(asked)), seed)
    passed, passed_interval = _ratio(_each(_any_right, asked), np.ones(len(asked)), seed)
    tokens = sum([each.tokens for each in good])
    of = max(len(good), 1)
    return Figures(
        max_reasoning_tokens=round_.budget,
        completed=len(good),
        failed=len(over) - len(good),
        unfinished=len(round_.samples) - len(over),
        errors_by_code=dict(Counter([each.error for each in over if each.error is not None])),
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        maj_at_n=majority,
        maj_at_n_interval=majority_interval,
        pass_at_n=passed,
        pass_at_n_interval=passed_interval,
        mean_tokens=tokens / of,
        mean_reasoning_tokens=sum(reasoning) / len(reasoning) if reasoning else None,
        longest_reasoning=max(reasoning, default=None),
        length_share=sum([each.finish_reason == "length" for each in good]) / of,
        no_answer_share=sum([each.answer is None for each in good]) / of,
        accuracy_per_1k_tokens=1e3 * float(right.sum()) / max(tokens, 1),
        total_output_tokens=tokens,
        duration=round_.seconds,
        output_throughput=tokens / max(round_.seconds, 1e-9),
    )


def _each(value: Callable[[Sequence[Sample]], float], asked: Sequence[Sequence[Sample]]) -> Floats:
    return np.array([value(samples) for samples in asked], np.float64)


def _num_right(samples: Sequence[Sample]) -> int:
    return sum([each.is_right for each in samples])


def _any_right(samples: Sequence[Sample]) -> float:
    return float(_num_right(samples) > 0)


def _majority(samples: Sequence[Sample]) -> float:
    """Whether the answer that most gave is right; its share of those that as many gave."""
    votes = Counter([each.answer for each in samples if each.answer is not None])
    most = max(votes.values(), default=0)
    first = {answer for answer, count in votes.items() if count == most}
    right = {each.answer for each in samples if each.is_right}
    return len(first & right) / max(len(first), 1)


def _ratio(parts: Floats, wholes: Floats, seed: int) -> tuple[float, Interval]:
    """Sum of parts by sum of wholes, and the bootstrap's interval of it; a row for each question.

    The percentile method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
    Questions are drawn, not samples, as samples of a question are alike.
    """
    draw, size = np.random.default_rng(seed), len(parts)
    picks = [draw.integers(0, size, size) for _ in range(_RESAMPLES)]
    found = np.array([parts[pick].sum() / wholes[pick].sum() for pick in picks])
    low, high = np.percentile(found, (2.5, 97.5))
    return float(parts.sum() / wholes.sum()), (float(low), float(high))


def warnings(rounds: Sequence[Round], found: Sequence[Figures]) -> Iterator[str]:
    """What makes the numbers doubtful. found: of these rounds."""
    ignored = {each.ignored for round_ in rounds for each in round_.samples if each.ignored}
    for names in sorted(ignored):
        yield f"the server does not know {names}, and went on without"
    for each in found:
        name, budget = name_of(each.max_reasoning_tokens), each.max_reasoning_tokens
        if each.failed:
            asked = each.completed + each.failed
            yield f"{name}: {each.failed} of {asked} requests failed, and count as not right"
        if budget is not None and each.failed and all(x[:3] == "400" for x in each.errors_by_code):
            yield f"{name}: `duetjax serve` keeps budgets with --reasoning-parser alone"
        if budget is not None and each.completed and not ignored:
            longest = each.longest_reasoning
            if longest is None:
                yield f"{name}: the server tells no reasoning tokens; it may keep no budget"
            elif longest > budget:
                yield f"{name}: the longest reasoning had {longest} tokens"
        if each.accuracy in (0, 1):
            share = "all" if each.accuracy else "none"
            yield f"{name}: {share} are right; the interval has no width then, and is no certainty"


def name_of(budget: int | None) -> str:
    """A budget in words."""
    return "no budget" if budget is None else f"budget {budget}"


# For people.


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The result as a table, from its own fields."""
    yield f"{' Score Result ':=^{_WIDTH}}"
    for label, name in _ROWS:
        value = document[name]
        yield f"{label + ':':<40} {f'{value:.2f}' if isinstance(value, float) else value}"
    yield "-" * _WIDTH
    yield "".join(f"{name:>{width}}" for name, width in _COLUMNS)
    budgets, told = document["budgets"], document["warnings"]
    assert isinstance(budgets, list)
    assert isinstance(told, list)
    for found in budgets:
        cells = zip(_cells(found), _COLUMNS, strict=True)
        yield "".join(f"{cell:>{width}}" for cell, (_, width) in cells)
    yield "=" * _WIDTH
    errors = document["errors_by_code"]
    assert isinstance(errors, dict)
    yield from (f"failed: {count} x {error}" for error, count in errors.items())
    yield from (f"warning: {warning}" for warning in told)


_ROWS = (
    ("Questions", "num_questions"),
    ("Samples of each, n", "samples"),
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Maximum request concurrency", "max_concurrency"),
    ("Benchmark duration (s)", "duration"),
)


def _cells(found: Mapping[str, object]) -> Iterator[str]:
    """A budget's row of the table."""
    each = Figures(**found)  # type: ignore[arg-type]
    low, high = each.accuracy_interval
    reasoning = each.mean_reasoning_tokens
    yield "none" if each.max_reasoning_tokens is None else str(each.max_reasoning_tokens)
    yield f"{each.accuracy:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    yield f"{each.maj_at_n:.1%}"
    yield f"{each.pass_at_n:.1%}"
    yield f"{each.mean_tokens:.1f}"
    yield "-" if reasoning is None else f"{reasoning:.1f}"
    yield f"{each.length_share:.1%}"
    yield f"{each.no_answer_share:.1%}"
    yield f"{each.accuracy_per_1k_tokens:.3f}"
    yield f"{each.duration:.1f}"
    yield f"{each.output_throughput:.1f}"
    yield str(each.failed)


def draw(document: Mapping[str, object]) -> str:
    """Accuracy over the tokens that a question took, as SVG: one sample's, and what n come to.

    Raises `ConfigError` where nothing was answered.
    """
    budgets, samples = document["budgets"], document["samples"]
    assert isinstance(budgets, list)
    assert isinstance(samples, int)
    drawn = [found for each in budgets if (found := Figures(**each)).total_output_tokens]
    if not drawn:
        raise ConfigError("--plot: nothing was answered, so there is nothing to draw")
    drawn.sort(key=_mean_tokens)
    one = [(each.mean_tokens, each.accuracy, each.accuracy_interval) for each in drawn]
    most = [(samples * each.mean_tokens, each.maj_at_n, each.maj_at_n_interval) for each in drawn]
    best = [(samples * each.mean_tokens, 100 * each.pass_at_n) for each in drawn]
    series = [Line("one sample", [(x, 100 * y) for x, y, _ in one])]
    if samples > 1:
        series += [
            Line(f"majority of {samples}", [(x, 100 * y) for x, y, _ in most]),
            Line(f"any of {samples}", best),
        ]
    bounded = one + most if samples > 1 else one
    series.append(Line("95 % interval", _bounds(sorted(bounded))))
    marks = [
        Mark(each.mean_tokens, name_of(each.max_reasoning_tokens), upright=True) for each in drawn
    ]
    panel = Panel(
        title="",
        x_label="mean tokens for a question" + (", logarithmic" if samples > 1 else ""),
        y_label="right answers [%]",
        lines=series,
        marks=marks,
        log_x=samples > 1,
    )
    return picture(
        f"{document['model_id']}: {document['num_questions']} questions",
        "intervals: bootstrap over questions",
        [panel],
    )


def _mean_tokens(found: Figures) -> float:
    return found.mean_tokens


def _bounds(points: Sequence[tuple[float, float, Interval]]) -> list[tuple[float, float | None]]:
    """Upright lines with gaps between them."""
    found: list[tuple[float, float | None]] = []
    for x, _, (low, high) in points:
        found += [(x, 100 * low), (x, 100 * high), (x, None)]
    return found
