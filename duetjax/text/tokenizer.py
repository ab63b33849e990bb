"""Tokenizer of a Hugging Face folder: text and conversations to token ids and back."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import tokenizers

from duetjax.config import ConfigError, InvalidRequest, ModelFolderError
from duetjax.text.chat_template import ChatTemplate, probe

# Private-use characters, tried in order, that mark control tokens typed by a user.
_MARKS: Final = tuple(map(chr, range(0xF0000, 0xF0040)))


class Tokenizer:
    """Encodes prompts and conversations and decodes tokens; may be used from several threads.

    bos_token, eos_token: texts of special tokens, None where the model has none. add_bos: whether
    `encode` begins with the BOS token; None leaves that to the tokenizer's post-processor.
    Encoding releases the GIL.
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
        self._chat = _ChatEncoder(tokenizer_json)
        self._template = chat_template
        self._bos_token, self._eos_token = bos_token, eos_token
        self.bos_token_id = self._declared_id("bos_token", bos_token)
        self.eos_token_id = self._declared_id("eos_token", eos_token)
        self.special_ids = self._chat.special_ids
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
        self._add_bos = add_bos

    @classmethod
    def from_folder(cls, folder: Path, *, chat_template: Path | None = None) -> Self:
        """Reads tokenizer.json, tokenizer_config.json and the chat template.

        chat_template: a template file to use in place of the folder's. Raises `ModelFolderError`
        for a missing or broken file, `ConfigError` if `chat_template` cannot be read.
        """
        config = _read_config(folder / "tokenizer_config.json")
        bos_token, eos_token = (_token_text(config, key) for key in ("bos_token", "eos_token"))
        source = _template_source(folder, config, chat_template)
        template = None if source is None else ChatTemplate(source)
        if source is not None:
            probe(source, bos_token=bos_token, eos_token=eos_token)
        add_bos = config.get("add_bos_token")
        return cls(
            _read_tokenizer_json(folder),
            bos_token=bos_token,
            eos_token=eos_token,
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            chat_template=template,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be used."""
        return self._template is not None

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
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Token ids of a conversation as the chat template writes it, BOS included.

        Control tokens come from the template only: a special token spelled in any string of the
        messages or of template_kwargs is encoded as text. (Added tokens that the tokenizer does
        not call special, such as `<think>` in some models, are not guarded: templates
        look for them in messages.) Raises `InvalidRequest` where the template refuses.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: send the whole prompt to /v1/completions, or"
                " start the server with --chat-template FILE",
                param="messages",
            )
        kwargs = dict(template_kwargs or {})
        self._template.check_kwargs(kwargs)
        mark = _unused_mark("".join(_strings([messages, kwargs])), self._template.source)
        text = self._template.render(
            self._chat.guard(messages, mark),
            bos_token=self._bos_token,
            eos_token=self._eos_token,
            add_generation_prompt=add_generation_prompt,
            **self._chat.guard(kwargs, mark),
        )
        return self._chat.encode(text, mark)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become replacement characters.

        Ids are in [0, 2**32); those without a token (padded vocabularies) are left out.
        """
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

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
    token has a stand-in there, an added token with a secret text and the same whitespace
    rules. `guard` breaks special tokens inside messages with a mark; `encode` puts the stand-ins
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
        self._longest = max(map(len, names), default=0)
        # Unknown characters may become a special token by right.
        self._never_text = self.special_ids.difference(_ids(self._backend, "\U0010fffd", False))
        self._stand_in: dict[str, str] = {}
        self._special_of: dict[int, int] = {}
        secret = secrets.token_hex(8)
        for token_id, token in special.items():
            stand_in = f"\uf8fe{secret}.{token_id}\uf8ff"
            self._special_of[self._add(stand_in, token.lstrip, token.rstrip)] = token_id
            self._stand_in[token.content] = stand_in
        self._cut = f"\uf8fe{secret}\uf8ff"
        self._cut_id = self._add(self._cut, False, False)

    def guard(self, value: Any, mark: str) -> Any:  # noqa: ANN401 - any JSON value
        """A copy in which no string, and no two strings in a row, spell a special token."""
        if isinstance(value, str):
            return self._guard_text(value, mark)
        if isinstance(value, Mapping):  # templates compare roles, which are a closed set
            return {
                self._guard_text(k, mark): v if k == "role" else self.guard(v, mark)
                for k, v in value.items()
            }
        if isinstance(value, Sequence):
            return [self.guard(v, mark) for v in value]
        return value

    def encode(self, text: str, mark: str) -> list[int]:
        """Token ids of a text rendered from guarded messages."""
        text = self._spelled.sub(lambda m: self._stand_in[m[0]], text)
        ids = _ids(self._backend, text.replace(mark, ""), False)
        if not self._never_text.isdisjoint(ids):
            # A model such as Unigram holds "</s>" as an ordinary piece: encode around the marks.
            ids = _ids(self._backend, text.replace(mark, self._cut), False)
            ids = [i for i in ids if i != self._cut_id]
        if not self._never_text.isdisjoint(ids):
            raise InvalidRequest(
                "a message holds text that this tokenizer can only read as a control token",
                param="messages",
            )
        return [self._special_of.get(i, i) for i in ids]

    def _guard_text(self, text: str, mark: str) -> str:
        guarded = self._typed.sub(lambda m: m[0][0] + mark + m[0][1:], text)
        ends = (text[-k:] for k in range(1, min(self._longest, len(text) + 1)))
        return guarded + mark if any(end in self._beginnings for end in ends) else guarded

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


def _strings(value: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [s for pair in value.items() for part in pair for s in _strings(part)]
    if isinstance(value, Sequence):
        return [s for part in value for s in _strings(part)]
    return []


def _unused_mark(texts: str, template: str) -> str:
    _check_unicode(texts)
    for mark in _MARKS:
        if mark not in texts and mark not in template:
            return mark
    raise InvalidRequest(
        f"messages use all of the private characters U+{ord(_MARKS[0]):X} to"
        f" U+{ord(_MARKS[-1]):X}; remove one",
        param="messages",
    )


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
        raise ModelFolderError(f"tokenizer.json cannot be loaded: {reason}") from None
    # Limits kept from training would cut or pad prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_tokenizer_json(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ModelFolderError(f"{path}: {error.strerror}") from None
    others = [n for n in ("tokenizer.model", "tekken.json", "vocab.json") if (folder / n).exists()]
    if not others:
        raise ModelFolderError(f"{folder} has no tokenizer.json; copy it from the model's hub page")
    raise ModelFolderError(
        f"{folder} has {others[0]} but no tokenizer.json; write one where transformers is installed:"
        f" python -c 'from transformers import AutoTokenizer as T;"
        f' T.from_pretrained("{folder}").save_pretrained("{folder}")\''
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelFolderError(f"{path}: {error.strerror}") from None
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
    path = folder / "chat_template.jinja" if override is None else override
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if override is not None:
            raise ConfigError(f"--chat-template {override} cannot be read: {error}") from None
        if not isinstance(error, FileNotFoundError):
            raise ModelFolderError(f"{path} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(named, {}).get("template")
    if template is not None and not isinstance(template, str):
        kind = type(template).__name__
        raise ModelFolderError(f"tokenizer_config.json: chat_template must be a string, not {kind}")
    return template
