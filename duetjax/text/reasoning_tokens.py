"""Counts the tokens of a model's reasoning as its text grows."""

from bisect import bisect_left
from collections.abc import Sequence

from duetjax.text.answer import END_THINK, THINK


class ReasoningTokens:
    """Counts tokens that begin inside the reasoning, its tags left out.

    begun: the prompt has opened it; otherwise an answer that does not begin with <think> has none.
    """

    def __init__(self, *, begun: bool) -> None:
        self._starts: list[int] = []  # of tokens, in characters of the text
        self._opening: str | None = ""  # of the answer, until it is known whether it is <think>
        self._begin: int | None = 0 if begun else None
        self._end: int | None = None
        self._length = 0
        self._tail = ""

    def push(self, starts: Sequence[int], text: str) -> None:
        """The text's next piece, and where the tokens that it reaches begin in the whole."""
        if self._end is not None:
            return
        self._starts += starts
        if self._opening is not None:
            self._open(self._opening + text)
        joined = self._tail + text
        if (at := joined.find(END_THINK)) >= 0:
            self._end = self._length - len(self._tail) + at
        self._length += len(text)
        self._tail = joined[1 - len(END_THINK) :]

    @property
    def count(self) -> int:
        """How many there are so far."""
        if self._begin is None:
            return 0
        end = len(self._starts) if self._end is None else bisect_left(self._starts, self._end)
        return max(0, end - bisect_left(self._starts, self._begin))

    def _open(self, text: str) -> None:
        """Looks at all the text so far, unless it can no longer say anything."""
        opening = text.lstrip()
        if opening.startswith(THINK):
            self._begin = len(text) - len(opening) + len(THINK)
        is_open = THINK.startswith(opening)
        self._opening = text if is_open and opening != THINK else None
        if self._begin is None and self._opening is None:
            self._end = 0
