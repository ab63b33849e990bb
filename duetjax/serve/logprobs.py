"""Log-probabilities of tokens in OpenAI's two shapes.

A token inside a character is no text by itself. Its bytes are exact; as text it is spelled in
escapes, as OpenAI does: `\\xf0\\x9f` in chat, and `bytes:\\xf0\\x9f` in completions.
"""

from collections.abc import Sequence
from typing import Any

from duetjax.serve.call import ScoredToken
from duetjax.text.tokenizer import Tokenizer

_LEAST = -9999.0  # what both APIs know for "very unlikely"; JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""
    content = [
        {
            **_chat_entry(tokenizer, token.id, token.score.logprob),
            "top_logprobs": [_chat_entry(tokenizer, i, value) for i, value in token.score.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """The `logprobs` object of a completion choice; offsets count characters of its text.

    The sampled token is always among its top_logprobs, which so may be one more than asked for.
    """
    return {
        "tokens": [_spelled(tokenizer, token.id) for token in tokens],
        "token_logprobs": [_finite(token.score.logprob) for token in tokens],
        "top_logprobs": [_ranking(tokenizer, token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {
        "token": _nameless(token_id) if data is None else data.decode(errors="backslashreplace"),
        "logprob": _finite(logprob),
        "bytes": None if data is None else list(data),
    }


def _ranking(tokenizer: Tokenizer, token: ScoredToken) -> dict[str, float]:
    ranking: dict[str, float] = {}
    for token_id, logprob in (*token.score.top, (token.id, token.score.logprob)):
        ranking.setdefault(_spelled(tokenizer, token_id), _finite(logprob))
    return ranking


def _spelled(tokenizer: Tokenizer, token_id: int) -> str:
    data = tokenizer.token_bytes(token_id)
    if data is None:
        return _nameless(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"bytes:{data.decode(errors='backslashreplace')}"


def _nameless(token_id: int) -> str:
    """An id of a padded vocabulary, which no token has."""
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
