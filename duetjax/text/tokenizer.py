"""Tokenizer of a Hugging Face folder: text and conversations to token ids and back."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import tokenizers

from duetjax.config import InvalidRequest, ModelFolderError
from duetjax.text.chat_template import ChatTemplate, probe
from duetjax.text.token_bytes import TokenBytes

# Private-use characters that no message may hold: _MARK breaks a control token that a user typed,
# _EDGE encloses what stands in for one that the template wrote.
_MARK: Final = "\U000ffffc"
_EDGE: Final = "\U000ffffd"
_MAX_DEPTH: Final = 100  # of what is in a message or a tool


class Tokenizer:
    """Encodes prompts and conversations and decodes tokens; may be used from several threads.

    bos_token, eos_token: texts of special tokens, None where the model has none. add_bos: whether
    `encode` begins with the BOS token; None leaves that to the tokenizer's post-processor.
    Encoding releases the GIL. vocab_size: one more than the largest id. added_ids: of the tokens
    beside the tokenizer's model, special or not, by text. has_chat_template: whether `encode_chat`
    can be used. supports_tools: whether its template looks at tools.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos: bool | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = _load_backend(tokenizer_json)
        self._bytes_of = TokenBytes(self._backend)
        self._chat = _ChatEncoder(tokenizer_json)
        self._template = chat_template
        self.has_chat_template = chat_template is not None
        self.supports_tools = chat_template is not None and chat_template.supports_tools
        self._bos_token, self._eos_token = bos_token, eos_token
        self.bos_token_id = self._declared_id("bos_token", bos_token)
        self.eos_token_id = self._declared_id("eos_token", eos_token)
        self.special_ids = self._chat.special_ids
        added = self._backend.get_added_tokens_decoder()
        self.added_ids: Mapping[str, int] = {token.content: i for i, token in added.items()}
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
        self._add_bos = add_bos

    @classmethod
    def from_folder(cls, folder: Path, *, chat_template: Path | None = None) -> Self:
        """Reads tokenizer.json, tokenizer_config.json and the chat template.

        chat_template: a template file to use in place of the folder's. Raises `ModelFolderError`
        for a missing or broken file.
        """
        config = _read_config(folder / "tokenizer_config.json")
        bos_token, eos_token = (_token_text(config, key) for key in ("bos_token", "eos_token"))
        source = _template_source(folder, config, chat_template)
        template = None
        if source is not None:
            template = ChatTemplate(source)
            probe(source, bos_token=bos_token, eos_token=eos_token)
        add_bos = config.get("add_bos_token")
        return cls(
            _read_tokenizer_json(folder),
            bos_token=bos_token,
            eos_token=eos_token,
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            chat_template=template,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; special tokens spelled in the text become control tokens.

        With add_special_tokens the result begins with the model's BOS token, once, also where
        the text begins with it.
        """
        _check_unicode(text)
        ids = _ids(self._backend, text, add_special_tokens and self._add_bos is not False)
        bos = self.bos_token_id
        if not add_special_tokens or bos is None:
            return ids
        if self._add_bos and ids[:1] != [bos]:
            return [bos, *ids]
        if ids[:2] == [bos, bos] and text.startswith(self._bos_token or ""):
            return ids[1:]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Token ids of a conversation as the chat template writes it, BOS included.

        Messages and tools are as in OpenAI's API, but for the arguments in `tool_calls`: templates
        expect them parsed. Control tokens come from the template only: a special token spelled in
        any string of the messages but their role, of tools or of template_kwargs is encoded as
        text. (Added tokens that the tokenizer does not call special, such as `<think>` in some
        models, are not guarded: templates look for them in messages.) Raises `InvalidRequest`
        where the template refuses, or where a message or a tool is nested too deep.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: send the whole prompt to /v1/completions, or"
                " start the server with --chat-template FILE",
                param="messages",
            )
        kwargs = dict(template_kwargs or {})
        self._template.check_kwargs(kwargs)
        text = self._template.render(
            [self._chat.guard_message(message) for message in messages],
            tools=self._chat.guard(tools),
            bos_token=self._bos_token,
            eos_token=self._eos_token,
            add_generation_prompt=add_generation_prompt,
            **self._chat.guard(kwargs),
        )
        return self._chat.encode(text)

    def to_json(self) -> str:
        """The text of a tokenizer.json that others can load."""
        return str(self._backend.to_str())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become replacement characters.

        Ids are in [0, 2**32); those without a token (padded vocabularies) are left out.
        """
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What one token adds to a text, as bytes; None for an id without a token.

        A special token gives its name. Bytes may be a part of a character.
        """
        return self._bytes_of(token_id)

    def _declared_id(self, key: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelFolderError(
                f"tokenizer_config.json: {key} {token!r} is not in the vocabulary of tokenizer.json"
            )
        return token_id


class _ChatEncoder:
    """Encodes rendered conversations; control tokens are those the template wrote, no others.

    Works on a second copy of the tokenizer that takes special tokens for text. Each special
    token has a stand-in there: an added token of another spelling with the same whitespace rules.
    `guard` breaks special tokens inside messages with a mark; `encode` puts the stand-ins
    where unbroken special tokens are, removes the marks, and renames the ids back.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        self._backend = _load_backend(tokenizer_json)
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        special = {i: t for i, t in added.items() if t.special and t.content}
        self.special_ids = frozenset(special)
        names = sorted((t.content for t in special.values()), key=len, reverse=True)
        self._spelled = _any_of(names)
        self._typed = _any_of([name for name in names if len(name) > 1])
        self._beginnings = frozenset(name[:k] for name in names for k in range(1, len(name)))
        self._initials = frozenset(name[0] for name in names)
        self._longest = max(map(len, names), default=1)
        # An unknown character becomes a special token by right.
        self._never_text = self.special_ids.difference(_ids(self._backend, "\U0010fffd", False))
        self._cut = _EDGE + _EDGE
        self._cut_id = self._add(self._cut, False, False)
        self._stand_in = {t.content: f"{_EDGE}{i}{_EDGE}" for i, t in special.items()}
        self._special_of = {
            self._add(self._stand_in[t.content], t.lstrip, t.rstrip): i for i, t in special.items()
        }

    def guard_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A guarded copy but for the role, one of a closed set, which templates compare."""
        role = {"role": message["role"]} if "role" in message else {}
        return {**self.guard(message), **role}

    def guard(self, value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - any JSON value
        """A copy in which no string, and no two strings in a row, spell a special token."""
        if isinstance(value, str):
            return self._guard_text(value)
        if depth > _MAX_DEPTH:
            raise InvalidRequest(
                f"a message or a tool is nested more than {_MAX_DEPTH} deep", param="messages"
            )
        if isinstance(value, Mapping):
            return {self._guard_text(k): self.guard(v, depth + 1) for k, v in value.items()}
        if isinstance(value, Sequence):
            return [self.guard(v, depth + 1) for v in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of a text rendered from guarded messages."""
        text = self._spelled.sub(lambda m: self._stand_in[m[0]], text)
        ids = _ids(self._backend, text.replace(_MARK, ""), False)
        if not self._never_text.isdisjoint(ids):
            # A model such as Unigram holds "</s>" as an ordinary piece: encode around the marks.
            ids = _ids(self._backend, text.replace(_MARK, self._cut), False)
            ids = [i for i in ids if i != self._cut_id]
        if not self._never_text.isdisjoint(ids):
            raise InvalidRequest(
                "a message holds text that this tokenizer can only read as a control token",
                param="messages",
            )
        return [self._special_of.get(i, i) for i in ids]

    def _guard_text(self, text: str) -> str:
        _check_unicode(text)
        if _MARK in text or _EDGE in text:
            raise InvalidRequest(
                f"messages may not hold the private-use characters U+{ord(_MARK):X} and"
                f" U+{ord(_EDGE):X}",
                param="messages",
            )
        guarded = self._typed.sub(lambda m: m[0][0] + _MARK + m[0][1:], text)
        tail = text[-self._longest :]
        starts = (i for i, character in enumerate(tail) if character in self._initials)
        open_ended = any(tail[i:] in self._beginnings for i in starts)
        return guarded + _MARK if open_ended else guarded

    def _add(self, text: str, lstrip: bool, rstrip: bool) -> int:
        token = tokenizers.AddedToken(text, lstrip=lstrip, rstrip=rstrip, normalized=False)
        self._backend.add_tokens([token])
        token_id = self._backend.token_to_id(text)
        assert token_id is not None, f"added token {text!r} has no id"
        return token_id


def _ids(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # Unlike encode(), encode_batch_fast() releases the GIL.
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X}), which is not Unicode"
        ) from None


def _load_backend(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the binding raises bare Exceptions too
        reason = str(error).replace("\n", " ")[:300]
        raise ModelFolderError(
            f"tokenizer.json cannot be loaded: {reason}; download it again, or name another folder"
            " with --tokenizer"
        ) from None
    # Limits kept from training would cut or pad prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror}") from None


def _read_tokenizer_json(folder: Path) -> bytes:
    content = _read(folder / "tokenizer.json")
    if content is not None:
        return content
    for other in ("tokenizer.model", "tekken.json", "vocab.json"):
        if (folder / other).exists():
            raise ModelFolderError(
                f"{folder} has {other} but no tokenizer.json; where transformers is installed, run"
                " python -c 'from transformers import AutoTokenizer as T;"
                f' T.from_pretrained("{folder}").save_pretrained("{folder}")\''
            )
    raise ModelFolderError(f"{folder} has no tokenizer.json; copy it from where the model is from")


def _read_config(path: Path) -> dict[str, Any]:
    content = _read(path)
    try:
        config = {} if content is None else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path} must hold an object, not {type(config).__name__}")
    return config


def _token_text(config: Mapping[str, Any], key: str) -> str | None:
    """A token given as text or as {"content": text}; None where there is none."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise ModelFolderError(f"tokenizer_config.json: {key} must be a string, not {token!r}")
    return token or None


def _template_source(folder: Path, config: Mapping[str, Any], override: Path | None) -> str | None:
    """Text of the override, of chat_template.jinja, or of tokenizer_config.json, in this order."""
    path = override or folder / "chat_template.jinja"
    content = _read(path)
    if content is not None:
        return content.decode(errors="replace")
    if override is not None:
        raise ModelFolderError(f"chat template {override} does not exist; give a file")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(named, {}).get("template")
    if template is not None and not isinstance(template, str):
        kind = type(template).__name__
        raise ModelFolderError(f"tokenizer_config.json: chat_template must be a string, not {kind}")
    return template
