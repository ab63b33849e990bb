"""Whether a lane's next launch waits for the end of this one, for rows that are held until then."""

from collections.abc import Callable

from duetjax.policy.flights import Flight, Flights
from duetjax.policy.launch import Lane, Program
from duetjax.policy.roster import Roster

_DECODING = (Lane.WHOLE, Lane.DECODE)
_FIRST_GAP_MS = 1.0
_LEARNED, _FORGOTTEN = 0.1, 0.002
"""Of each gap; and of what is known of them, each time that nobody waits: it may have changed."""
_GAIN = 2.5
"""Rows that need not wait do so only for so many times what they lose."""
_SHARE = 0.05
"""Of a launch's time, that prompts may lose to a gap."""


class Gathering:
    """Launches that follow at once leave out rows whose next mask follows from this one's token.

    Such rows, C of them, are in every other launch then, while the other P decode in each: in L ms
    k P + C / 2 tokens where launches have k steps. If all wait for each other the lane is idle for
    a gap of g ms, and it is k P + C in L + g. Gaps are measured wherever there are some, as by how
    much longer it was from end to end than for a launch that followed at once.

    tbt_slo_ms: the tightest objective, which a gap must not break.
    """

    def __init__(self, flights: Flights, roster: Roster, tbt_slo_ms: Callable[[], float]) -> None:
        self._flights = flights
        self._roster = roster
        self._tbt_slo_ms = tbt_slo_ms
        self._gap_ms = _FIRST_GAP_MS
        self._awaited: Lane | None = None  # was busy, with rows held, at the last look
        self._idle_ms: float | None = None  # before the launch that runs, where there was a gap
        self._step_ms: dict[Lane, float] = {}  # of decode launches that followed at once

    def waits(self, lane: Lane) -> bool:
        """Whether to plan nothing more now for a lane that is busy.

        Not before it is known how long a launch takes that follows at once.
        """
        flights, roster = self._flights, self._roster
        if not (roster.held and flights.is_busy(lane) and lane in self._step_ms):
            return False
        columns, tickets = roster.columns, roster.columns.ticket[roster.held.batch().slots].tolist()
        held = sum(ticket in flights for ticket in tickets)
        slots = roster.decoding.batch().slots
        leash, planned = columns.leash[slots], columns.planned[slots]
        stepwise = int(((planned == leash - 1) & (leash < columns.end[slots])).sum())
        last, gap_ms = flights.last(lane).launch, self._gap_ms
        others = (len(slots) - stepwise) * last.k
        took_ms = flights.took_ms(lane)
        if last.program is Program.DECODE:
            took_ms = last.k * self._step_ms[lane]
        breaks_objective = took_ms <= self._tbt_slo_ms() < took_ms + gap_ms
        delays_prompts = lane is Lane.WHOLE and roster.prompt_tokens and gap_ms > _SHARE * took_ms
        gain = (held + stepwise) * (took_ms - gap_ms)
        is_worth_it = held and gain > 2 * _GAIN * others * gap_ms
        if is_worth_it and not breaks_objective and not delays_prompts:
            return True
        self._gap_ms += _FORGOTTEN * (_FIRST_GAP_MS - self._gap_ms)
        return False

    def planned(self) -> None:
        """Nothing more is planned for now."""
        busy = [lane for lane in _DECODING if self._flights.is_busy(lane)]
        if not self._roster.held:
            self._awaited = None
        elif busy:
            [self._awaited] = busy

    def begins(self, lane: Lane) -> None:
        """A launch is about to begin; on a lane that comes after the other one without a gap."""
        if lane in _DECODING:
            if not self._flights.is_busy(lane):
                is_gap = lane is self._awaited
                self._idle_ms = self._flights.idle_ms(lane) if is_gap else None
            self._awaited = None

    def ended(self, flight: Flight, began: float) -> None:
        """A launch has ended, whose lane was free for it since `began`."""
        lane, k = flight.launch.lane, flight.launch.k
        if lane not in _DECODING:
            return
        took_ms, idle_ms = self._flights.took_ms(lane), self._idle_ms
        self._idle_ms = None
        if flight.launch.program is not Program.DECODE:
            return
        if began > flight.began:
            self._step_ms[lane] = took_ms / k
        elif idle_ms is not None:
            longer_ms = took_ms - k * self._step_ms.get(lane, took_ms / k)
            gap_ms = min(idle_ms + max(longer_ms, 0.0), took_ms)
            self._gap_ms += _LEARNED * (gap_ms - self._gap_ms)
