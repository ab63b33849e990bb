"""What each slot carries from launch to launch, and the words in which host and device agree on it.

`progress` and token counts are written by programs alone, everything else by the host alone, so
nothing is ever written from two sides and a launch in flight cannot overwrite a delta. That is also
why limits and min_tokens are absolute positions: they need no decrement. The last row of each table
is the dummy: rows that only pad a bucket point to it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from duetjax.config import MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams
from duetjax.model.sampling import RowParams
from duetjax.policy.launch import Launch, SlotParams

PROGRESS_WORDS = 4  # token, position, whether it has stopped, unused: one 16-byte copy hands over
PARAMS = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("repetition_penalty", "f4"),
        ("frequency_penalty", "f4"),
        ("presence_penalty", "f4"),
        ("top_k", "i4"),
        ("seed", "u4", (2,)),
        ("min_position", "i4"),
        ("stop_ids", "i4", (MAX_STOP_IDS,)),
        ("bias_ids", "i4", (MAX_LOGIT_BIAS,)),
        ("bias_values", "f4", (MAX_LOGIT_BIAS,)),
        ("limit", "i4"),
    ]
)
"""One slot's parameters: `RowParams`' fields under their names, and the limit, in 32-bit words."""

_UNUSED_ID = -1
_ALL_ALLOWED = np.uint32(0xFFFFFFFF)
_MAX_COUNT = np.iinfo(np.int16).max


class SlotTables(NamedTuple):
    """The host's tables as programs take them; leading axis num_slots + 1.

    params: rows of `PARAMS` as int32 words. page_table [M] int32. prompt_mask, allowed: one bit per
    token id, uint32 [ceil(V / 32)]: which ids the prompt has, which the grammar lets through.
    """

    params: jax.Array
    page_table: jax.Array
    prompt_mask: jax.Array
    allowed: jax.Array


@dataclass(frozen=True, slots=True)
class SlotShapes:
    """Sizes of the tables: slots without the dummy, page-table entries M, vocabulary V."""

    num_slots: int
    table_width: int
    vocab_size: int

    @property
    def rows(self) -> int:
        """Slots, the dummy included."""
        return self.num_slots + 1

    @property
    def mask_words(self) -> int:
        """32-bit words of one bit per token id."""
        return -(-self.vocab_size // 32)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables on the device, counts included."""
        words = PROGRESS_WORDS + PARAMS.itemsize // 4 + self.table_width + 2 * self.mask_words
        return self.rows * (4 * words + 2 * self.vocab_size)


def unpack(words: jax.Array) -> tuple[RowParams, jax.Array]:
    """Sampling parameters and limit [B] of rows of `PARAMS` as int32 words [B, W]."""
    fields = {name: _field(words, name) for name in PARAMS.names or ()}
    limit = fields.pop("limit")
    return RowParams(**fields), limit


def _field(words: jax.Array, name: str) -> jax.Array:
    assert PARAMS.fields is not None
    dtype, offset = PARAMS.fields[name][:2]
    first, size = offset // 4, dtype.itemsize // 4
    columns = lax.bitcast_convert_type(words[:, first : first + size], jnp.dtype(dtype.base))
    return columns if dtype.shape else columns[:, 0]


type Row = tuple[str, int]
"""A field of `SlotTables`, and a slot."""


class HostTables:
    """The host's side of the slot state; `tables` uploads what has changed since it was last read.

    One writer: the executor, by the deltas of launches in their order of submission.
    """

    def __init__(self, shapes: SlotShapes) -> None:
        self._shapes = shapes
        rows, words = shapes.rows, shapes.mask_words
        self._host: dict[str, NDArray[Any]] = {
            "params": np.zeros(rows, PARAMS),
            "page_table": np.zeros((rows, shapes.table_width), np.int32),
            "prompt_mask": np.zeros((rows, words), np.uint32),
            "allowed": np.full((rows, words), _ALL_ALLOWED),
        }
        idle = SamplingParams(temperature=0.0, seed=0)  # rows that only pad ask for no draws
        self._host["params"][:] = _row(SlotParams(0, idle))
        self._device: dict[str, jax.Array] = {}
        self._stale = set(self._host)

    def apply(self, launch: Launch) -> list[Row]:
        """Takes over the launch's deltas; the rows that they change."""
        changed: dict[Row, None] = {}  # in order, each once
        for new in launch.admitted:
            self._host["params"][new.slot] = _row(new)
            self._host["page_table"][new.slot] = 0
            changed |= {("params", new.slot): None, ("page_table", new.slot): None}
            changed |= self._allow(new.slot, b"")
            if new.history:
                self._host["prompt_mask"][new.slot] = self._prompt_bits(new)
                changed["prompt_mask", new.slot] = None
        for slot, index, page in launch.pages:
            self._host["page_table"][slot, index] = page
            changed["page_table", slot] = None
        for slot, limit in launch.limits:
            self._host["params"]["limit"][slot] = limit
            changed["params", slot] = None
        for slot, mask in launch.allowed:
            changed |= self._allow(slot, mask)
        self._stale.update(name for name, _ in changed)
        return list(changed)

    def _allow(self, slot: int, mask: bytes) -> dict[Row, None]:
        """Takes over a `Launch.allowed` mask; the row, if it changes."""
        row = self._host["allowed"][slot]
        new = np.frombuffer(mask, "<u4") if mask else _ALL_ALLOWED
        if (row == new).all():
            return {}
        row[:] = new
        return {("allowed", slot): None}

    def row(self, name: str, slot: int) -> np.ndarray:
        """One row of a table; it is written again."""
        return self._host[name][slot : slot + 1]

    def arrays(self) -> dict[str, np.ndarray]:
        """The tables as programs take them; they are written again."""
        params = self._host["params"].view(np.int32).reshape(self._shapes.rows, -1)
        return {**self._host, "params": params}

    def tables(self) -> SlotTables:
        """The tables on the device."""
        for name, table in self.arrays().items():
            if name in self._stale:  # the copy is never written again
                self._device[name] = jax.device_put(table.copy())
        self._stale.clear()
        return SlotTables(**self._device)

    def counts(self, new: SlotParams) -> np.ndarray:
        """How often each id occurs in the output so far, int16 [V]."""
        output = np.array(new.history[new.num_prompt :], np.int64)
        counted = np.bincount(output, minlength=self._shapes.vocab_size)
        return np.minimum(counted, _MAX_COUNT).astype(np.int16)

    def _prompt_bits(self, new: SlotParams) -> np.ndarray:
        bits = np.zeros(self._shapes.mask_words * 32, np.uint8)
        bits[np.array(new.history[: new.num_prompt])] = 1
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def counted(counts: jax.Array, slot: jax.Array, token: jax.Array) -> jax.Array:
    """Counts one more token per row, int16 [num_slots + 1, V] in place; saturates."""
    return counts.at[slot, token].set(jnp.minimum(counts[slot, token], _MAX_COUNT - 1) + 1)


def _row(new: SlotParams) -> np.ndarray:
    """A slot's row of `PARAMS`, its limit 0."""
    sampling, row = new.sampling, np.zeros((), PARAMS)
    assert sampling.seed is not None, f"slot {new.slot} has no seed"
    for name in ("temperature", "top_p", "min_p", "top_k"):
        row[name] = getattr(sampling, name)
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        row[name] = getattr(sampling, name)
    row["seed"] = (sampling.seed >> 32) & 0xFFFFFFFF, sampling.seed & 0xFFFFFFFF
    row["min_position"] = new.num_prompt + sampling.min_tokens
    row["stop_ids"] = row["bias_ids"] = _UNUSED_ID
    row["stop_ids"][: len(new.stop_ids)] = new.stop_ids
    for index, (token, bias) in enumerate(sampling.biases):
        row["bias_ids"][index], row["bias_values"][index] = token, bias
    return row
