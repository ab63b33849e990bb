"""One constrained answer: follows its tokens and says which may come next."""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from duetjax.constrain.grammars import LIMITS, one_line
from duetjax.policy.request import Constraint, Permit

_ANY = b""
_REMEMBERED = 32
_OPENING_BYTES = 256


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens as llguidance knows them. size: of the sampler's logits."""

    tokenizer: LLTokenizer
    size: int
    _beyond: dict[bytes, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def only(self, token: int) -> bytes:
        """The mask that allows one token."""
        words = np.zeros(-(-self.size // 32), "<u4")
        words[token // 32] = 1 << token % 32
        return words.tobytes()

    def all_but(self, tokens: Iterable[int]) -> bytes:
        """The mask that allows all tokens but these."""
        words = np.full(-(-self.size // 32), 0xFFFFFFFF, "<u4")
        for token in tokens:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        return self._cut(words)

    def mask(self, matcher: LLMatcher) -> bytes:
        """What a matcher allows."""
        return self._cut(np.frombuffer(matcher.compute_bitmask(), "<u4"))

    def _cut(self, words: np.ndarray) -> bytes:
        """To the ids that can be sampled; llguidance counts one more than there are."""
        words = words[: -(-self.size // 32)].copy()
        if self.size % 32:
            words[-1] &= np.uint32((1 << self.size % 32) - 1)
        return words.tobytes()

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, special ones where it spells them."""
        return list(self.tokenizer.tokenize_str(text, parse_special=True))

    def beyond(self, text: bytes) -> tuple[int, ...]:
        """Tokens that begin with a text, and have more behind it than whitespace; slow at first."""
        if text not in self._beyond:
            all_of_them = map(self.text, range(self.tokenizer.vocab_size))
            self._beyond[text] = tuple(
                token
                for token, own in enumerate(all_of_them)
                if token < self.size and own.startswith(text) and own[len(text) :].strip()
            )
        return self._beyond[text]

    def text(self, token: int) -> bytes:
        """Of one token, a special one's included."""
        return bytes(self.tokenizer.decode_bytes([token]))


def vocabulary(tokenizer_json: str, size: int, eos_token_ids: list[int]) -> Vocabulary:
    """Of a tokenizer.json's text; takes a second for a large one.

    size: of the logits; a tokenizer may know more ids, which nothing can sample, or fewer.
    """
    try:
        tokenizer = LLTokenizer(tokenizer_json, n_vocab=size, eos_token=eos_token_ids)
    except ValueError:  # it knows more
        tokenizer = LLTokenizer(tokenizer_json, eos_token=eos_token_ids)
    return Vocabulary(tokenizer, size)


class Compiled:
    """A vocabulary, and the grammars last compiled for it; for one thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()  # the oldest first

    def matcher(self, grammar: str | None) -> LLMatcher | None:
        """A new one of a grammar; raises ValueError where it cannot be compiled."""
        if grammar is None:
            return None
        found = self._matchers.pop(grammar, None)
        if found is None:
            found = LLMatcher(self.vocabulary.tokenizer, grammar, log_level=0, limits=LIMITS)
            if found.is_error():
                raise ValueError(one_line(found.get_error()))
        self._matchers[grammar] = found
        if len(self._matchers) > _REMEMBERED:
            self._matchers.popitem(last=False)
        return found.deep_copy()


class _Part(Enum):
    """Where an answer is. FORCED: the next tokens are given."""

    REASONING = auto()
    FORCED = auto()
    ANSWER = auto()


class Follower:
    """Follows an answer from its first token: `begin`, then `sampled` for each; `begin` again anew.

    Reasoning that no grammar follows is left to itself for as many tokens as it may have, so that
    it takes launches of many steps. Where a grammar follows, each token is looked at; an answer
    that does not begin in its reasoning is made to, and none ends there.
    """

    def __init__(
        self,
        request_id: str,
        constraint: Constraint,
        vocabulary: Vocabulary,
        matcher: LLMatcher | None = None,
    ) -> None:
        """matcher: a new one of the constraint's grammar, if that has been compiled before."""
        self.id = request_id
        self._first = matcher or Compiled(vocabulary).matcher(constraint.grammar)
        self._reasoning = constraint.reasoning
        self._vocabulary = vocabulary
        self._ends = vocabulary.tokenizer.eos_tokens

    def begin(self) -> Permit:
        """What may come first."""
        self._num_tokens = 0
        self._asked_at = 0.0  # from so many tokens on, what comes next has not been said
        self._matcher = None if self._first is None else self._first.deep_copy()
        self._forced = deque[int]()
        self._text = bytearray()  # of the reasoning
        self._searched = 0
        self._budget: int | None = None
        self._part = _Part.ANSWER
        if self._reasoning is not None:
            self._part = _Part.REASONING
            self._budget = self._reasoning.max_tokens
            if not self._reasoning.has_begun:
                begin = self._vocabulary.ids(self._reasoning.begin)
                if self._budget is not None:
                    self._budget += len(begin)
                if self._matcher is not None:
                    self._force(begin)
        return self._permit()

    def sampled(self, token: int) -> Permit | None:
        """What may come after a token; None where that has been said."""
        self._num_tokens += 1
        if self._part is _Part.ANSWER:
            if self._matcher is not None:
                self._matcher.consume_token(token)  # what is wrong shows with its next mask
        else:
            self._text += self._vocabulary.text(token)
        if self._part is _Part.FORCED:
            self._forced.popleft()
            if not self._forced:
                self._part = _Part.REASONING
        return self._permit() if self._num_tokens >= self._asked_at else None

    def _permit(self) -> Permit:
        if self._part is _Part.REASONING and self._is_over():
            self._part = _Part.ANSWER
        if self._part is _Part.REASONING:
            left = None if self._budget is None else self._budget - self._num_tokens
            if left == 0 and not self._has_begun():
                self._part = _Part.ANSWER
                return self._permit()
            if left is None or left > 0:
                if self._matcher is None:
                    return self._say(_ANY, left)
                return self._say(self._vocabulary.all_but(self._forbidden()), 1)
            assert self._reasoning is not None
            self._force(self._vocabulary.ids(self._reasoning.end))
        if self._part is _Part.FORCED:
            return self._say(self._vocabulary.only(self._forced[0]), 1)
        if self._matcher is None:
            return self._say(_ANY, None)
        mask = self._vocabulary.mask(self._matcher)
        if self._matcher.is_error():
            return Permit(self.id, self._num_tokens, error=one_line(self._matcher.get_error()))
        return self._say(mask, 1)

    def _say(self, mask: bytes, steps: int | None) -> Permit:
        self._asked_at = math.inf if steps is None else self._num_tokens + steps
        return Permit(self.id, self._num_tokens, mask, steps)

    def _force(self, tokens: list[int]) -> None:
        self._part = _Part.FORCED
        self._forced.extend(tokens)

    def _is_over(self) -> bool:
        """Whether the reasoning has ended, or the answer has none.

        What a token has behind the end already belongs to the answer.
        """
        assert self._reasoning is not None
        end = self._reasoning.end.encode()
        if not (self._has_begun() or self._reasoning.begin.startswith(self._opening())):
            return True
        at = self._text.find(end, max(0, self._searched - len(end)))
        self._searched = len(self._text)
        if at < 0:
            return False
        rest = bytes(self._text[at + len(end) :]).lstrip()
        if self._matcher is not None and rest:
            self._matcher.consume_tokens(self._vocabulary.tokenizer.tokenize_bytes(rest))
        return True

    def _forbidden(self) -> Iterable[int]:
        """What reasoning may not go on with: no end, and none that the answer would begin with.

        A token may have the rest of a spelled end tag, and then something.
        """
        assert self._reasoning is not None
        end, spelled = self._reasoning.end.encode(), 0
        for size in range(1, len(end)):
            if self._text.endswith(end[:size]):
                spelled = size
        return (*self._ends, *(self._vocabulary.beyond(end[spelled:]) if spelled else ()))

    def _has_begun(self) -> bool:
        """Whether this is reasoning, and not only what may yet become one."""
        assert self._reasoning is not None
        return self._reasoning.has_begun or self._opening().startswith(self._reasoning.begin)

    def _opening(self) -> str:
        """The answer's first characters, without the whitespace before them."""
        return self._text[:_OPENING_BYTES].decode(errors="ignore").lstrip()
