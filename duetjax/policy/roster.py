"""Which request is where, and what it holds: a place in line, a slot, KV pages.

A request goes waiting -> prefilling -> (handing over ->) decoding -> gone, one that is constrained
to and fro between decoding and held, and back to waiting when others need its pages. Whoever leaves
while launches in flight name its slot gives slot and pages back when the last of them has
completed.
"""

from collections.abc import Container
from heapq import heappop, heappush
from itertools import chain as joined
from typing import Any

import numpy as np

from duetjax.policy.columns import Batch, Columns, Line
from duetjax.policy.launch import SlotParams, Ticket
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.pages import PagePool
from duetjax.policy.queue import WaitingQueue
from duetjax.policy.request import Permit, Phase, Request, Sampled


class Deltas:
    """What slots' next launches must tell the device.

    pages: who has new ones has a new limit. allowed: who may sample what from now on.
    """

    def __init__(self) -> None:
        self.admitted: dict[int, Request] = {}
        self.pages: dict[int, list[tuple[int, int, int]]] = {}
        self.allowed: dict[int, bytes] = {}
        self.handovers: dict[int, Ticket] = {}

    def forget(self, slot: int) -> None:
        """The slot's owner leaves."""
        for column in (self.admitted, self.pages, self.allowed, self.handovers):
            column.pop(slot, None)

    def take(self, ticket: Ticket, columns: Columns) -> dict[str, Any]:
        """The `Launch` fields that tell the device about launch `ticket`'s slots; told once."""
        if not (self.admitted or self.pages or self.handovers):  # with new masks come new limits
            return {}
        last = columns.ticket.item
        admitted = [slot for slot in self.admitted if last(slot) == ticket]
        extended = [slot for slot in self.pages if last(slot) == ticket]
        masked = [slot for slot in self.allowed if last(slot) == ticket]
        handovers = [slot for slot in self.handovers if last(slot) == ticket]
        pages = joined.from_iterable([self.pages.pop(slot) for slot in extended])
        return {
            "admitted": tuple([_slot_params(self.admitted.pop(slot)) for slot in admitted]),
            "pages": tuple(pages),
            "limits": tuple([(slot, columns.limit(slot)) for slot in extended]),
            "allowed": tuple([(slot, self.allowed.pop(slot)) for slot in masked]),
            "handovers": tuple([(slot, self.handovers.pop(slot)) for slot in handovers]),
        }


class Roster:
    """Admits, grows, preempts and dismisses requests.

    in_flight: tickets of launches that have not completed. Victims of preemption are the last in
    rank. sampled: what constrained requests have sampled, for whoever issues permits.
    """

    def __init__(self, limits: SchedulerLimits, in_flight: Container[Ticket]) -> None:
        self.limits = limits
        self.columns = Columns(limits.num_slots, limits.max_model_len)
        self.pool = PagePool(limits.num_pages, prefix_caching=limits.prefix_caching)
        self.queue = WaitingQueue()
        self.deltas = Deltas()
        self.live: dict[str, Request] = {}
        self.prefilling, self.handing_over = Line(), Line()
        self.decoding, self.held, self.ending = Line(), Line(), Line()
        self.sampled: list[Sampled] = []
        self.preemptions = self.preempted_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        self.starved = 0
        self._in_flight = in_flight
        self._free_slots = list(range(limits.num_slots))  # a heap: the lowest goes out next
        self._leaving: dict[Ticket, list[Request]] = {}
        self._lines = {
            Phase.PREFILLING: self.prefilling,
            Phase.HANDING_OVER: self.handing_over,
            Phase.DECODING: self.decoding,
            Phase.HELD: self.held,
            Phase.ENDING: self.ending,
        }

    @property
    def num_running(self) -> int:
        """Requests that are being computed."""
        return sum(map(len, self._lines.values()))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of admitted prompts that no launch has taken yet."""
        return sum(self.num_unplanned(request) for request in self.prefilling)

    def unplanned(self, request: Request) -> tuple[int, int]:
        """What no launch has taken yet of a prefilling request: its first token, and how many."""
        slot = slot_of(request)
        start = self.columns.planned.item(slot)
        return start, self.columns.length.item(slot) - start

    def num_unplanned(self, request: Request) -> int:
        """Known tokens of a prefilling request that no launch has taken yet."""
        return self.unplanned(request)[1]

    def add(self, request: Request) -> None:
        """A new request joins the line."""
        self.live[request.new.id] = request
        request.learn_keys(request.known, self.limits.page_size)
        self.queue.add(request)

    # Admission.

    def admit(self, goal: int) -> None:
        """Admits in order of rank until `goal` prompt tokens are there to be computed.

        A request gets pages for its known tokens and the one sampled after them (unless that one
        is never fed): a prefill, once begun, cannot run out of pages. Its first pages may be found
        in the prefix cache, but its last token is always computed, in a page of its own.
        """
        missing = goal - self.prompt_tokens
        while missing > 0 and self._free_slots:
            request = self.queue.first()
            if request is None or request.slot is not None:  # its last launches are still running
                return
            before = len(self.prefilling)
            if not self._admit(request):
                return
            if len(self.prefilling) > before:
                missing -= self.num_unplanned(request)

    def _admit(self, request: Request) -> bool:
        """Admits the first in line, or sets it aside for a twin; False if there are no pages."""
        limits, pool, size = self.limits, self.pool, self.limits.page_size
        if limits.deterministic and len(request.known) > len(request.new.prompt):
            request.restart()
            if request.new.constraint is not None:
                self.sampled.append((request.new.id, None))
        if not request.is_permitted(len(request.known)):
            return False
        request.learn_keys(request.known, size)
        keys = request.keys[: _most_shared(len(request.known), size)]
        chain = pool.cache.match(request.new.cache_salt, keys) if limits.prefix_caching else []
        if limits.prefix_caching and len(chain) < len(keys):
            twin = (chain[-1] if chain else request.new.cache_salt, keys[len(chain)])
            if self.queue.put_off_first(twin):
                return True
        if limits.deterministic:
            del chain[len(chain) - len(chain) % limits.pages_per_chunk :]
        num_tokens = min(len(request.known) + 1, limits.num_fed(request.new))
        wanted = limits.num_pages_for(num_tokens)
        idle = sum(node.num_users == 0 for node in chain)
        if wanted - len(chain) > pool.num_available - idle:
            return False
        pool.cache.use(chain)
        taken = pool.take(wanted - len(chain))
        assert taken is not None, f"{wanted} pages counted, then gone"
        request.chain, request.pages = chain, [*(node.page for node in chain), *taken]
        self._open(self.queue.pop())
        return True

    def _open(self, request: Request) -> None:
        """Gives an admitted request, which has its pages, a slot."""
        slot = request.slot = heappop(self._free_slots)
        cached, room = (len(p) * self.limits.page_size for p in (request.chain, request.pages))
        end = self.limits.num_fed(request.new)
        self.columns.open(slot, request.known, computed=cached, end=end, room=room)
        self.deltas.admitted[slot] = request
        self.deltas.pages[slot] = [(slot, i, page) for i, page in enumerate(request.pages)]
        if request.permit is not None:
            self._permit(request, request.permit)
        if request.num_cached is None:
            request.num_cached = cached
        self.prefix_queries += len(request.known)
        self.prefix_hits += cached
        self._line_up(request, Phase.PREFILLING)
        self._announce(request)

    # Decoding rows and their room.

    def reserve(self, k: int, *, may_preempt: bool) -> None:
        """Gives each decoding row room for k more steps, or as much as there is.

        starved: how many have no room for a single one. They wait for pages in quarantine; if there
        are none and `may_preempt`, the last in rank gives up its own.
        """
        batch = self.decoding.batch()
        rows, missing = self.columns.missing_room(batch.slots, k)
        wanted = [-(-tokens // self.limits.page_size) for tokens in missing]
        taken = self.pool.take(sum(wanted))
        self.starved = 0
        for row, count in zip(rows, wanted, strict=True):
            request = batch.requests[row]
            if taken is not None:
                self._extend(request, taken[:count])
                del taken[:count]
            elif request.phase is Phase.DECODING:  # not preempted for the sake of one before it
                self.starved += not self._grow(request, count, may_preempt)

    def ready(self, k: int) -> tuple[Batch, int]:
        """The decoding rows that can take a step, and the most, up to k, that one of them can.

        Their `planned` moves on: they are as good as launched. Those with no step left to plan
        are ENDING.
        """
        columns, batch = self.columns, self.decoding.batch()
        most = 1
        if k == 1 and not self.starved:
            planned = columns.planned[batch.slots] + 1
        else:
            steps = columns.steps(batch.slots, k)
            if not steps.all():
                kept = steps > 0
                batch, steps = batch.kept(kept), steps[kept]
            most = int(steps.max(initial=0))
            planned = columns.planned[batch.slots] + steps
        columns.planned[batch.slots] = planned
        for row in (planned == columns.leash[batch.slots]).nonzero()[0].tolist():
            self._go_on(batch.requests[row])
        return batch, most

    def steps_to_spare(self) -> int:
        """Steps that all decoding rows can take before one of them takes its last, or waits."""
        columns, slots = self.columns, self.decoding.batch().slots
        planned = columns.planned[slots]
        most = int((columns.leash[slots] - planned).min()) - 1
        size = self.limits.page_size
        if len(slots) * -(-most // size) > self.pool.num_available:
            most = min(most, int((columns.room[slots] - planned).min()))
        return most

    def skip(self, count: int) -> None:
        """All decoding rows have taken so many more steps, and sampled token 0 in each."""
        self.reserve(count, may_preempt=False)
        columns, slots = self.columns, self.decoding.batch().slots
        length = columns.length[slots]
        columns.tokens[slots[:, None], length[:, None] + np.arange(count)] = 0
        columns.length[slots] = length + count
        columns.computed[slots] += count
        columns.planned[slots] += count

    def _grow(self, request: Request, count: int, may_preempt: bool) -> bool:
        """Up to `count` more pages where there are not enough for everybody; False if starved."""
        slot, columns = slot_of(request), self.columns
        while True:
            taken = self.pool.take(min(count, self.pool.num_available)) or []
            if taken:
                self._extend(request, taken)
                return True
            if columns.planned[slot] < columns.room[slot]:
                return True
            if not may_preempt or self.pool.is_draining:
                return False
            victim = self._last()
            self._preempt(victim)
            if victim is request:
                return True

    def _extend(self, request: Request, taken: list[int]) -> None:
        slot, first = slot_of(request), len(request.pages)
        request.pages += taken
        self.columns.room[slot] = len(request.pages) * self.limits.page_size
        entries = self.deltas.pages.setdefault(slot, [])
        entries += [(slot, first + i, page) for i, page in enumerate(taken)]

    def _last(self) -> Request:
        """Who is preempted first; who is ending would give little."""
        lines = (self.prefilling, self.handing_over, self.decoding, self.held)
        lasts = [line.last for line in lines]
        return max((some for some in lasts if some), key=lambda request: request.rank)

    def _preempt(self, request: Request) -> None:
        """Sends a request back to its place in line; its tokens stay, its KV goes.

        What launches in flight still sample for it is taken. Deterministic, its output goes too
        (`Request.restart`).
        """
        self.preemptions += 1
        self.preempted_tokens += int(self.columns.computed[slot_of(request)])
        self._lines[request.phase].remove(request)
        request.phase = Phase.WAITING
        self.queue.add(request)
        self._leave(request)

    # From prefill to decode.

    def prompt_planned(self, request: Request, *, decodes_next: bool) -> None:
        """The last chunk of a prompt is in a launch; after it the slot's token is its own."""
        if decodes_next:
            self._go_on(request)
        else:
            self._move(request, Phase.HANDING_OVER)

    def hand_over(self, request: Request, ticket: Ticket) -> None:
        """Its prompt has been computed on the prefill lane, by launch `ticket`, now complete."""
        self.deltas.handovers[slot_of(request)] = ticket
        self._go_on(request)

    @property
    def has_handed_over(self) -> bool:
        """Whether a decoding row waits for its first step since its prompt was computed."""
        handovers = self.deltas.handovers
        return bool(handovers) and any(r.slot in handovers for r in self.decoding)

    def _go_on(self, request: Request) -> None:
        """All that is planned of it is its own to feed; to what comes next."""
        columns, slot = self.columns, slot_of(request)
        planned = columns.planned.item(slot)
        if planned < columns.leash.item(slot):
            self._move(request, Phase.DECODING)
        else:
            at_end = planned == columns.end.item(slot)
            self._move(request, Phase.ENDING if at_end else Phase.HELD)

    # What constrained requests may sample.

    @property
    def awaits_permits(self) -> bool:
        """Whether anybody runs, or would be admitted, but for a permit."""
        first = self.queue.first()
        return bool(self.held) or (first is not None and not first.is_permitted(len(first.known)))

    def permit(self, permit: Permit) -> None:
        """What a request may sample next; of no effect once it has ended."""
        request = self.live.get(permit.id)
        if request is None:
            return
        request.permit = permit
        if request.phase is Phase.HELD and request.is_permitted(
            self.columns.length.item(slot_of(request))
        ):
            self._permit(request, permit)
            self._go_on(request)

    def _permit(self, request: Request, permit: Permit) -> None:
        """Tells the device with the request's next launch."""
        columns, slot = self.columns, slot_of(request)
        self.deltas.allowed[slot] = permit.mask
        columns.leash[slot] = columns.end[slot]
        if permit.steps is not None:
            most = len(request.new.prompt) + permit.at + permit.steps - 1
            columns.leash[slot] = min(most, columns.end.item(slot))
        self.deltas.pages.setdefault(slot, [])

    def _move(self, request: Request, phase: Phase) -> None:
        self._lines[request.phase].remove(request)
        self._line_up(request, phase)

    def _line_up(self, request: Request, phase: Phase) -> None:
        request.phase = phase
        self._lines[phase].add(request)

    # Prefix cache.

    def publish(self, request: Request) -> None:
        """Lets others find the pages that committed launches have filled.

        Those of a prompt as they come, those of the output when the request leaves.
        """
        if not request.pages:
            return  # preempted since
        size, slot, known = self.limits.page_size, slot_of(request), len(request.chain)
        full = self.columns.computed.item(slot) // size
        if self.limits.deterministic:  # decoding writes other last bits than prefilling
            full = min(full, len(request.new.prompt) // size)
        if full <= known or not self.limits.prefix_caching:
            return
        self._unannounce(request)
        request.learn_keys(self.columns.known(slot), size)
        keys, pages = request.keys[known:full], request.pages[known:full]
        self.pool.publish(request.chain, request.new.cache_salt, keys, pages)
        self._announce(request)

    def _announce(self, request: Request) -> None:
        """Tells the queue which page of its prompt a request computes next."""
        known = len(request.chain)
        num_full = len(request.new.prompt) // self.limits.page_size
        if self.limits.prefix_caching and known < num_full:
            before = request.chain[-1] if known else request.new.cache_salt
            twin = (before, request.keys[known])
            if self.queue.computing(twin):
                request.twin = twin

    def _unannounce(self, request: Request) -> None:
        if request.twin is not None:
            self.queue.computed(request.twin)
            request.twin = None

    # Leaving.

    def end(self, request: Request) -> None:
        """Forgets a request in any phase."""
        del self.live[request.new.id]
        if request.slot is not None:
            self.columns.takes[request.slot] = False
        if request.phase is Phase.WAITING:
            self.queue.forget(request)
        else:
            self._lines[request.phase].remove(request)
            self._leave(request)
        request.phase = Phase.ENDED

    def complete(self, ticket: Ticket) -> None:
        """A launch has ended: what waited for it is free."""
        self.pool.complete(ticket)
        for request in self._leaving.pop(ticket, ()):
            self._free_slot(request)

    def _leave(self, request: Request) -> None:
        """Gives pages and slot back, as soon as no launch in flight can write them."""
        slot = slot_of(request)
        ticket: Ticket | None = self.columns.ticket.item(slot)
        if ticket not in self._in_flight:
            ticket = None
        self.publish(request)
        self._unannounce(request)
        request.num_launches += self.columns.launches.item(slot)
        self.deltas.forget(slot)
        self.pool.give_back(request.pages, request.chain, ticket)
        request.pages, request.chain = [], []
        if ticket is None:
            self._free_slot(request)
        else:
            self._leaving.setdefault(ticket, []).append(request)

    def _free_slot(self, request: Request) -> None:
        slot = slot_of(request)
        if request.phase is Phase.WAITING:
            request.known = self.columns.known(slot).copy()
        self.columns.takes[slot] = False
        request.slot = None
        heappush(self._free_slots, slot)

    def check_integrity(self) -> None:
        """Asserts that pages and slots have one owner each and lists their order; for tests."""
        running = [request for line in self._lines.values() for request in line]
        for phase, line in self._lines.items():
            ranks = [request.rank for request in line]
            assert ranks == sorted(ranks), f"out of order: {ranks}"
            assert all(request.phase is phase for request in line), f"not {phase}: {line}"
        waiting = self.queue.waiting()
        assert len(waiting) == len(self.queue), f"{len(self.queue)} counted, waiting: {waiting}"
        everyone = {request.new.id: request for request in (*running, *waiting)}
        assert everyone == self.live, f"lost: {self.live.keys() ^ everyone.keys()}"
        leaving = [request for some in self._leaving.values() for request in some]
        assert [r for r in waiting if r.pages or (r.slot is not None and r not in leaving)] == []
        slots = [slot_of(request) for request in (*running, *leaving)]
        everything = sorted((*self._free_slots, *slots))
        assert everything == list(range(self.limits.num_slots)), f"slots: {everything}"
        self.pool.check_integrity((request.pages, request.chain) for request in running)


def _most_shared(num_tokens: int, page_size: int) -> int:
    """Pages of a request that others may have computed: its last token must be fed, to go on."""
    return (num_tokens - 1) // page_size


def slot_of(request: Request) -> int:
    """The slot of a request that has one."""
    assert request.slot is not None, f"{request.new.id!r} has no slot"
    return request.slot


def _slot_params(request: Request) -> SlotParams:
    sampling = request.new.sampling
    return SlotParams(
        slot=slot_of(request),
        sampling=sampling,
        stop_ids=request.new.stop_ids,
        num_prompt=len(request.new.prompt),
        history=tuple(request.known.tolist()) if sampling.has_penalties else (),
    )
