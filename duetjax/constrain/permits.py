"""Issues permits on threads of its own, so that no launch of others waits for a grammar."""

import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from duetjax.policy.request import Constraint, Permit

if TYPE_CHECKING:
    from duetjax.constrain.follower import Compiled, Follower

_log = logging.getLogger(__name__)

_ENDS_S = 2.0
"""So long an end waits for threads: Python crashes if it ends while they are in llguidance."""

type _Job = Callable[[], Permit | None]


class PermitIssuer:
    """Implements `engine.Permits`.

    Grammars are compiled on one thread, and followed on another, which a large one does not keep.
    tokenizer_json: gives the text of tokenizer.json; asked for once, by the first constrained
    request. vocab_size: of the logits. eos_token_ids: what ends an answer that may end.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._begun: SimpleQueue[tuple[str, Constraint] | None] = SimpleQueue()
        self._jobs: SimpleQueue[tuple[str, _Job] | None] = SimpleQueue()
        self._num_asked = self._num_done = 0
        self._live: set[str] = set()  # written by the engine's thread
        self._compiled: Compiled | str | None = None  # of the first thread; text: why there is none
        self._followers: dict[str, Follower] = {}  # of the second
        self._is_closed = False
        self._threads: list[threading.Thread] = []

    def start(self, deliver: "Callable[[Permit | BaseException | None], None]") -> None:
        """See `engine.Permits`."""
        self._deliver = deliver
        for name, run in (("grammars", self._compile_all), ("permits", self._follow_all)):
            thread = threading.Thread(
                target=self._safely, args=(run,), name=f"duetjax-{name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    @property
    def is_idle(self) -> bool:
        """See `engine.Permits`."""
        return self._num_asked == self._num_done

    def begin(self, request_id: str, constraint: Constraint) -> None:
        """See `engine.Permits`."""
        self._live.add(request_id)
        self._begun.put((request_id, constraint))

    def sampled(self, request_id: str, token: int | None) -> None:
        """See `engine.Permits`."""
        self._num_asked += 1
        self._jobs.put((request_id, lambda: self._sampled(request_id, token)))

    def end(self, request_id: str) -> None:
        """See `engine.Permits`."""
        self._live.discard(request_id)
        self._num_asked += 1
        self._jobs.put((request_id, lambda: self._end(request_id)))

    def close(self) -> None:
        """See `engine.Permits`."""
        self._is_closed = True
        self._begun.put(None)
        self._jobs.put(None)
        for thread in self._threads:
            thread.join(_ENDS_S)

    def _safely(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as failure:  # whoever is held would be for ever
            self._deliver(failure)

    def _compile_all(self) -> None:
        while (begun := self._begun.get()) is not None and not self._is_closed:
            request_id, constraint = begun
            if request_id not in self._live:
                continue
            try:
                follower = self._follower(request_id, constraint)
            except Exception as error:
                self._deliver(_fault(request_id, error))
                continue
            self._num_asked += 1
            self._jobs.put((request_id, lambda new=follower: self._begin(new)))  # type: ignore[misc]

    def _follow_all(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_closed:
            request_id, work = job
            try:
                permit = work()
            except Exception as error:
                self._followers.pop(request_id, None)
                permit = _fault(request_id, error)
            self._num_done += 1
            self._deliver(permit)

    def _follower(self, request_id: str, constraint: Constraint) -> "Follower":
        from duetjax.constrain.follower import Compiled, Follower, vocabulary  # loads llguidance

        if self._compiled is None:
            try:
                text, ends = self._tokenizer_json(), self._eos_token_ids
                self._compiled = Compiled(vocabulary(text, self._vocab_size, ends))
            except Exception as error:
                self._compiled = f"this model's tokenizer cannot be constrained: {error}"
        if isinstance(self._compiled, str):
            raise ValueError(self._compiled)
        matcher = self._compiled.matcher(constraint.grammar)
        return Follower(request_id, constraint, self._compiled.vocabulary, matcher)

    def _begin(self, follower: "Follower") -> Permit | None:
        if follower.id not in self._live:
            return None
        self._followers[follower.id] = follower
        return follower.begin()

    def _sampled(self, request_id: str, token: int | None) -> Permit | None:
        follower = self._followers.get(request_id)
        if follower is None:  # it has ended, by an error perhaps
            return None
        return follower.begin() if token is None else follower.sampled(token)

    def _end(self, request_id: str) -> None:
        self._followers.pop(request_id, None)


def _fault(request_id: str, error: Exception) -> Permit:
    _log.warning("request %s cannot be constrained", request_id, exc_info=error)
    return Permit(request_id, 0, error=str(error) or repr(error))
