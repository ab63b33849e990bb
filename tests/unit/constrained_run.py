"""A scheduler, a device that keeps to masks, and who issues permits, in one loop.

A constraint here is a text: "one 7" issues a permit for each token, "some 7" now and then for
several, "free 7" one for all, "fails 3" has none for the fourth token. What a permit says depends
on all tokens before it, so that a token under another mask than its own makes another answer. The
loop does what the engine's thread does, and only when that would wake: whoever waits then waits for
ever.
"""

import random
from collections import Counter, deque
from functools import cache

import numpy as np
from fake_executor import VOCAB_SIZE, FakeExecutor, next_token
from scheduler_run import Run

from duetjax.policy.launch import Lane, Split
from duetjax.policy.policies import Aggregate, Duet
from duetjax.policy.request import Constraint, FinishReason, Permit

_CLASSES = 97  # of tokens; a mask has one of them


@cache
def ids_of(mask):
    """Token ids that a mask has."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return tuple(bits.nonzero()[0].tolist())


@cache
def _mask(remainder):
    bits = np.zeros(32 * -(-VOCAB_SIZE // 32), np.uint8)
    bits[remainder:VOCAB_SIZE:_CLASSES] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def chosen(mask, token):
    """What is sampled under a mask where it would be `token` without."""
    return ids_of(mask)[token % len(ids_of(mask))] if mask else token


def permit_for(request_id, constraint, tokens):
    """What may come behind so many tokens of an answer."""
    kind, number = constraint.grammar.split()
    at = len(tokens)
    if kind == "fails" and at == int(number):
        return Permit(request_id, at, error="no way on")
    dice = random.Random(f"{constraint.grammar} {at} {sum(tokens)}")
    mask = _mask(dice.randrange(_CLASSES))
    if kind != "some":
        return Permit(request_id, at, mask, None if kind == "free" else 1)
    steps = dice.choice((1, 1, 1, 2, 3, 5, 16, None))
    return Permit(request_id, at, mask if dice.random() < 0.7 else b"", steps)


def constrained_answer(new, max_model_len):
    """What a request must generate, however it is scheduled, and why it ends."""
    length = min(new.max_tokens, max_model_len - len(new.prompt))
    tokens, mask, until = [], b"", 0 if new.constraint is not None else None
    while len(tokens) < length:
        if until is not None and len(tokens) >= until:
            permit = permit_for(new.id, new.constraint, tokens)
            if permit.error:
                return tuple(tokens), FinishReason.CONSTRAINT
            mask = permit.mask
            until = None if permit.steps is None else permit.at + permit.steps
        free = next_token((*new.prompt, *tokens), new.sampling.temperature, new.sampling.seed)
        tokens.append(chosen(mask, free))
        if tokens[-1] in new.stop_ids:
            return tuple(tokens), FinishReason.STOP
    return tuple(tokens), FinishReason.LENGTH


class MaskedExecutor(FakeExecutor):
    """Samples what masks allow; a slot's new owner may sample anything.

    wait: called before each result with how many there were before it.
    """

    def __init__(self, page_size):
        super().__init__(page_size)
        self.wait = lambda count: None
        self._num_results = 0
        self._masks = {}

    def result(self, ticket, step=0):
        self.wait(self._num_results)
        self._num_results += 1
        return super().result(ticket, step)

    def fail(self):
        """The next launch to end fails."""
        with self._lock:
            self._fail_at = min(self._flights, default=len(self.launches))

    def next_token(self, state):
        return chosen(self._masks.get(state.params.slot, b""), super().next_token(state))

    def _apply_deltas(self, launch):
        super()._apply_deltas(launch)
        for params in launch.admitted:
            self._masks.pop(params.slot, None)
        for slot, mask in launch.allowed:
            assert slot in launch.slots, f"a mask for slot {slot}, which is no row of {launch}"
            self._masks[slot] = mask


class Issuer:
    """Answers what an engine's `Permits` is asked; whoever drives it takes the answers in order.

    came: what is to be delivered. restarts: how often an answer began anew.
    """

    def __init__(self):
        self.came = deque()
        self.restarts = 0
        self._followed = {}  # by id: its constraint, tokens and permit

    @property
    def num_followed(self):
        """Requests that have begun and not ended."""
        return len(self._followed)

    def begin(self, request_id, constraint):
        self._say(request_id, constraint, [])

    def sampled(self, request_id, token):
        if request_id not in self._followed:
            self.came.append(None)
            return
        constraint, tokens, permit = self._followed[request_id]
        if token is None:
            self.restarts += 1
            self._say(request_id, constraint, [])
            return
        until = None if permit.steps is None else permit.at + permit.steps
        assert until is None or len(tokens) < until, f"{request_id} goes beyond {permit}"
        assert not permit.mask or token in ids_of(permit.mask), f"{token} of {request_id}"
        tokens.append(token)
        if len(tokens) == until:
            self._say(request_id, constraint, tokens)
        else:
            self.came.append(None)

    def end(self, request_id):
        self._followed.pop(request_id, None)
        self.came.append(None)

    def _say(self, request_id, constraint, tokens):
        permit = permit_for(request_id, constraint, tokens)
        self._followed[request_id] = constraint, tokens, permit
        self.came.append(permit)


class Fickle:
    """Shares the device differently each time it is asked."""

    def __init__(self, dice, budget):
        self._dice, self._budget = dice, budget

    def decide(self, load):
        dice, k = self._dice, self._dice.randint(1, 16)
        if load.rows and load.prompt_tokens and dice.random() < 0.5:
            return Duet(Split(1, 1), k, dice.randint(1, self._budget))
        decodes = dice.random() < 0.8 or not load.prompt_tokens
        return Aggregate(self._budget, decodes=decodes, k=k)


class ConstrainedRun(Run):
    """Requests whose answers may be constrained; permits come when they are delivered.

    happened: how often what could go wrong did.
    """

    def __init__(self, bounds, policy=None, *, delays=None):
        super().__init__(bounds, policy)
        self.executor = MaskedExecutor(bounds.page_size)
        self.issuer = Issuer()
        self.happened = Counter()
        self._delays = delays  # a `random.Random`; None: permits come at once
        self._unpermitted = {}
        self._ended = []

    def add(self, *news):
        for new in news:
            if new.constraint is None:
                super().add(new)
                continue
            self.added[new.id], self.tokens[new.id] = new, ()
            self._unpermitted[new.id] = new
            self.issuer.begin(new.id, new.constraint)
        return self.settle()

    def abort(self, request_id):
        if self._unpermitted.pop(request_id, None) is not None:
            self.happened["aborted before the first permit"] += 1
            self.aborted.add(request_id)
            self.issuer.end(request_id)
            return True
        held = [request.new.id for request in self.scheduler._roster.held]
        was_live = super().abort(request_id)
        if was_live and self.added[request_id].constraint is not None:
            self.happened["aborted while held" if request_id in held else "aborted"] += 1
            self.issuer.end(request_id)
        self.settle()
        return was_live

    def plan(self):
        held = [request.new.id for request in self.scheduler._roster.held]
        launches = super().plan()
        self._tell()  # whoever was admitted may have begun anew
        may_wake = self.scheduler.num_in_flight or self.issuer.came
        assert may_wake or not self.scheduler.has_work, f"waits for ever: {self.stats}"
        self.settle()
        waiting = [request.new.id for request in self.scheduler._roster.queue.waiting()]
        self.happened["preempted while held"] += len({*held} & {*waiting})
        self.happened["long permits at work"] += any(launch.k > 1 for launch in launches)
        self.happened["handovers"] += sum(len(launch.handovers) for launch in launches)
        return launches

    def finish_step(self, lane=Lane.WHOLE):
        outputs = super().finish_step(lane)
        self.settle()
        return outputs

    def take(self, output):
        super().take(output)
        if output.finish is not None:
            self._ended.append(output.id)

    def settle(self):
        """Tells who issues permits what has happened; takes in those that come at once."""
        self._tell()
        while self.issuer.came and self._delays is None:
            self.deliver()
        return self

    def deliver(self, count=1):
        """The next permits come."""
        for _ in range(min(count, len(self.issuer.came))):
            permit = self.issuer.came.popleft()
            if permit is not None:
                self._permit(permit)
        self.scheduler.check_integrity()
        self._tell()

    def _tell(self):
        for request_id, token in self.scheduler.take_sampled():
            self.issuer.sampled(request_id, token)
        for request_id in self._ended:
            if self.added[request_id].constraint is not None:
                self.issuer.end(request_id)
        self._ended.clear()

    def _permit(self, permit):
        new = self._unpermitted.pop(permit.id, None)
        if permit.error:
            if new is not None or self.scheduler.abort(permit.id):
                self.finished[permit.id] = FinishReason.CONSTRAINT
                self._ended.append(permit.id)
                self.happened["errors"] += 1
            else:
                self.happened["permits for nobody"] += 1
        elif new is not None:
            self.scheduler.add(new, self.now, permit)
        else:
            self.happened["permits for nobody"] += permit.id in (self.finished | {}) or (
                permit.id in self.aborted
            )
            self.scheduler.permit(permit)

    # Loops.

    def random_turn(self, draw):
        self.plan()
        for _ in range(draw.randint(0, 4)):
            if lanes := self.lanes_in_flight():
                self.finish_step(draw.choice(lanes))
        self.deliver(draw.randint(0, 3))
        self.now += 1.0

    def finish(self, draw=None):
        for _ in range(6_000):
            if not (self.scheduler.has_work or self.lanes_in_flight() or self._unpermitted):
                break
            if draw is None:
                self.turn()
                self.deliver()
            else:
                self.random_turn(draw)
        self.check_end()
        return self

    def check_answers(self):
        for request_id, new in self.added.items():
            tokens, finish = constrained_answer(new, self.bounds.max_model_len)
            said = self.tokens[request_id]
            if request_id in self.aborted:
                assert said == tokens[: len(said)], request_id
            else:
                assert (said, self.finished.get(request_id)) == (tokens, finish), request_id


def constraint(text):
    """See the module; None for a plain request."""
    return None if text is None else Constraint(text)
