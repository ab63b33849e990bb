"""A device whose next token a person can compute: a weighted sum of the tokens before it.

It keeps what a device would keep: a row of state per slot, and KV by (page, offset), with a stamp
that says whose token of which position was written there. Nothing happens when a launch is
submitted: its deltas apply when its first step runs, and a step runs when its result is asked for,
so that lanes overtake each other as the asking goes. Before every sample all tokens are read back
through the page table: a wrong page, position, chunk or delta stops the test, and so does a stamp
of somebody else. The i-th of the most likely tokens is always the sampled one plus i, with logprob
-0.5 - i.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from duetjax.policy.launch import Lane, Launch, Program, RowFlag, SlotParams, StepResult, Ticket

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


class ForeignStamp(AssertionError):
    """Two owners' KV or state would have been mixed."""


@dataclass(eq=False)
class SlotState:
    """A slot's owner as the device knows it, and whose stamp its KV bears.

    fed: tokens by position, those found in shared pages included. first: where it began to compute;
    the positions before are in pages that others wrote. token: sampled and not fed yet, None until
    the prompt ends (on the prefill lane: until it is handed over). is_spoiled: a poisonous token
    has been fed.
    """

    params: SlotParams
    page_table: dict[int, int] = field(default_factory=dict)
    limit: int = 0
    fed: list[int] = field(default_factory=list)
    first: int | None = None
    token: int | None = None
    has_stopped: bool = False
    is_spoiled: bool = False

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return len(self.fed)

    @property
    def last(self) -> int | None:
        """The token fed last."""
        return self.fed[-1] if self.fed else None

    @property
    def is_active(self) -> bool:
        """Whether it takes a decoding step."""
        return self.token is not None and not self.has_stopped and self.position < self.limit


@dataclass(frozen=True, slots=True)
class _Stamp:
    writer: SlotState
    position: int


@dataclass(slots=True)
class _Flight:
    """A launch that has not completed; has_begun: its deltas have been applied."""

    launch: Launch
    next_step: int = 0
    has_begun: bool = False


type _Row = tuple[int, RowFlag]
_NOTHING: _Row = (0, RowFlag(0))
_SPOILED: _Row = (0, RowFlag.NON_FINITE)


class FakeExecutor:
    """Implements `runtime.in_order.Device`; steps run when their results are asked for.

    fail_at: the launch whose result raises `DeviceFault`. hold(): from then on results wait for
    release(); `held` is set while one waits. poison(token): from then on the logits after that
    token are not finite. launches: everything submitted, by ticket.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, page_size: int, *, fail_at: int | None = None) -> None:
        self._page_size = page_size
        self._fail_at = fail_at
        self._slots: dict[int, SlotState] = {}
        self._kv: dict[tuple[int, int], _Stamp] = {}  # by (page, offset)
        self._flights: dict[Ticket, _Flight] = {}
        self._handovers: dict[int, tuple[SlotState, Ticket, int]] = {}  # by slot
        self._poisonous: set[int] = set()
        self._lock = threading.Lock()  # launches are submitted while results are waited for
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
        """Takes a launch; none of it happens yet."""
        with self._lock:
            assert launch.ticket == len(self.launches), f"{len(self.launches)} launches: {launch}"
            _check_shape(launch)
            self._check_lanes(launch)
            self._flights[launch.ticket] = _Flight(launch)
            self.launches.append(launch)
        return launch.ticket

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """Runs a step of a launch, once results are released; each once, in order of the lane."""
        if not self._released.is_set():
            self.held.set()
            self._released.wait()
            self.held.clear()
        if ticket == self._fail_at:
            raise DeviceFault(f"launch {ticket}")
        with self._lock:
            flight = self._flights.get(ticket)
            assert flight is not None, f"launch {ticket} is not in flight"
            launch = flight.launch
            assert step == flight.next_step, f"step {step} of {launch}, not {flight.next_step}"
            earlier = [other for other in self._in_flight(launch.lane) if other.ticket < ticket]
            assert earlier == [], f"launch {ticket} of lane {launch.lane} overtakes {earlier}"
            result = self._run(flight)
            flight.next_step += 1
            if flight.next_step == launch.k:
                del self._flights[ticket]
        return result

    def next_token(self, state: SlotState) -> int:
        """What follows the tokens that a slot has fed; they have been read back."""
        sampling = state.params.sampling
        assert sampling.seed is not None, state
        return next_token(state.fed, sampling.temperature, sampling.seed)

    # What a launch may rely on.

    def _in_flight(self, *lanes: Lane) -> list[Launch]:
        launches = [flight.launch for flight in self._flights.values()]
        return [launch for launch in launches if launch.lane in lanes]

    def _check_lanes(self, launch: Launch) -> None:
        split = self._in_flight(Lane.PREFILL, Lane.DECODE)
        beside = self._in_flight(Lane.WHOLE) if launch.lane is not Lane.WHOLE else split
        assert beside == [], f"{launch} cannot run beside {beside}"
        others = [other for other in split if other.lane is not launch.lane]
        for other in others:
            shared = set(launch.slots) & set(other.slots)
            for new in launch.admitted:
                if new.slot in shared:
                    raise ForeignStamp(f"{new} gets a slot that launch {other.ticket} still uses")
            assert not shared, f"slots {shared} of {launch} are in flight on the other lane"
        for slot, ticket in launch.handovers:
            done = ticket < launch.ticket and ticket not in self._flights
            assert done, f"slot {slot} is handed over before launch {ticket} has completed"

    # Effects, at completion.

    def _run(self, flight: _Flight) -> StepResult:
        launch = flight.launch
        if not flight.has_begun:
            self._apply_deltas(launch)
            flight.has_begun = True
        if launch.program is Program.DECODE:
            rows = [self._step(self._decoding(slot, launch)) for slot in launch.slots]
        else:
            rows = self._prefill(launch)
        tokens = tuple(token for token, _ in rows)
        return StepResult(
            tokens=tokens,
            flags=tuple(flags for _, flags in rows),
            logprobs=tuple(-0.5 for _ in rows),
            top=tuple(top_tokens(token, 20, self.vocab_size) for token in tokens)
            if launch.wants_top
            else (),
        )

    def _apply_deltas(self, launch: Launch) -> None:
        named = {slot for slot, *_ in (*launch.pages, *launch.limits, *launch.handovers)}
        named |= {params.slot for params in launch.admitted}
        assert named <= set(launch.slots), f"deltas for {named}, not all rows of {launch}"
        for params in launch.admitted:
            self._slots[params.slot] = SlotState(params)
            self._handovers.pop(params.slot, None)
        for slot, index, page in launch.pages:
            assert page != 0, f"the dummy page was given to slot {slot}"
            table = self._slots[slot].page_table
            assert index == len(table), f"page {index} of slot {slot} comes after {len(table)}"
            table[index] = page
        for slot, limit in launch.limits:
            state = self._slots[slot]
            room = len(state.page_table) * self._page_size
            assert state.position <= limit <= room, f"limit {limit} of {state}"
            state.limit = limit
        for slot, ticket in launch.handovers:
            state, since, token = self._handovers.pop(slot)
            assert (state, since) == (self._slots[slot], ticket), f"slot {slot} of {launch}"
            state.token = token

    def _prefill(self, launch: Launch) -> list[_Row]:
        packed = iter(launch.tokens)
        outcomes = []
        for slot, start, count, samples in zip(
            launch.slots, launch.starts, launch.counts, launch.samples, strict=True
        ):
            if count == 0:
                outcomes.append(self._step(self._decoding(slot, launch)))
                continue
            state = self._slots[slot]
            self._begin(state, start)
            for _ in range(count):
                self._write(state, next(packed))
            if not samples:
                outcomes.append(_SPOILED if state.is_spoiled else _NOTHING)
                continue
            assert state.params.history in ((), tuple(state.fed)), f"the history of {state}"
            token, flags = self._sample(state)
            outcomes.append((token, flags))
            if launch.lane is Lane.PREFILL:
                state.token = None
                if flags & RowFlag.SAMPLED:
                    self._handovers[slot] = (state, launch.ticket, token)
        return outcomes

    def _begin(self, state: SlotState, start: int) -> None:
        """A chunk starts at `start`; a first one finds the tokens before it in shared pages."""
        if state.first is None:
            state.first = start
            for position in range(start):
                stamp = self._stamp(state, position)
                state.fed.append(stamp.writer.fed[stamp.position])
        assert (state.token, state.position) == (None, start), f"{state} fed from {start}"

    def _decoding(self, slot: int, launch: Launch) -> SlotState:
        state = self._slots[slot]
        assert slot not in self._handovers, f"{state} decodes before it is handed over: {launch}"
        assert state.token is not None, f"{state} decodes before its prompt has ended: {launch}"
        return state

    def _step(self, state: SlotState) -> _Row:
        """A decoding step of a row, if it is active."""
        if not state.is_active:
            return _NOTHING
        assert state.token is not None, state
        self._write(state, state.token)
        return self._sample(state)

    def _write(self, state: SlotState, token: int) -> None:
        index, offset = divmod(state.position, self._page_size)
        assert index in state.page_table, f"position {state.position} is beyond the pages: {state}"
        page = state.page_table[index]
        for other in self._owners_in_flight():
            if other is not state and page in other.page_table.values():
                raise ForeignStamp(f"{state} writes page {page}, in flight for {other}")
        self._kv[page, offset] = _Stamp(state, state.position)
        state.fed.append(token)
        state.is_spoiled |= token in self._poisonous

    def _owners_in_flight(self) -> list[SlotState]:
        """Whose page tables launches in flight go by; owners who are still to come have none."""
        owners, coming = [], set()
        for flight in self._flights.values():
            if not flight.has_begun:
                coming |= {params.slot for params in flight.launch.admitted}
            owners += [self._slots[slot] for slot in flight.launch.slots if slot not in coming]
        return owners

    def _stamp(self, state: SlotState, position: int) -> _Stamp:
        """Who wrote what a slot reads at a position: itself or, in a shared page, a twin so far."""
        index, offset = divmod(position, self._page_size)
        stamp = self._kv.get((state.page_table[index], offset))
        assert stamp is not None, f"position {position} of {state} was never written"
        assert state.first is not None, state
        writer, end = stamp.writer, (index + 1) * self._page_size
        if writer is state:
            may_read = position >= state.first
        else:
            is_last = position == end - 1
            equal = not is_last or writer.fed[:position] == state.fed[:position]
            may_read = end <= state.first and equal
        if stamp.position != position or not may_read:
            raise ForeignStamp(f"{state} reads at {position} what was written by {stamp}")
        return stamp

    def _sample(self, state: SlotState) -> _Row:
        """The token after all that a row has fed becomes its next one."""
        for position, token in enumerate(state.fed):
            stamp = self._stamp(state, position)
            if stamp.writer.fed[position] != token:
                raise ForeignStamp(f"{state} reads at {position} what was written by {stamp}")
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


def _check_shape(launch: Launch) -> None:
    """What a launch must be whatever has happened before."""
    rows, decoding = len(launch.slots), len([count for count in launch.counts if count == 0])
    assert len(set(launch.slots)) == rows > 0, launch
    assert launch.k >= 1, launch
    assert (launch.split is None) == (launch.lane is Lane.WHOLE), launch
    if launch.program is Program.DECODE:
        assert launch.lane is not Lane.PREFILL, launch
        assert rows <= launch.bucket, launch
        assert (launch.starts, launch.counts, launch.tokens, launch.samples) == ((),) * 4, launch
        return
    assert launch.lane is not Lane.DECODE, launch
    assert launch.k == 1, launch
    assert (len(launch.starts), len(launch.counts), len(launch.samples)) == (rows,) * 3, launch
    assert sum(launch.counts) == len(launch.tokens) > 0, launch
    assert len(launch.tokens) + decoding <= launch.bucket, launch
    assert launch.counts[:decoding] == (0,) * decoding, f"decoding rows come first: {launch}"
    assert all(launch.samples[:decoding]), f"a decoding row always samples: {launch}"
    assert decoding == 0 or launch.lane is Lane.WHOLE, launch
