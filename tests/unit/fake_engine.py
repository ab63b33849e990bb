"""A real engine on a device whose output a person can write down: the alphabet.

After a letter comes the next one, after "z" comes "<|end|>", after anything else "a". With a
temperature the steps are 1 + seed % 5 letters long, wrapping at "z". A token that is not allowed
(a bias of -100, or a stop id before min_tokens) becomes "a"; a bias of 100 makes its token the only
one. Token ids are those of `write_tokenizer`: one token per byte, so a text's tokens are its UTF-8
bytes. Logprobs are those of `fake_executor.top_tokens`.
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
from duetjax.policy.request import NewRequest
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
    `break_down()` makes the next one raise. num_waiting: results that wait now, 0 or 1.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        super().__init__(PAGE_SIZE)
        self._gate = threading.Condition()
        self._allowed: float = float("inf")
        self._broken = False
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
        forced = [token for token, bias in sampling.biases if bias == 100]
        if forced:
            return forced[0]
        banned = {token for token, bias in sampling.biases if bias == -100}
        if state.position < params.num_prompt + sampling.min_tokens:
            banned |= set(params.stop_ids)
        token = next_token(state.last, sampling.temperature, sampling.seed)
        return ord("a") if token in banned else token


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
        super().__init__(scheduler, InOrder(self.executor), vocab_size=VOCAB_SIZE)

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
