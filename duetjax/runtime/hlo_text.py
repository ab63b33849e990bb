"""Reads the instructions out of a compiled module's text; knows nothing of what they are for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_DIMENSION = re.compile(r"dimensions=\{(\d+)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_BITS = re.compile(r"\d+")
_NOTHING = frozenset({"tuple", "get-tuple-element", "bitcast", "parameter", "constant"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. result: its type as written. text: what follows the type.

    is_entry: it belongs to the entry computation, whose order is the schedule.
    """

    name: str
    opcode: str
    result: str
    text: str
    is_entry: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of its largest array."""
        return max((_array_bytes(*found) for found in _ARRAY.findall(self.result)), default=0)

    @property
    def sort_width(self) -> int:
        """Length of the axis that a sort sorts."""
        axis = _DIMENSION.search(self.text)
        arrays = _ARRAY.findall(self.result)
        assert axis is not None, f"no axis in {self.name} = {self.result} {self.text}"
        return _sizes(arrays[0][1])[int(axis[1])]

    @property
    def call_target(self) -> str:
        """Name of what a custom call calls."""
        target = _TARGET.search(self.text)
        assert target, f"no target in {self.name} = {self.text}"
        return target[1]

    @property
    def does_something(self) -> bool:
        """False for what only names or regroups buffers."""
        return self.opcode not in _NOTHING


def instructions(module: str) -> Iterator[Instruction]:
    """Every instruction of a module printed as text, computation by computation."""
    in_entry = False
    for line in module.splitlines():
        if line and not line[0].isspace():
            in_entry = line.startswith("ENTRY ")
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, rest = _split_type(match[2])
        opcode = _OPCODE.match(rest)
        assert opcode, f"not an instruction: {line[:200]}"
        yield Instruction(match[1], opcode[1], result, rest.strip(), in_entry)


def _split_type(text: str) -> tuple[str, str]:
    """A type, which may be a tuple of types, and the rest of the line."""
    if not text.startswith("("):
        result, _, rest = text.partition(" ")
        return result, rest
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: index + 1], text[index + 1 :]
    raise AssertionError(f"a type without an end: {text[:200]}")


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(found[0]) if (found := _BITS.search(dtype)) else 0
    count = 1
    for size in _sizes(sizes):
        count *= size
    return count * bits // 8


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")] if text else []
