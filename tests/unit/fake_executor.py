"""An executor whose next token a person can compute: a weighted sum of the tokens before it.

It keeps what a device would keep: a row of state per slot, and KV as (page, offset) -> what was
written there and for whom. A launch reads every token back through the page table from position
0, so a wrong page, position, chunk or delta changes the tokens or stops the test. The i-th of the
most likely tokens is always the sampled one plus i, with logprob -0.5 - i.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from duetjax.policy.launch import Launch, Program, RowFlag, SlotParams, StepResult, Ticket

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


def top_tokens(token: int, n: int, vocab_size: int = VOCAB_SIZE) -> tuple[tuple[int, float], ...]:
    """The `n` most likely tokens where `token` was sampled, with their logprobs."""
    return tuple(((token + i) % vocab_size, -0.5 - i) for i in range(n))


class DeviceFault(Exception):
    """What a failing device raises here."""


@dataclass
class SlotState:
    """A slot as the device knows it; token: sampled and not fed yet, None until the prompt ends.

    last: the token fed last. is_spoiled: a poisonous token has been fed.
    """

    params: SlotParams
    owner: int
    page_table: dict[int, int] = field(default_factory=dict)
    position: int = 0  # where the next token goes
    limit: int = 0
    token: int | None = None
    has_stopped: bool = False
    last: int | None = None
    is_spoiled: bool = False

    @property
    def is_active(self) -> bool:
        """Whether it takes a decoding step."""
        return self.token is not None and not self.has_stopped and self.position < self.limit


type _Row = tuple[int, RowFlag]
_NOTHING: _Row = (0, RowFlag(0))
_SPOILED: _Row = (0, RowFlag.NON_FINITE)


class FakeExecutor:
    """Implements `policy.launch.Executor`; launches take effect when submitted.

    fail_at: the launch, counted from 0, whose result raises `DeviceFault`. hold(): from then on
    results wait for release(); `held` is set while one waits. poison(token): from then on the
    logits after that token are not finite.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, page_size: int, *, fail_at: int | None = None) -> None:
        self._page_size = page_size
        self._fail_at = fail_at
        self._slots: dict[int, SlotState] = {}
        self._kv: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset): (token, owner)
        self._num_owners = 0
        self._results: dict[Ticket, list[StepResult]] = {}
        self._poisonous: set[int] = set()
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

    def poison(self, token: int) -> None:
        """Whatever follows `token` fails from now on."""
        self._poisonous.add(token)

    def submit(self, launch: Launch) -> Ticket:
        """Runs a launch: deltas, then k times KV writes of all rows and one sample per row."""
        assert len(set(launch.slots)) == len(launch.slots) > 0, launch
        self._apply_deltas(launch)
        if launch.program is Program.DECODE:
            steps = self._decode(launch)
        else:
            steps = [self._prefill(launch)]
        ticket = len(self.launches)
        self.launches.append(launch)
        self._results[ticket] = [self._result(launch, rows) for rows in steps]
        return ticket

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """A step of a launch, once results are released; each once, in order."""
        if not self._released.is_set():
            self.held.set()
            self._released.wait()
            self.held.clear()
        if ticket == self._fail_at:
            raise DeviceFault(f"launch {ticket}")
        steps = self._results[ticket]
        assert len(steps) == self.launches[ticket].k - step, f"step {step} of {ticket} out of order"
        if len(steps) == 1:
            del self._results[ticket]
        return steps.pop(0)

    def next_token(self, state: SlotState) -> int:
        """What follows the tokens read back from the KV of a slot's positions."""
        tokens = []
        for position in range(state.position):
            index, offset = divmod(position, self._page_size)
            token, owner = self._kv[state.page_table[index], offset]
            assert owner == state.owner, f"position {position} of {state} belongs to {owner}"
            tokens.append(token)
        sampling = state.params.sampling
        assert sampling.seed is not None, state
        return next_token(tokens, sampling.temperature, sampling.seed)

    def _apply_deltas(self, launch: Launch) -> None:
        for params in launch.admitted:
            assert params.slot in launch.slots, f"{params} is not a row of {launch}"
            self._slots[params.slot] = SlotState(params, owner=self._num_owners)
            self._num_owners += 1
        for slot, index, page in launch.pages:
            assert slot in launch.slots, f"page for slot {slot}, which is not a row of {launch}"
            assert page != 0, f"the dummy page was given to slot {slot}"
            table = self._slots[slot].page_table
            assert index == len(table), f"page {index} of slot {slot} comes after {len(table)}"
            table[index] = page
        for slot, limit in launch.limits:
            state = self._slots[slot]
            assert slot in launch.slots, f"limit of slot {slot}, which is not a row of {launch}"
            room = len(state.page_table) * self._page_size
            assert state.position <= limit <= room, f"limit {limit} of {state}"
            state.limit = limit

    def _prefill(self, launch: Launch) -> list[_Row]:
        used = sum(max(count, 1) for count in launch.counts)
        assert sum(launch.counts) == len(launch.tokens), launch
        assert (used <= launch.bucket, launch.k) == (True, 1), launch
        rows = list(zip(launch.slots, launch.starts, launch.counts, launch.samples, strict=True))
        packed = iter(launch.tokens)
        outcomes = []
        for slot, start, count, samples in rows:
            state = self._slots[slot]
            if count == 0:
                assert samples, f"a decoding row always samples: {launch}"
                outcomes.append(self._step(state))
                continue
            assert (state.token, state.position) == (None, start), f"{state} fed from {start}"
            for _ in range(count):
                self._write(state, next(packed))
            if samples:
                outcomes.append(self._sample(state))
            else:
                outcomes.append(_SPOILED if state.is_spoiled else _NOTHING)
        return outcomes

    def _decode(self, launch: Launch) -> list[list[_Row]]:
        assert len(launch.slots) <= launch.bucket, launch
        assert launch.k >= 1, launch
        prefill_only = (launch.starts, launch.counts, launch.tokens, launch.samples)
        assert prefill_only == ((), (), (), ()), launch
        states = [self._slots[slot] for slot in launch.slots]
        for state in states:
            assert state.token is not None, f"{state} decodes before its prompt has ended"
        return [[self._step(state) for state in states] for _ in range(launch.k)]

    def _step(self, state: SlotState) -> _Row:
        """A decoding step of a row, if it is active."""
        if not state.is_active:
            return _NOTHING
        assert state.token is not None, state
        self._write(state, state.token)
        return self._sample(state)

    def _write(self, state: SlotState, token: int) -> None:
        index, offset = divmod(state.position, self._page_size)
        self._kv[state.page_table[index], offset] = (token, state.owner)
        state.last = token
        state.is_spoiled |= token in self._poisonous
        state.position += 1

    def _sample(self, state: SlotState) -> _Row:
        """The token after all that a row has fed becomes its next one."""
        if state.is_spoiled:
            state.token, state.has_stopped = 0, True
            return _SPOILED
        state.token = self.next_token(state)
        flags = RowFlag.SAMPLED
        if state.token in state.params.stop_ids:
            state.has_stopped = True
            flags |= RowFlag.STOPPED
        if state.position >= state.limit:
            flags |= RowFlag.AT_LIMIT
        return state.token, flags

    def _result(self, launch: Launch, rows: list[_Row]) -> StepResult:
        assert len(rows) == len(launch.slots), launch
        tokens = tuple(token for token, _ in rows)
        return StepResult(
            tokens=tokens,
            flags=tuple(flags for _, flags in rows),
            logprobs=tuple(-0.5 for _ in rows),
            top=tuple(top_tokens(token, 20, self.vocab_size) for token in tokens)
            if launch.wants_top
            else (),
        )
