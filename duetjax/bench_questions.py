"""Questions with one answer each, and whether a model's text has given it.

What counts as the answer of a text, in this order; thinking in <think> tags does not count:

1. after the last "Answer:" (or "answer is:") what \\boxed{...} holds, or else the rest of the line,
2. without that word, what the last \\boxed{...} holds,
3. without either, the end of the text.

Where the expected answer is a number, it is the last number of that; where it is words, all of it,
and of the end of a text as many words as are expected. Numbers are compared without signs of
thousands and needless zeros, words without case, punctuation around them and marks of Markdown.
"""

import importlib.resources
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from duetjax.config import ConfigError

_ASK = 'Think it through. End with a line that says "Answer:" and then the answer alone.'
_MARK = re.compile(r"(?<![a-z])answer(?: is)?[*_ ]*:[*_\s]*", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_BEFORE = "*_`$,;:!?\"'()[]{}\\\u201c\u201d\u2018\u2019"
_AFTER = f"{_BEFORE}."
_BOX = "\\boxed{"
_SHOWN = 60
"""Characters of a line at fault that are told."""


@dataclass(frozen=True, slots=True)
class Question:
    """answer: a number, or words."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"{self.question}\n\n{_ASK}"

    def answer_in(self, text: str) -> str | None:
        """What a text answers, made plain; None where it does not. See above."""
        return _answer_in(text, _plain(self.answer))

    def is_right(self, answer: str | None) -> bool:
        """Whether this is it; answer: of `answer_in`."""
        return answer == _plain(self.answer)


def questions_of(file: Path | None) -> tuple[Question, ...]:
    """From JSON lines with question and answer, other fields left aside; None: those shipped.

    Raises `ConfigError` naming the line at fault.
    """
    if file is None:
        shipped = importlib.resources.files("duetjax") / "bench_questions.jsonl"
        return tuple(_read(shipped.read_bytes(), shipped.name))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--questions {file}: {error.strerror}; name another file") from error
    questions = tuple(_read(data, str(file)))
    if not questions:
        raise ConfigError(f"--questions {file}: no line has a question")
    return questions


def _read(data: bytes, name: str) -> Iterator[Question]:
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            where = f"--questions {name}: line {number}, {_shown(line)}"
            try:
                given = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ConfigError(f"{where}: no JSON, {error}") from None
            yield _question(given, where)


def _question(given: object, where: str) -> Question:
    if not isinstance(given, dict):
        raise ConfigError(f'{where}: write {{"question": "...", "answer": "..."}}')
    question, answer = given.get("question"), given.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{where}: question must be a text that is not empty")
    if type(answer) in (int, float):
        answer = str(answer)
    if not isinstance(answer, str) or not _plain(answer):
        raise ConfigError(f"{where}: answer must be a number, or a text with letters or digits")
    return Question(question, answer)


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# Answers.


def _plain(text: str) -> str:
    """An answer as it is compared: a number in its shortest form, or words."""
    words = _STYLE.sub(r"\1", text).casefold().split()
    joined = " ".join(filter(None, [word.lstrip(_BEFORE).rstrip(_AFTER) for word in words]))
    digits = _unsigned(joined)
    return _shortest(digits) if _NUMBER.fullmatch(digits) else joined


def _answer_in(text: str, expected: str) -> str | None:
    said = text.rpartition("</think>")[2].partition("<think>")[0]
    marks = list(_MARK.finditer(said))
    rest = said[marks[-1].end() :] if marks else said
    boxed = _boxed(rest)
    if boxed is not None:
        rest = boxed
    elif marks:
        rest = rest.partition("\n")[0]
    if _NUMBER.fullmatch(expected):
        numbers = _NUMBER.findall(_unsigned(rest))
        return _shortest(numbers[-1]) if numbers else None
    words = _plain(rest)
    if boxed is None and not marks:
        words = " ".join(words.split()[-len(expected.split()) :])
    return words or None


def _boxed(text: str) -> str | None:
    """What the last box holds, if it is closed."""
    _, box, rest = text.rpartition(_BOX)
    depth = 1
    for at, character in enumerate(rest if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:at]
    return None


def _unsigned(text: str) -> str:
    """With the minus of a keyboard for that of a typesetter."""
    return text.replace("\N{MINUS SIGN}", "-")


def _shortest(number: str) -> str:
    """By its digits alone, however many there are."""
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, _, part = digits.replace(",", "").partition(".")
    part = part.rstrip("0")
    shortest = (whole.lstrip("0") or "0") + (f".{part}" if part else "")
    return shortest if shortest == "0" else sign + shortest
