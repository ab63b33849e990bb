"""Decides what each step runs: every decoding row, then prompt chunks in order of arrival.

Knows numbers only: token ids, slots, page numbers, and `now` as it is told. It does not know
what a token means, what a launch costs, or who waits for the output.
"""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from duetjax.config import InvalidRequest
from duetjax.policy.launch import Launch, Program, RowFlag, SlotParams, StepResult
from duetjax.policy.pages import PageAllocator
from duetjax.policy.request import FinishReason, NewRequest, Request, RequestOutput, TokenLogprob


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes that the compiled programs and the KV pool allow.

    num_pages counts the dummy page 0. num_slots: requests admitted at once (max_num_seqs).
    max_num_batched_tokens: tokens one step computes, a decoding row being one. decode_buckets
    [rows] and prefill_buckets [tokens]: ascending sizes that programs were compiled for.
    deterministic: launches that hold the same for a request whatever runs beside it; see `plan`.
    """

    num_pages: int
    page_size: int
    num_slots: int
    max_model_len: int
    max_num_batched_tokens: int
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    max_prefill_rows: int
    deterministic: bool = False

    def __post_init__(self) -> None:
        assert min(self.page_size, self.num_slots, self.max_prefill_rows) >= 1, self
        assert min(self.num_pages, self.max_model_len) >= 2, self
        assert self.max_num_batched_tokens > self.num_slots, f"no room for prompts: {self}"
        for buckets in (self.decode_buckets, self.prefill_buckets):
            assert list(buckets) == sorted(set(buckets)) != [], f"not ascending: {buckets}"
        assert self.decode_buckets[-1] >= self.num_slots, f"no bucket for a full batch: {self}"
        largest = min(self.max_num_batched_tokens, self.max_prefill_rows * (self.max_model_len - 1))
        assert self.prefill_buckets[-1] >= largest, f"no bucket for {largest} tokens: {self}"

    def num_fed(self, new: NewRequest) -> int:
        """Most tokens of a request that are ever fed, so have KV: all but the last one sampled.

        A request of length L = min(prompt + max_tokens, max_model_len) feeds positions [0, L - 1).
        """
        return min(len(new.prompt) + new.max_tokens, self.max_model_len) - 1

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold the KV of positions [0, num_tokens)."""
        return -(-num_tokens // self.page_size)

    def check(self, new: NewRequest) -> None:
        """Raises `InvalidRequest` for a request that could never run, however idle the engine."""
        if not new.prompt:
            raise InvalidRequest(
                "the prompt has no tokens; give at least one to continue from", param="prompt"
            )
        if new.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens must be at least 1, not {new.max_tokens}", param="max_tokens"
            )
        if len(new.prompt) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(new.prompt)} tokens, but with one token to generate at most"
                f" {self.max_model_len - 1} fit in max_model_len {self.max_model_len}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        needed, usable = self.num_pages_for(self.num_fed(new)), self.num_pages - 1
        if needed > usable:
            raise InvalidRequest(
                f"prompt and max_tokens together need {needed} KV pages of {self.page_size} tokens,"
                f" but there are {usable}; shorten them or give the KV cache more memory",
                param="max_tokens",
            )


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler at one moment: gauges, then counters since the start.

    running: requests with a slot. pages_total: usable pages, the dummy left out. preempted_tokens:
    computed KV that preemption threw away. prompt_tokens: of prompts computed to their end, each
    counted once. steps: plans that launched something. busy_seconds: from plan to last commit.
    """

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    preemptions: int
    preempted_tokens: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    busy_seconds: float


class Scheduler:
    """Continuous batching with chunked prefill: `add` and `abort`, then plan, run, commit, repeat.

    A request goes waiting -> prefilling -> decoding -> gone. Each of the three queues is in order
    of arrival, and whatever decodes is older than whatever prefills, which is older than whatever
    waits: admission and prefill are first come, first served, and preemption takes the youngest.

    Synchronous: all launches of a plan are committed, in order, before `plan` or `abort` is
    called again. The same calls give the same launches.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self._pages = PageAllocator(limits.num_pages)
        self._free_slots = list(range(limits.num_slots))  # a heap: the lowest goes out next
        self._owners: list[Request | None] = [None] * limits.num_slots
        self._live: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._in_flight: deque[Launch] = deque()
        self._sequence = count()
        self._planned_at = 0.0
        self._preemptions = self._preempted_tokens = 0
        self._prompt_tokens = self._generation_tokens = 0
        self._steps = 0
        self._prefilled_last = False
        self._busy_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is live; then, and only then, `plan` has something to run."""
        return bool(self._live)

    def add(self, new: NewRequest) -> None:
        """Queues a request; raises `InvalidRequest` if it can never fit or its id is in use."""
        self.limits.check(new)
        if new.id in self._live:
            raise InvalidRequest(f"request id {new.id!r} is already in use; choose another")
        request = Request(new, next(self._sequence), tokens=list(new.prompt))
        self._live[new.id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Ends a request without output; False if it is not live (unknown or finished)."""
        assert not self._in_flight, f"abort of {request_id!r} with {self._in_flight} in flight"
        request = self._live.get(request_id)
        if request is None:
            return False
        if request.slot is None:
            self._waiting.remove(request)
            del self._live[request_id]
        else:
            self._end(request)
        return True

    def plan(self, now: float) -> tuple[Launch, ...]:
        """The next step: at most one decode launch, then at most one prefill launch.

        Where the limits say deterministic they alternate, and a prefill launch is one chunk of one
        prompt: where a prompt is cut and what it is computed with depend on nobody else.
        """
        assert not self._in_flight, f"plan with {self._in_flight} in flight"
        if self.limits.deterministic:
            launches = self._plan_alternately()
        else:
            decode = self._plan_decode()
            budget = self.limits.max_num_batched_tokens - len(self._decoding)
            prefill = self._plan_prefill(budget, self.limits.max_prefill_rows)
            launches = tuple(launch for launch in (decode, prefill) if launch is not None)
        assert launches or not self.has_work, f"nothing can run: {self.stats()}"
        self._in_flight.extend(launches)
        self._steps += bool(launches)
        self._planned_at = now
        return launches

    def commit(self, launch: Launch, result: StepResult, now: float) -> tuple[RequestOutput, ...]:
        """Takes in a finished launch and what became of its rows."""
        assert self._in_flight, f"commit of {launch}, which was not planned"
        expected = self._in_flight.popleft()
        assert launch == expected, f"commit of {launch} before {expected}"
        assert len(result.tokens) == len(launch.slots), f"{result} for {launch}"
        if launch.program is Program.DECODE:
            outputs = self._commit_decode(launch, result)
        else:
            outputs = self._commit_prefill(launch, result)
        if not self._in_flight:
            self._busy_seconds += now - self._planned_at
        return outputs

    def stats(self) -> Stats:
        """Gauges now and counters since the start."""
        return Stats(
            running=len(self._prefilling) + len(self._decoding),
            waiting=len(self._waiting),
            pages_total=self._pages.num_usable,
            pages_free=self._pages.num_free,
            preemptions=self._preemptions,
            preempted_tokens=self._preempted_tokens,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            busy_seconds=self._busy_seconds,
        )

    def check_integrity(self) -> None:
        """Asserts that pages and slots have one owner each and queues their order; for tests."""
        running = [*self._decoding, *self._prefilling]
        everyone = [*running, *self._waiting]
        order = [request.sequence for request in everyone]
        assert order == sorted(order), f"queues out of order of arrival: {order}"
        assert {r.new.id: r for r in everyone} == self._live, f"lost: {self._live}"
        assert [r for r in self._waiting if r.pages or r.slot is not None] == []
        owned = {r.slot: r for r in running}
        assert owned == {slot: r for slot, r in enumerate(self._owners) if r is not None}
        everything = sorted((*self._free_slots, *(_slot(r) for r in running)))
        assert everything == list(range(self.limits.num_slots)), f"slots: {everything}"
        self._pages.check_integrity(page for r in running for page in r.pages)

    # Planning: decode rows first, prompt chunks in what is left of the budget.

    def _plan_alternately(self) -> tuple[Launch, ...]:
        prefill = None if self._prefilled_last else self._plan_prefill_chunk()
        launch = prefill or self._plan_decode() or self._plan_prefill_chunk()
        self._prefilled_last = launch is not None and launch.program is Program.PREFILL
        return () if launch is None else (launch,)

    def _plan_prefill_chunk(self) -> Launch | None:
        return self._plan_prefill(self.limits.max_num_batched_tokens, max_rows=1)

    def _plan_decode(self) -> Launch | None:
        grown, pages = self._grow_decoding()
        if not self._decoding:
            return None
        slots = tuple(_slot(request) for request in self._decoding)
        return Launch(
            program=Program.DECODE,
            bucket=_smallest(self.limits.decode_buckets, len(slots)),
            slots=slots,
            pages=pages,
            limits=tuple((_slot(r), self._limit(r)) for r in grown),
            wants_top=any(_wants_top(r) for r in self._decoding),
        )

    def _limit(self, request: Request) -> int:
        """First position that the request may not feed: its end, or that of its pages."""
        return min(self.limits.num_fed(request.new), len(request.pages) * self.limits.page_size)

    def _grow_decoding(self) -> tuple[list[Request], tuple[tuple[int, int, int], ...]]:
        """Gives each row whose next token opens a page that page; the oldest rows come first."""
        grown, entries = [], []
        for request in self._decoding.copy():
            if request.num_computed < len(request.pages) * self.limits.page_size:
                continue
            page = self._take_page_for(request)
            if page is None:
                break  # it was the youngest left
            entries.append((_slot(request), len(request.pages), page))
            request.pages.append(page)
            grown.append(request)
        return grown, tuple(entries)

    def _take_page_for(self, request: Request) -> int | None:
        """A page, if need be from the youngest admitted requests; None once that is `request`."""
        while request.slot is not None:
            taken = self._pages.take(1)
            if taken is not None:
                return taken[0]
            self._preempt_youngest()
        return None

    def _preempt_youngest(self) -> None:
        """Sends the youngest admitted request back to wait; its tokens stay, their KV goes.

        Deterministic, its output goes too: decoded again with the same seed it comes out the same,
        while computed as a prompt it would differ in the last bits.
        """
        request = (self._prefilling or self._decoding).pop()
        self._preemptions += 1
        self._preempted_tokens += request.num_computed
        if self.limits.deterministic:
            del request.tokens[len(request.new.prompt) :]
        self._release(request)
        self._waiting.appendleft(request)

    def _plan_prefill(self, budget: int, max_rows: int) -> Launch | None:
        """Chunks of the oldest prompts not computed yet, admitting waiting requests as needed."""
        continuing = len(self._prefilling)
        counts: list[int] = []
        while budget and len(counts) < max_rows:
            if len(counts) == len(self._prefilling) and not self._admit():
                break
            request = self._prefilling[len(counts)]
            counts.append(min(len(request.tokens) - request.num_computed, budget))
            budget -= counts[-1]
        if not counts:
            return None
        return self._prefill_launch(tuple(counts), self._prefilling[continuing:])

    def _admit(self) -> bool:
        """Gives the oldest waiting request a slot and its pages; False if none can have them.

        It gets pages for its known tokens and the one sampled after them (unless that one is its
        last and so never fed): a prefill, once begun, cannot run out of pages.
        """
        if not self._waiting or not self._free_slots:
            return False
        request = self._waiting[0]
        num_tokens = min(len(request.tokens) + 1, self.limits.num_fed(request.new))
        pages = self._pages.take(self.limits.num_pages_for(num_tokens))
        if pages is None:
            return False
        request.pages.extend(pages)
        request.slot = heappop(self._free_slots)
        self._owners[request.slot] = request
        self._prefilling.append(self._waiting.popleft())
        return True

    def _prefill_launch(self, counts: tuple[int, ...], admitted: list[Request]) -> Launch:
        """One row for each of the oldest prefilling requests, its tokens [start, start + count)."""
        rows = self._prefilling[: len(counts)]
        spans = [(r, r.num_computed, r.num_computed + n) for r, n in zip(rows, counts, strict=True)]
        return Launch(
            program=Program.PREFILL,
            bucket=_smallest(self.limits.prefill_buckets, sum(counts)),
            slots=tuple(_slot(r) for r in rows),
            starts=tuple(start for _, start, _ in spans),
            counts=counts,
            tokens=tuple(token for r, start, end in spans for token in r.tokens[start:end]),
            samples=tuple(end == len(r.tokens) for r, _, end in spans),
            admitted=tuple(_slot_params(r) for r in admitted),
            pages=tuple((_slot(r), i, page) for r in admitted for i, page in enumerate(r.pages)),
            limits=tuple((_slot(r), self._limit(r)) for r in admitted),
            wants_top=any(_wants_top(r) for r, _, end in spans if end == len(r.tokens)),
        )

    # Committing: what was sampled joins the tokens; what ends gives everything back.

    def _commit_decode(self, launch: Launch, result: StepResult) -> tuple[RequestOutput, ...]:
        outputs = []
        for row, slot in enumerate(launch.slots):
            request = self._owner(slot)
            request.num_computed += 1
            outputs.append(self._accept(request, row, result))
        return tuple(output for output in outputs if output is not None)

    def _commit_prefill(self, launch: Launch, result: StepResult) -> tuple[RequestOutput, ...]:
        outputs = []
        rows = zip(launch.slots, launch.counts, launch.samples, strict=True)
        for row, (slot, num_tokens, samples) in enumerate(rows):
            request = self._owner(slot)
            request.num_computed += num_tokens
            if samples:
                assert self._prefilling[0] is request, (
                    f"{request.new.id!r} overtook an older prompt"
                )
                self._decoding.append(self._prefilling.pop(0))
                if request.num_output == 0 and not request.num_sent:
                    self._prompt_tokens += len(request.new.prompt)
            if samples or RowFlag.NON_FINITE in result.flags[row]:
                outputs.append(self._accept(request, row, result))
        return tuple(output for output in outputs if output is not None)

    def _accept(self, request: Request, row: int, result: StepResult) -> RequestOutput | None:
        """Appends a row's token and ends the request if that was its last; None if sent before."""
        token, flags = result.tokens[row], result.flags[row]
        if RowFlag.NON_FINITE in flags:
            self._end(request)
            return RequestOutput(request.new.id, (), FinishReason.ERROR)
        assert RowFlag.SAMPLED in flags, f"{request.new.id!r} sampled nothing: {flags!r}"
        request.tokens.append(token)
        finish = None
        if token in request.new.stop_ids:
            finish = FinishReason.STOP
        elif len(request.tokens) > self.limits.num_fed(request.new):
            finish = FinishReason.LENGTH
        stopped = finish is FinishReason.STOP
        assert (RowFlag.STOPPED in flags) == stopped, f"{request.new.id!r}: {token} is {flags!r}"
        assert finish is None or RowFlag.AT_LIMIT in flags or stopped, f"{token} is {flags!r}"
        if finish is not None:
            self._end(request)
        if request.num_output <= request.num_sent:
            assert finish is None, f"{request.new.id!r} ends before what it has sent"
            return None
        request.num_sent = request.num_output
        self._generation_tokens += 1
        return RequestOutput(request.new.id, (token,), finish, _logprobs(request, row, result))

    def _end(self, request: Request) -> None:
        """Forgets an admitted request; its pages and slot are free from here on."""
        queue = self._decoding if request in self._decoding else self._prefilling
        queue.remove(request)
        self._release(request)
        del self._live[request.new.id]

    def _release(self, request: Request) -> None:
        slot = _slot(request)
        self._pages.give_back(request.pages)
        request.pages.clear()
        request.num_computed = 0
        request.slot = None
        self._owners[slot] = None
        heappush(self._free_slots, slot)

    def _owner(self, slot: int) -> Request:
        request = self._owners[slot]
        assert request is not None, f"slot {slot} has no owner"
        return request


def _slot(request: Request) -> int:
    assert request.slot is not None, f"{request.new.id!r} has no slot"
    return request.slot


def _slot_params(request: Request) -> SlotParams:
    sampling, known = request.new.sampling, tuple(request.tokens)
    return SlotParams(
        slot=_slot(request),
        sampling=sampling,
        stop_ids=request.new.stop_ids,
        num_prompt=len(request.new.prompt),
        history=known if sampling.has_penalties else (),
    )


def _wants_top(request: Request) -> bool:
    return bool(request.new.sampling.logprobs)


def _logprobs(request: Request, row: int, result: StepResult) -> tuple[TokenLogprob, ...]:
    wanted = request.new.sampling.logprobs
    if wanted is None:
        return ()
    return (TokenLogprob(result.logprobs[row], result.top[row][:wanted] if wanted else ()),)


def _smallest(buckets: tuple[int, ...], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)
