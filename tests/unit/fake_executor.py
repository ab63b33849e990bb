"""An executor whose next token a person can compute: a weighted sum of the tokens before it.

It keeps what a device would keep: a row of state per slot, and KV as (page, offset) -> what was
written there and for whom. A launch reads every token back through the page table from position
0, so a wrong page, position, chunk or delta changes the tokens or stops the test.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from duetjax.policy.launch import Launch, Program, SlotParams, Ticket

VOCAB_SIZE = 9973  # prime, so that no weight makes a difference between two tokens vanish


def next_token(tokens: Sequence[int], temperature: float = 0.0, seed: int = 0) -> int:
    """The token after `tokens`: sum of (position + 1) x token, plus the sampling parameters."""
    weighted = sum((position + 1) * token for position, token in enumerate(tokens))
    return (weighted + round(1000 * temperature) + seed) % VOCAB_SIZE


def expected(
    prompt: Sequence[int], n: int, temperature: float = 0.0, seed: int = 0
) -> tuple[int, ...]:
    """The `n` tokens that any schedule must generate after `prompt`."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens, temperature, seed))
    return tuple(tokens[len(prompt) :])


class DeviceFault(Exception):
    """What a failing device raises here."""


@dataclass
class _Slot:
    params: SlotParams
    owner: int
    page_table: dict[int, int] = field(default_factory=dict)
    position: int = 0  # where the next token goes
    token: int | None = None  # sampled and not fed yet; None until the prompt has ended


class FakeExecutor:
    """Implements `policy.launch.Executor`; launches take effect when submitted.

    fail_at: the launch, counted from 0, whose result raises `DeviceFault`. hold(): from then on
    results wait for release(); `held` is set while one waits.
    """

    def __init__(self, page_size: int, *, fail_at: int | None = None) -> None:
        self._page_size = page_size
        self._fail_at = fail_at
        self._slots: dict[int, _Slot] = {}
        self._kv: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset): (token, owner)
        self._num_owners = 0
        self._results: dict[Ticket, tuple[int, ...]] = {}
        self._released = threading.Event()
        self._released.set()
        self.held = threading.Event()
        self.launches: list[Launch] = []

    def hold(self) -> None:
        """Makes every result wait for `release`."""
        self._released.clear()

    def release(self) -> None:
        """Lets waiting and later results through."""
        self._released.set()

    def submit(self, launch: Launch) -> Ticket:
        """Runs a launch: deltas, then KV writes of all rows, then one sample per row."""
        assert len(set(launch.slots)) == len(launch.slots) > 0, launch
        self._apply_deltas(launch)
        rows = self._decode(launch) if launch.program is Program.DECODE else self._prefill(launch)
        ticket = len(self.launches)
        self.launches.append(launch)
        self._results[ticket] = rows
        return ticket

    def result(self, ticket: Ticket) -> tuple[int, ...]:
        """The launch's samples, once they are released; each ticket once."""
        if not self._released.is_set():
            self.held.set()
            self._released.wait()
            self.held.clear()
        if ticket == self._fail_at:
            raise DeviceFault(f"launch {ticket}")
        return self._results.pop(ticket)

    def _apply_deltas(self, launch: Launch) -> None:
        for params in launch.admitted:
            assert params.slot in launch.slots, f"{params} is not a row of {launch}"
            self._slots[params.slot] = _Slot(params, owner=self._num_owners)
            self._num_owners += 1
        for slot, index, page in launch.pages:
            assert slot in launch.slots, f"page for slot {slot}, which is not a row of {launch}"
            assert page != 0, f"the dummy page was given to slot {slot}"
            table = self._slots[slot].page_table
            assert index == len(table), f"page {index} of slot {slot} comes after {len(table)}"
            table[index] = page

    def _prefill(self, launch: Launch) -> tuple[int, ...]:
        assert sum(launch.counts) == len(launch.tokens) <= launch.bucket, launch
        rows = list(zip(launch.slots, launch.starts, launch.counts, launch.samples, strict=True))
        packed = iter(launch.tokens)
        for slot, start, count, _ in rows:
            state = self._slots[slot]
            assert count > 0, launch
            assert (state.token, state.position) == (None, start), f"{state} fed from {start}"
            for _ in range(count):
                self._write(state, next(packed))
        sampled = tuple(self._sample(self._slots[slot]) for slot in launch.slots)
        for (slot, _, _, samples), token in zip(rows, sampled, strict=True):
            if samples:
                self._slots[slot].token = token
        return sampled

    def _decode(self, launch: Launch) -> tuple[int, ...]:
        assert len(launch.slots) <= launch.bucket, launch
        prefill_only = (launch.starts, launch.counts, launch.tokens, launch.samples)
        assert prefill_only == ((), (), (), ()), launch
        states = [self._slots[slot] for slot in launch.slots]
        for state in states:
            assert state.token is not None, f"{state} decodes before its prompt has ended"
            self._write(state, state.token)
        samples = tuple(self._sample(state) for state in states)
        for state, token in zip(states, samples, strict=True):
            state.token = token
        return samples

    def _write(self, state: _Slot, token: int) -> None:
        index, offset = divmod(state.position, self._page_size)
        self._kv[state.page_table[index], offset] = (token, state.owner)
        state.position += 1

    def _sample(self, state: _Slot) -> int:
        """The next token from KV alone: positions [0, position) through the page table."""
        tokens = []
        for position in range(state.position):
            index, offset = divmod(position, self._page_size)
            token, owner = self._kv[state.page_table[index], offset]
            assert owner == state.owner, f"position {position} of {state} belongs to {owner}"
            tokens.append(token)
        return next_token(tokens, state.params.temperature, state.params.seed)
