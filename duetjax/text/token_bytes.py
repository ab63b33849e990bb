"""The bytes that a single token stands for, also where they are only a part of a character."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import tokenizers

_SPACE: Final = "\u2581"  # sentencepiece's; the decoder's Metaspace or Replace turns it into " "
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of_characters() -> Mapping[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 is itself, other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF: Final = _bytes_of_characters()


class TokenBytes:
    """Looks tokens up one by one, as their decoder would spell them in the middle of a text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        kinds = set(_decoder_kinds(backend))
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_pieces = "ByteFallback" in kinds
        self._has_spaces = bool(kinds & {"Metaspace", "Replace"})

    def __call__(self, token_id: int) -> bytes | None:
        """A token's bytes, a special token's name included; None for an id without a token."""
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return None
        if self._is_byte_level:
            values = [_BYTE_OF.get(character) for character in piece]
            return piece.encode() if None in values else bytes(v for v in values if v is not None)
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return (piece.replace(_SPACE, " ") if self._has_spaces else piece).encode()


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """Types of the decoder and of those it is a sequence of."""
    if backend.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return [decoder["type"], *(part["type"] for part in decoder.get("decoders", ()))]
