"""Issues permits on a thread of its own, so that no launch of others waits for a grammar."""

import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from duetjax.policy.request import Constraint, Permit

if TYPE_CHECKING:
    from duetjax.constrain.follower import Follower, Vocabulary

_log = logging.getLogger(__name__)


class PermitIssuer:
    """Implements `engine.Permits`.

    tokenizer_json: gives the text of tokenizer.json; asked for once, by the first constrained
    request. vocab_size: of the logits. eos_token_ids: what ends an answer that may end.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._jobs: SimpleQueue[Callable[[], Permit | None] | None] = SimpleQueue()
        self._num_asked = self._num_done = 0
        self._thread = threading.Thread(target=self._run, name="duetjax-permits", daemon=True)
        # What follows is touched by the thread alone.
        self._followers: dict[str, Follower] = {}
        self._vocabulary: Vocabulary | None = None

    def start(self, deliver: Callable[[Permit | None], None]) -> None:
        """See `engine.Permits`."""
        self._deliver = deliver
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """See `engine.Permits`."""
        return self._num_asked == self._num_done

    def begin(self, request_id: str, constraint: Constraint) -> None:
        """See `engine.Permits`."""
        self._ask(lambda: self._begin(request_id, constraint), request_id)

    def sampled(self, request_id: str, token: int | None) -> None:
        """See `engine.Permits`."""
        self._ask(lambda: self._sampled(request_id, token), request_id)

    def end(self, request_id: str) -> None:
        """See `engine.Permits`."""
        self._ask(lambda: self._end(request_id), request_id)

    def close(self) -> None:
        """See `engine.Permits`."""
        self._jobs.put(None)

    def _ask(self, job: Callable[[], Permit | None], request_id: str) -> None:
        def safely() -> Permit | None:
            try:
                return job()
            except Exception as error:
                _log.exception("request %s cannot be constrained", request_id)
                self._followers.pop(request_id, None)
                return Permit(request_id, 0, error=str(error))

        self._num_asked += 1
        self._jobs.put(safely)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            permit = job()
            self._num_done += 1
            self._deliver(permit)

    def _begin(self, request_id: str, constraint: Constraint) -> Permit:
        from duetjax.constrain.follower import Follower, vocabulary  # loads llguidance

        if self._vocabulary is None:
            text, ends = self._tokenizer_json(), self._eos_token_ids
            self._vocabulary = vocabulary(text, self._vocab_size, ends)
        follower = Follower(request_id, constraint, self._vocabulary)
        self._followers[request_id] = follower
        return follower.begin()

    def _sampled(self, request_id: str, token: int | None) -> Permit | None:
        follower = self._followers.get(request_id)
        if follower is None:  # it has ended, by an error perhaps
            return None
        return follower.begin() if token is None else follower.sampled(token)

    def _end(self, request_id: str) -> None:
        self._followers.pop(request_id, None)
