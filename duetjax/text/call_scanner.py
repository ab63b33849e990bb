"""A tool call's JSON object as it grows: its name, then its arguments in the model's own text."""

import enum
import json
import re
from typing import Final

_BLANK: Final = re.compile(r"[ \t\n\r]*")
_SCALAR: Final = re.compile(r"[-+.\w]*")
_TEXT: Final = re.compile(r'[^"\\]*')
_BETWEEN: Final = re.compile(r'[^"{}\[\]]*')
_ARGUMENTS: Final = frozenset(("arguments", "parameters"))
# What models write beside a call's name and arguments.
_CALL_KEYS: Final = _ARGUMENTS | {"name", "type", "id"}


class _Next(enum.Enum):
    """What the scanner expects of the text."""

    OPEN = enum.auto()
    KEY = enum.auto()  # or the object's end
    COLON = enum.auto()
    VALUE = enum.auto()
    COMMA = enum.auto()  # or the object's end
    IN_KEY = enum.auto()
    IN_SCALAR = enum.auto()
    IN_VALUE = enum.auto()
    END = enum.auto()
    FAULT = enum.auto()


class CallScanner:
    """Reads one object {"name": ..., "arguments": {...}} in pieces of any size, in linear time.

    "parameters" counts as "arguments"; other keys are passed over, or without `other_keys` all but
    "type" and "id" are faults. The object's own keys and separators are checked; of values only
    strings and the depth of brackets are followed, so what is wrong inside the arguments is for
    the caller's JSON parser to find. A name that is no string or empty, or arguments that are no
    object, is a fault.

    is_told: the name is known and the arguments have begun, which makes it a call, whatever
    follows. name: of the tool, "" until it is known.
    """

    def __init__(self, *, other_keys: bool) -> None:
        self._other_keys = other_keys
        self._next = _Next.OPEN
        self._value = _Nested()
        self._key = ""
        self._kept: list[str] = []  # pieces of the key, or of the name's value
        self._arguments: list[str] = []  # pieces not taken yet
        self._has_arguments = False
        self._raw: list[str] = []  # all text so far, until it is told
        self.name = ""
        self.is_told = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more belongs to it: at the object's end, and from a fault on."""
        return self._next in (_Next.END, _Next.FAULT)

    @property
    def raw(self) -> str:
        """All that was read of an object that is not told."""
        return "".join(self._raw)

    def feed(self, text: str, at: int) -> int:
        """Reads on from text[at]; gives where the object or the text ends, or a fault begins."""
        start = at
        while at < len(text) and not self.is_over:
            at = self._step(text, at)
        if self.is_told:
            self._raw.clear()
        else:
            self._raw.append(text[start:at])
        return at

    def take_arguments(self) -> str:
        """The arguments' text that was not taken yet; "" before the call is told."""
        if not self.is_told:
            return ""
        arguments = "".join(self._arguments)
        self._arguments.clear()
        return arguments

    def _step(self, text: str, at: int) -> int:
        match self._next:
            case _Next.IN_KEY:
                return self._in_key(text, at)
            case _Next.IN_VALUE:
                return self._in_value(text, at)
            case _Next.IN_SCALAR:
                end = match_end(_SCALAR, text, at)
                if end < len(text):
                    self._next = _Next.COMMA
                return end
        at = match_end(_BLANK, text, at)
        return at if at == len(text) else self._at_mark(text[at], at)

    def _at_mark(self, mark: str, at: int) -> int:
        match self._next, mark:
            case _Next.VALUE, _:
                return self._begin_value(mark, at)
            case _Next.KEY, '"':
                self._kept.clear()
                self._value = _Nested()
                self._next = _Next.IN_KEY
                return at
            case (_Next.OPEN, "{") | (_Next.COMMA, ","):
                self._next = _Next.KEY
            case _Next.COLON, ":":
                self._next = _Next.VALUE
            case ((_Next.KEY | _Next.COMMA), "}"):
                self._next = _Next.END
            case _:
                return self._fault(at)
        return at + 1

    def _begin_value(self, mark: str, at: int) -> int:
        is_arguments = self._key in _ARGUMENTS
        wanted = "{" if is_arguments else '"' if self._key == "name" else mark
        if mark != wanted and not self.is_told:
            return self._fault(at)
        if is_arguments and not self.is_told:
            self._arguments.clear()  # of two, the last one counts
            self._has_arguments = True
            self.is_told = bool(self.name)
        elif self.is_told:
            self._key = ""  # a second name or arguments, too late to count
        self._kept.clear()
        self._value = _Nested()
        self._next = _Next.IN_VALUE if mark in '"{[' else _Next.IN_SCALAR
        return at

    def _in_value(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        if self._key in _ARGUMENTS:
            self._arguments.append(text[at:end])
        elif self._key == "name":
            self._kept.append(text[at:end])
        if not self._value.is_over:
            return end
        self._next = _Next.COMMA
        if self._key == "name":
            self.name = self._string() or ""
            self.is_told = bool(self.name) and self._has_arguments
            return end if self.name else self._fault(end)
        return end

    def _in_key(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        self._kept.append(text[at:end])
        if not self._value.is_over:
            return end
        self._next = _Next.COLON
        key = self._string()
        known = key is not None and (self._other_keys or self.is_told or key in _CALL_KEYS)
        self._key = key or ""
        return end if known else self._fault(end)

    def _string(self) -> str | None:
        """The kept JSON string's value; None for a broken escape or half of a surrogate pair."""
        try:
            value = str(json.loads("".join(self._kept), strict=False))
            value.encode()
        except ValueError:
            return None
        return value

    def _fault(self, at: int) -> int:
        self._next = _Next.FAULT
        return at


class _Nested:
    """Finds where one string, object or array ends: by quotes and the depth of brackets alone."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_over = False

    def feed(self, text: str, at: int) -> int:
        """Reads on from text[at]; gives where the value or the text ends."""
        while at < len(text) and not self.is_over:
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            at = match_end(_TEXT if self._in_string else _BETWEEN, text, at)
            if at < len(text):
                self._turn(text[at])
                at += 1
        return at

    def _turn(self, mark: str) -> None:
        if mark == "\\":
            self._is_escaped = True
            return
        if mark == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if mark in "{[" else -1
        self.is_over = not self._in_string and self._depth == 0


def match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where what a pattern matches at a place ends; it may be nothing."""
    match = pattern.match(text, at)
    assert match is not None, f"{pattern.pattern} matches the empty string"
    return match.end()
