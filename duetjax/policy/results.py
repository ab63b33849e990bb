"""Takes in what launches have sampled: tokens join their requests, who has ended is dismissed."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.columns import Batch, Chunk
from duetjax.policy.launch import Lane, Launch, RowFlag, StepResult
from duetjax.policy.request import FinishReason, Phase, Request, StepOutputs, TokenLogprob
from duetjax.policy.roster import Roster, slot_of

_TAKEN = int(RowFlag.SAMPLED)
_BAD = int(RowFlag.NON_FINITE)
_STOPPED = int(RowFlag.STOPPED)

type Rows = NDArray[np.int64]


@dataclass(slots=True)
class _Outputs:
    """A `StepOutputs` in the making."""

    ids: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: list[tuple[str, FinishReason]] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)

    def done(self) -> StepOutputs:
        return StepOutputs(
            tuple(self.ids),
            tuple(self.tokens),
            tuple(self.finished),
            tuple(self.logprobs),
            tuple(self.cached),
        )


class Results:
    """Applies the results of finished steps to the roster; counts tokens."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self.prompt_tokens = 0
        self.generation_tokens = 0

    def take(
        self, launch: Launch, batch: Batch, chunks: tuple[Chunk, ...], result: StepResult
    ) -> StepOutputs:
        """One finished step: the rows of `batch`, then those of `chunks`."""
        assert len(result.tokens) == len(batch) + len(chunks), f"{result} for {launch}"
        out = _Outputs()
        if batch:
            self._take_batch(batch, result, out)
        for row, chunk in enumerate(chunks, len(batch)):
            self._take_chunk(launch, chunk, row, result, out)
        self.generation_tokens += len(out.tokens)
        return out.done()

    def _take_batch(self, batch: Batch, result: StepResult, out: _Outputs) -> None:
        roster, columns, slots = self._roster, self._roster.columns, batch.slots
        flags = np.array(result.flags[: len(batch)], np.int64)
        takes = columns.takes[slots]
        sampled = takes & ((flags & _TAKEN) != 0)
        columns.computed[slots] += sampled
        at_end = columns.computed[slots] >= columns.end[slots]
        ended = (sampled & (at_end | ((flags & _STOPPED) != 0))) | (takes & ((flags & _BAD) != 0))
        full = sampled & (columns.computed[slots] % roster.limits.page_size == 0)
        self._append(batch, None if sampled.all() else np.flatnonzero(sampled), result, out)
        for row in np.flatnonzero(full).tolist():
            roster.publish(batch.requests[row])
        for row in np.flatnonzero(ended).tolist():
            self._end(batch.requests[row], result.flags[row], out)

    def _append(self, batch: Batch, rows: Rows | None, result: StepResult, out: _Outputs) -> None:
        """The sampled tokens of `rows`, None being all, and their logprobs."""
        if rows is None and not any(request.num_muted for request in self._muted(batch)):
            tokens = result.tokens[: len(batch)]
            for append, token in zip(batch.appends, tokens, strict=True):
                append(token)
            out.ids += batch.ids
            out.tokens += tokens
            for row in batch.scored:
                out.logprobs.append((row, _logprob(batch.requests[row], row, result)))
            return
        for row in range(len(batch)) if rows is None else rows.tolist():
            self._sampled(batch.requests[row], row, result, out)

    def _muted(self, batch: Batch) -> tuple[Request, ...]:
        return batch.requests if self._roster.limits.deterministic else ()

    def _sampled(self, request: Request, row: int, result: StepResult, out: _Outputs) -> None:
        """One row's token; not handed on where it has been before."""
        request.tokens.append(result.tokens[row])
        if request.num_muted:
            request.num_muted -= 1
            return
        if request.new.sampling.logprobs is not None:
            out.logprobs.append((len(out.ids), _logprob(request, row, result)))
        if request.num_output == 1 and request.num_cached:
            out.cached.append((len(out.ids), request.num_cached))
        out.ids.append(request.new.id)
        out.tokens.append(result.tokens[row])

    def _take_chunk(
        self, launch: Launch, chunk: Chunk, row: int, result: StepResult, out: _Outputs
    ) -> None:
        roster, request, flags = self._roster, chunk.request, result.flags[row]
        if request.phase is Phase.ENDED:
            return
        if flags & _BAD:
            self._end(request, flags, out)
            return
        columns, slot = roster.columns, slot_of(request)
        columns.computed[slot] += chunk.count
        roster.publish(request)
        if not chunk.ends:
            return
        assert flags & _TAKEN, f"{request.new.id!r} sampled nothing: {flags}"
        if request.num_output + request.num_muted == 0:
            self.prompt_tokens += len(request.new.prompt)
        self._sampled(request, row, result, out)
        if flags & _STOPPED or columns.computed[slot] >= columns.end[slot]:
            self._end(request, flags, out)
        elif launch.lane is Lane.PREFILL and request.phase is Phase.HANDING_OVER:
            roster.hand_over(request, launch.ticket)

    def _end(self, request: Request, flags: int, out: _Outputs) -> None:
        """Dismisses a request whose last token this was, or whose logits were not finite."""
        if flags & _BAD:
            why = FinishReason.ERROR
        else:
            stopped = request.tokens[-1] in request.new.stop_ids
            assert stopped == bool(flags & _STOPPED), f"{request.new.id!r}: {flags} at its end"
            why = FinishReason.STOP if stopped else FinishReason.LENGTH
        self._roster.end(request)
        out.finished.append((request.new.id, why))


def _logprob(request: Request, row: int, result: StepResult) -> TokenLogprob:
    wanted = request.new.sampling.logprobs
    return TokenLogprob(result.logprobs[row], result.top[row][:wanted] if wanted else ())
