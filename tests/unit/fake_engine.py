"""A real engine on a device whose output a person can write down: the alphabet.

After a letter comes the next one, after "z" comes "<|end|>", after anything else "a". With a
temperature the steps are 1 + seed % 5 letters long, wrapping at "z". A token that is not allowed
(a bias of -100, or a stop id before min_tokens) becomes "a"; a bias of 100 makes its token the only
one. Token ids are those of `write_tokenizer`: one token per byte, so a text's tokens are its UTF-8
bytes. Logprobs are those of `fake_executor.top_tokens`. Where a test dictates answers, they are
nothing but what it says. Constraints are taken and not kept to.
"""

import threading
import time
from collections.abc import Callable

from fake_executor import FakeExecutor, SlotState

from duetjax.engine import EngineClient
from duetjax.policy.durations import Durations
from duetjax.policy.flights import Pace
from duetjax.policy.launch import StepResult, Ticket
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.request import Constraint, NewRequest, Permit
from duetjax.policy.scheduler import Scheduler
from duetjax.runtime.in_order import InOrder

END = 256
VOCAB_SIZE = 260
PAGE_SIZE = 16
PATIENCE = 60.0  # seconds after which a condition that should come true has failed


def next_token(token: int, temperature: float = 0.0, seed: int = 0) -> int:
    """The token after `token`."""
    if not ord("a") <= token <= ord("z"):
        return ord("a")
    if temperature > 0:
        return ord("a") + (token - ord("a") + 1 + seed % 5) % 26
    return END if token == ord("z") else token + 1


def continuation(prompt: str, n: int, temperature: float = 0.0, seed: int = 0) -> str:
    """The text of the `n` tokens after `prompt`, as long as "<|end|>" is not among them."""
    tokens = [prompt.encode()[-1]]
    for _ in range(n):
        tokens.append(next_token(tokens[-1], temperature, seed))
    return bytes(tokens[1:]).decode()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Returns as soon as `condition` holds; fails the test if it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE} s: {what}"
        time.sleep(0.002)


class AlphabetExecutor(FakeExecutor):
    """Implements `in_order.Device`.

    `hold()` makes results wait, `step(n)` lets n of them through, `release()` all;
    `break_down()` makes the next one raise. `say(*texts)` dictates the answers to whoever begins.
    num_waiting: results that wait now, 0 or 1.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        super().__init__(PAGE_SIZE)
        self._gate = threading.Condition()
        self._allowed: float = float("inf")
        self._broken = False
        self._texts: tuple[bytes, ...] = ()
        self.num_waiting = 0

    def hold(self) -> None:
        """Results wait from now on."""
        with self._gate:
            self._allowed = 0

    def step(self, n: float) -> None:
        """Lets `n` held results through."""
        with self._gate:
            self._allowed += n
            self._gate.notify_all()

    def release(self) -> None:
        """Lets all results through."""
        self.step(float("inf"))

    def break_down(self) -> None:
        """The next result raises."""
        with self._gate:
            self._broken = True
            self._allowed = float("inf")
            self._gate.notify_all()

    def say(self, *texts: str) -> None:
        """Answers are these texts, by seed, and "<|end|>"; without a text they are the alphabet."""
        self._texts = tuple(text.encode() for text in texts)

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """A launch's samples, once the gate lets them through."""
        with self._gate:
            self.num_waiting += 1
            self._gate.wait_for(lambda: self._allowed >= 1)
            self.num_waiting -= 1
            self._allowed -= 1
            if self._broken:
                raise RuntimeError("the device broke down, as the test asked")
        return super().result(ticket, step)

    def next_token(self, state: SlotState) -> int:
        """The letter after the last token, as far as the parameters allow it."""
        params, sampling = state.params, state.params.sampling
        assert None not in (state.last, sampling.seed), state
        if self._texts:
            text = self._texts[sampling.seed % len(self._texts)]
            return (*text, END)[min(state.position - params.num_prompt, len(text))]
        forced = [token for token, bias in sampling.biases if bias == 100]
        if forced:
            return forced[0]
        banned = {token for token, bias in sampling.biases if bias == -100}
        if state.position < params.num_prompt + sampling.min_tokens:
            banned |= set(params.stop_ids)
        token = next_token(state.last, sampling.temperature, sampling.seed)
        return ord("a") if token in banned else token


class OpenPermits:
    """Implements `engine.Permits`: any token, and from `fail(...)` on a fault after some tokens."""

    is_idle = True

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._most: float = float("inf")

    def fail(self, after: float = 0) -> None:
        """Who begins from now on goes no further than `after` tokens; infinity is for ever."""
        self._most = after

    def start(self, deliver: Callable[[Permit | None], None]) -> None:
        """See `engine.Permits`."""
        self._deliver = deliver

    def begin(self, request_id: str, constraint: Constraint) -> None:
        """See `engine.Permits`."""
        self._counts[request_id] = 0
        self._deliver(self._permit(request_id) or Permit(request_id, 0, steps=None))

    def sampled(self, request_id: str, token: int | None) -> None:
        """See `engine.Permits`."""
        if request_id in self._counts:
            self._counts[request_id] = 0 if token is None else self._counts[request_id] + 1
            self._deliver(self._permit(request_id))

    def end(self, request_id: str) -> None:
        """See `engine.Permits`."""
        self._counts.pop(request_id, None)

    def close(self) -> None:
        """See `engine.Permits`."""

    def _permit(self, request_id: str) -> Permit | None:
        count = self._counts[request_id]
        return Permit(request_id, count, error="as the test asked") if count >= self._most else None


class FakeEngine(EngineClient):
    """The real engine over `executor`; it remembers what was asked of it.

    durations: who foretells its launches. requests: those of `submitted`, whole. expired: aborted
    unless they had begun.
    """

    def __init__(
        self,
        *,
        num_slots: int = 32,
        num_pages: int = 513,
        max_len: int = 256,
        durations: Durations | None = None,
    ) -> None:
        self.executor = AlphabetExecutor()
        self.permits = OpenPermits()
        self.submitted: list[str] = []
        self.requests: list[NewRequest] = []
        self.aborted: list[str] = []
        self.expired: list[str] = []
        rows = [2**i for i in range(1, 8) if 2 ** (i - 1) < max(2, num_slots)]
        limits = SchedulerLimits(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            num_slots=num_slots,
            max_model_len=max_len,
            max_num_batched_tokens=num_slots + 64,
            decode_buckets=tuple(rows),
            prefill_buckets=(num_slots + 64,),
        )
        scheduler = Scheduler(limits, pace=Pace(durations))
        device = InOrder(self.executor)
        super().__init__(scheduler, device, vocab_size=VOCAB_SIZE, permits=self.permits)

    def submit(self, new: NewRequest) -> None:
        """Passes on and remembers."""
        super().submit(new)
        self.submitted.append(new.id)
        self.requests.append(new)

    def abort(self, request_id: str, *, unless_begun: bool = False) -> None:
        """Passes on and remembers."""
        (self.expired if unless_begun else self.aborted).append(request_id)
        super().abort(request_id, unless_begun=unless_begun)

    def wait_idle(self) -> None:
        """Until no request is left and no page is held."""

        def is_idle() -> bool:
            stats = self.stats()
            return (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)

        wait_until(is_idle, "idle engine that holds no page")
