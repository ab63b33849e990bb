"""Programs of a toy model on numpy arrays: what a slot carries decides every token it gets.

A token is drawn from everything that its row may look at: the tokens in its pages, its parameters,
counts and masks. So a row, page or table that is another's for one step changes what comes out.
"""

import zlib
from types import SimpleNamespace

import jax
import numpy as np

from duetjax.policy.launch import Program, RowFlag
from duetjax.runtime.executor import Inputs, read_step
from duetjax.runtime.programs import Buckets, DeviceState, ResultBlock, RowKind
from duetjax.runtime.slot_state import PARAMS, PROGRESS_WORDS, HostTables, SlotShapes

PAGE, SLOTS, WIDTH, VOCAB, TOP = 16, 4, 6, 50, 20
LONGEST, NUM_PAGES, BUDGET = PAGE * WIDTH, SLOTS * WIDTH + 1, 64
BUCKETS = Buckets(decode=(2, SLOTS), prefill=(24, BUDGET), prefill_rows=SLOTS)
TEMPORARIES = dict(zip(BUCKETS, (3000, 9000, 20_000, 50_000), strict=True))
DONATED = slice(1, 3)  # of the flat arguments: weights, then pages and counts

PROGRAMS = SimpleNamespace(slots=SlotShapes(SLOTS, WIDTH, VOCAB), buckets=BUCKETS)


def shape(*size, dtype=np.int32):
    return jax.ShapeDtypeStruct(size, dtype)


STATE = DeviceState([shape(NUM_PAGES, PAGE)], shape(SLOTS + 1, VOCAB, dtype=np.int16),
                    shape(SLOTS + 1, PROGRESS_WORDS))  # fmt: skip


def result(key):
    """What a program puts out."""
    rows = num_rows(key)
    return STATE, ResultBlock(shape(rows, 3), shape(rows, TOP, 2))


def num_rows(key):
    program, bucket = key
    return bucket if program is Program.DECODE else BUCKETS.rows_of(bucket)


class _Rows:
    """Slot state while a program runs."""

    def __init__(self, arguments, count):
        _weights, self.kv, self.counts, self.progress, params, *tables = arguments[:8]
        self.page_table, self.prompt_mask, self.allowed = tables
        self.params = params.view(PARAMS)[:, 0]
        self.after = self.progress.copy()
        self.rows, self.top = np.zeros((count, 3), np.int32), np.zeros((count, TOP, 2), np.int32)

    def state(self, slot):
        token, position, stopped, _ = self.progress[slot].tolist()
        return token, position, not stopped and position < self.params["limit"][slot]

    def place(self, slot, position):
        return self.page_table[slot, position // PAGE], position % PAGE

    def feed(self, slot, position, token):
        self.kv[self.place(slot, position)] = token + 1

    def sample(self, row, slot, position):
        """The token at a position, after all that have been fed before it."""
        seen = self.kv[self.page_table[slot]].reshape(-1)[:position]
        known = (seen, self.params[slot : slot + 1].copy(), self.counts[slot],
                 self.prompt_mask[slot], self.allowed[slot])  # fmt: skip
        known[1]["limit"] = 0  # room for pages, which is not the request's
        digest = zlib.crc32(b"".join(each.tobytes() for each in known))
        token = digest % VOCAB
        flags = RowFlag.SAMPLED
        if ended := token in self.params["stop_ids"][slot]:
            flags |= RowFlag.STOPPED
        if position >= self.params["limit"][slot]:
            flags |= RowFlag.AT_LIMIT
        self.rows[row] = token, flags, digest & 0x3FFFFFFF
        self.top[row] = digest & 0x3FFFFFFF
        self.after[slot] = token, position, ended, 0

    def outputs(self):
        return [self.kv, self.counts, self.after, self.rows, self.top]

    def decode(self, row, slot):
        token, position, is_active = self.state(slot)
        if slot < SLOTS and is_active:
            self.feed(slot, position, token)
            self.counts[slot, token] += 1
            self.sample(row, slot, position + 1)


def decode(arguments):
    """Flat arguments of a decode program -> flat outputs."""
    slots = arguments[8].tolist()
    rows = _Rows(arguments, len(slots))
    for row, slot in enumerate(slots):
        rows.decode(row, slot)
    return rows.outputs()


def prefill(arguments):
    """The same of a prefill program."""
    tokens, offsets, starts, slots, kinds = (each.tolist() for each in arguments[8:])
    rows = _Rows(arguments, len(slots))
    for row, (slot, kind) in enumerate(zip(slots, kinds, strict=True)):
        if kind == RowKind.DECODING:
            rows.decode(row, slot)
            continue
        chunk = tokens[offsets[row] : offsets[row + 1]]
        for position, token in enumerate(chunk, starts[row]):
            if slot < SLOTS:
                rows.feed(slot, position, token)
        if kind == RowKind.LAST_CHUNK:
            rows.sample(row, slot, starts[row] + len(chunk))
    return rows.outputs()


RUN = {key: decode if key[0] is Program.DECODE else prefill for key in BUCKETS}


class Serial:
    """One launch after another, in the order of submission."""

    def __init__(self):
        self.tables, self._inputs = HostTables(PROGRAMS.slots), Inputs(PROGRAMS)
        leaves = jax.tree.leaves(STATE)
        self.kv, self.counts, self.progress = (np.zeros(x.shape, x.dtype) for x in leaves)

    def run(self, launch):
        """The result of each of its steps."""
        self.tables.apply(launch)
        for new in launch.admitted:
            if new.history:
                self.counts[new.slot] = self.tables.counts(new)
        results = []
        for _ in range(launch.k):
            state = [np.zeros(1), self.kv, self.counts, self.progress]
            tables = [each.copy() for each in self.tables.arrays().values()]
            outputs = RUN[launch.program, launch.bucket](
                [*state, *tables, *self._inputs.of(launch)]
            )
            self.kv, self.counts, self.progress, rows, top = outputs
            results.append(read_step(launch, rows, top if launch.wants_top else None))
        return results
