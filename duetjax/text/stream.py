"""Text of a token stream as it grows: whole characters only, ended by the first stop string."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from duetjax.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character spans at most 4 byte tokens. Text that still ends in a replacement character after
# this many further tokens holds invalid bytes, not an unfinished character.
_MAX_PENDING = 8
_CHARACTER_TOKENS = 4


class TextDelta(NamedTuple):
    """Text that became certain with a push; stopped: a stop string ended it, nothing follows.

    offsets: for each token that the text reaches for the first time, in order, where in the whole
    text its own begins. A token without text (a special one) waits for text after it, or the end.
    """

    text: str
    stopped: bool
    offsets: tuple[int, ...] = ()


class TextStream:
    """Turns the tokens of one completion into text deltas, one instance for each completion.

    Special tokens and ids beyond the vocabulary are left out. A delta never ends inside a
    character, and text that may begin a stop string is held back until that is decided. The deltas
    and `finish()` together are the decoded text cut at the first stop string, however the tokens
    are divided into pushes: the string that is complete first wins, the longest of those that end
    together. With `include_stop_str` the text ends after the stop string, otherwise before it.
    A stop string does not count unless it ends after the first `min_tokens` tokens. Tokens whose
    text was cut off whole, with a stop string or as a stop id, are in no delta's offsets.
    stopped: whether a stop string has ended the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        include_stop_str: bool = False,
        *,
        min_tokens: int = 0,
    ) -> None:
        assert all(stop), f"empty stop string in {stop!r}"
        self._decoder = _IncrementalDecoder(tokenizer)
        self._special_ids, self._vocab_size = tokenizer.special_ids, tokenizer.vocab_size
        self._stop = stop
        self._initials = frozenset(s[0] for s in stop)
        self._longest_stop = max(map(len, stop), default=0)
        self._include_stop_str = include_stop_str
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._length = 0  # characters decoded, those held back included
        self._sent = 0  # characters given in deltas
        self._starts: list[int] = []  # of the tokens that no delta has reached yet
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Takes the next tokens; those after a stop string are ignored."""
        texts = []
        for token_id in token_ids:
            if self.stopped:
                break
            self._num_tokens += 1
            self._starts.append(self._length)
            if token_id < self._vocab_size and token_id not in self._special_ids:
                texts.append(self._release(self._decoder.push(token_id)))
        return TextDelta("".join(texts), self.stopped, self._reached(self._sent))

    def end(self, token_ids: Sequence[int], *, at_stop_id: bool = False) -> TextDelta:
        """Takes the last tokens and gives all that is left of the text.

        at_stop_id: the last of them is the id that ended the completion; like a stop string, its
        own text is left out unless `include_stop_str`.
        """
        hidden = at_stop_id and not self._include_stop_str
        delta = self.push(token_ids[:-1] if hidden else token_ids)
        text = delta.text + self.finish()
        end = self._sent if self.stopped else self._length + 1
        return TextDelta(text, self.stopped, delta.offsets + self._reached(end))

    def finish(self) -> str:
        """The rest of the text, held-back parts and an unfinished character included."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        self._sent += len(held)
        return text + held

    def _reached(self, end: int) -> tuple[int, ...]:
        """Takes out the tokens that begin before `end`."""
        count = bisect_left(self._starts, end)
        reached = tuple(self._starts[:count])
        del self._starts[:count]
        return reached

    def _release(self, new: str) -> str:
        """Adds decoded text and returns what is certain to stay."""
        self._length += len(new)
        text = self._certain(new) if new and self._stop else new
        self._sent += len(text)
        return text

    def _certain(self, new: str) -> str:
        """What of the held-back and the new text cannot be, or become, part of a stop string."""
        text = self._held + new
        if self._num_tokens > self._min_tokens and (cut := self._cut(text)) is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        tail = range(max(0, len(text) - self._longest_stop + 1), len(text))
        starts = (i for i in tail if text[i] in self._initials)
        possible = (i for i in starts if any(stop.startswith(text[i:]) for stop in self._stop))
        certain = next(possible, len(text))
        self._held = text[certain:]
        return text[:certain]

    def _cut(self, text: str) -> int | None:
        """Where the first stop string that ends after the held-back text cuts; None without one."""
        matches = []
        for stop in self._stop:
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        if not matches:
            return None
        end, start = min(matches)
        return end if self._include_stop_str else start


class _IncrementalDecoder:
    """Decodes token by token what decoding all tokens at once would give.

    Decoders look at neighbours (a leading space is dropped, bytes join to characters), so each
    token is decoded behind the tokens of the previous piece. tokenizers.DecodeStream does the same,
    but raises from then on when a run of byte tokens (`<0xE4>`) turns invalid after a part of
    it was shown, has no flush, and keeps every token of an invalid run. Here what was shown
    stays and the new tokens are decoded by themselves: only in such runs may the text differ from
    decoding everything at once, which replaces the whole run. (A run that spells U+FFFD itself
    several times looks like one of them.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []  # context tokens, then pending ones
        self._context = 0  # tokens at the start of the window that are shown completely
        self._shown = ""  # the part of the window's text that was returned already

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            new = self._unshown(text)
            if not new:  # a leading "▁" says nothing by itself, but keeps the next one's space
                return ""
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = self._decode(self._window)
            return new
        if len(self._window) - self._context > _MAX_PENDING:
            return self._skip_invalid(text)
        settled = text.rstrip(_REPLACEMENT)
        if not settled.startswith(self._shown):
            return ""
        new, self._shown = settled[len(self._shown) :], settled
        return new

    def finish(self) -> str:
        """The text of the tokens that are still pending."""
        return self._unshown(self._decode(self._window))

    def _unshown(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        return self._decode(self._window[self._context :])

    def _skip_invalid(self, text: str) -> str:
        """Returns all but the last replacement character, which may still become a character."""
        new = self._unshown(text)
        self._window = self._window[-_CHARACTER_TOKENS:]
        self._context = len(self._window)
        tail = self._decode(self._window)
        self._shown = tail.removesuffix(_REPLACEMENT)
        return new if self._shown == tail else new.removesuffix(_REPLACEMENT)
