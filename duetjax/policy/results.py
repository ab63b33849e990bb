"""Takes in what launches have sampled: tokens join their requests, who has ended is dismissed."""

from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.columns import Batch, Chunk
from duetjax.policy.launch import Lane, Launch, RowFlag, StepResult
from duetjax.policy.request import FinishReason, Phase, Request, StepOutputs, TokenLogprob
from duetjax.policy.roster import Roster, slot_of

_SAMPLED = int(RowFlag.SAMPLED)
_BAD = int(RowFlag.NON_FINITE)
_STOPPED = int(RowFlag.STOPPED)
_ENDS = _BAD | _STOPPED


@dataclass(slots=True)
class _Outputs:
    """A `StepOutputs` in the making."""

    ids: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: list[tuple[str, FinishReason]] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)
    queued: list[tuple[int, float]] = field(default_factory=list)
    launches: list[tuple[str, int]] = field(default_factory=list)

    def done(self) -> StepOutputs:
        return StepOutputs(
            tuple(self.ids),
            tuple(self.tokens),
            tuple(self.finished),
            tuple(self.logprobs),
            tuple(self.cached),
            tuple(self.queued),
            tuple(self.launches),
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
        columns, slots, flags = self._roster.columns, batch.slots, result.flags[: len(batch)]
        sampled = takes = columns.takes[slots]
        unusual = (flags != _SAMPLED).nonzero()[0].tolist()
        if unusual:
            sampled = takes & ((flags & _SAMPLED) != 0)
        columns.computed[slots] += sampled
        self._append(batch, sampled, result, out)
        for row in unusual:  # whoever has come to its end is AT_LIMIT
            request, flag = batch.requests[row], flags.item(row)
            if takes[row] and (flag & _ENDS or columns.is_at_end(slot_of(request))):
                self._end(request, flag, out)

    def _append(
        self, batch: Batch, sampled: NDArray[np.bool_], result: StepResult, out: _Outputs
    ) -> None:
        """The sampled tokens, and their logprobs."""
        one_by_one = batch.is_scored or batch.is_constrained
        if one_by_one or self._roster.limits.deterministic:
            for row in sampled.nonzero()[0].tolist():
                self._sampled(batch.requests[row], row, result, out)
            return
        ids, tokens, slots = batch.ids, result.tokens[: len(batch)], batch.slots
        if np.count_nonzero(sampled) < len(batch):
            ids, tokens = tuple(compress(ids, sampled.tolist())), tokens[sampled]
            slots = slots[sampled]
        self._roster.columns.append(slots, tokens)
        out.ids += ids
        out.tokens += tokens.tolist()

    def _sampled(self, request: Request, row: int, result: StepResult, out: _Outputs) -> None:
        """One row's token; not handed on where it has been before."""
        slot = slot_of(request)
        length = int(self._roster.columns.length[slot])
        token = int(result.tokens[row])
        self._roster.columns.tokens[slot, length] = token
        self._roster.columns.length[slot] = length + 1
        if request.new.constraint is not None:
            self._roster.sampled.append((request.new.id, token))
        if request.num_muted:
            request.num_muted -= 1
            return
        if request.new.sampling.logprobs is not None:
            out.logprobs.append((len(out.ids), _logprob(request, row, result)))
        if length == len(request.new.prompt):
            if request.num_cached:
                out.cached.append((len(out.ids), request.num_cached))
            assert request.began is not None, f"{request.new.id!r} sampled before it began"
            out.queued.append((len(out.ids), request.began - request.arrived))
        out.ids.append(request.new.id)
        out.tokens.append(token)

    def _take_chunk(
        self, launch: Launch, chunk: Chunk, row: int, result: StepResult, out: _Outputs
    ) -> None:
        roster, request, flags = self._roster, chunk.request, int(result.flags[row])
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
        assert flags & _SAMPLED, f"{request.new.id!r} sampled nothing: {flags}"
        num_prompt = len(request.new.prompt)
        if columns.length[slot] + request.num_muted == num_prompt:
            self.prompt_tokens += num_prompt
        self._sampled(request, row, result, out)
        if flags & _STOPPED or columns.is_at_end(slot):
            self._end(request, flags, out)
        elif launch.lane is Lane.PREFILL and request.phase is Phase.HANDING_OVER:
            roster.hand_over(request, launch.ticket)

    def _end(self, request: Request, flags: int, out: _Outputs) -> None:
        """Dismisses a request whose last token this was, or whose logits were not finite."""
        if flags & _BAD:
            why = FinishReason.ERROR
        else:
            last = int(self._roster.columns.known(slot_of(request))[-1])
            stopped = last in request.new.stop_ids
            assert stopped == bool(flags & _STOPPED), f"{request.new.id!r}: {flags} at its end"
            why = FinishReason.STOP if stopped else FinishReason.LENGTH
        self._roster.end(request)
        out.finished.append((request.new.id, why))
        out.launches.append((request.new.id, request.num_launches))


def _logprob(request: Request, row: int, result: StepResult) -> TokenLogprob:
    wanted = request.new.sampling.logprobs
    return TokenLogprob(float(result.logprobs[row]), result.top[row][:wanted] if wanted else ())
