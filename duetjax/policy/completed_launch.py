"""What there is to say about a launch once it has completed, in plain values."""

from dataclasses import dataclass

from duetjax.policy.flights import Flight
from duetjax.policy.launch import Lane, Program, Split, Ticket
from duetjax.policy.roster import Roster


@dataclass(frozen=True, slots=True)
class CompletedLaunch:
    """A launch, and the scheduler at its end.

    ticket, lane, split, program, bucket, k: see `Launch`. decode_rows: rows that decoded.
    prompt_chunks, prompt_tokens: pieces of prompts, and tokens in them. why: see `Aggregate`; what
    the policy said when it was planned. predicted_ms, measured_ms: of all its steps; the former
    None where nobody foretells. began: when it was planned or its lane became free for it, seconds
    by the engine's clock; measured_ms is from there to `ended`. running, waiting, pages_free: as in
    `Stats`, before anything was planned anew. ids: of its requests, those that decoded first, then
    one for each chunk. generated: tokens handed on, and step_ends: when steps ended; both since
    somebody looked, so of a launch that was under way then perhaps not all.
    """

    ticket: Ticket
    lane: Lane
    split: Split | None
    program: Program
    bucket: int
    k: int
    decode_rows: int
    prompt_chunks: int
    prompt_tokens: int
    why: str
    predicted_ms: float | None
    measured_ms: float
    began: float
    ended: float
    running: int
    waiting: int
    pages_free: int
    ids: tuple[str, ...]
    generated: int
    step_ends: tuple[float, ...]


def completed(flight: Flight, began: float, ended: float, roster: Roster) -> CompletedLaunch:
    """Of a flight that has just ended."""
    launch = flight.launch
    return CompletedLaunch(
        ticket=launch.ticket,
        lane=launch.lane,
        split=launch.split,
        program=launch.program,
        bucket=launch.bucket,
        k=launch.k,
        decode_rows=len(flight.batch),
        prompt_chunks=len(flight.chunks),
        prompt_tokens=sum(chunk.count for chunk in flight.chunks),
        why=flight.why,
        predicted_ms=launch.predicted_ms,
        measured_ms=1e3 * (ended - began),
        began=began,
        ended=ended,
        running=roster.num_running,
        waiting=len(roster.queue),
        pages_free=roster.pool.num_free,
        ids=flight.batch.ids + tuple([chunk.request.new.id for chunk in flight.chunks]),
        generated=flight.generated,
        step_ends=flight.step_ends,
    )
