"""Whether a lane's next launch waits for the end of this one, for rows that are held until then."""

from collections.abc import Callable

from duetjax.policy.flights import Flights
from duetjax.policy.launch import Lane
from duetjax.policy.roster import Roster

_DECODING = (Lane.WHOLE, Lane.DECODE)
_FIRST_GAP_MS = 1.0
_UNSEEN_MS = 0.5
"""Of a gap, about: until the end of a launch is known here, and until the next one runs."""
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
    a gap of g ms, and it is k P + C in L + g. Gaps are measured wherever there are some.

    tbt_slo_ms: the tightest objective, which a gap must not break.
    """

    def __init__(self, flights: Flights, roster: Roster, tbt_slo_ms: Callable[[], float]) -> None:
        self._flights = flights
        self._roster = roster
        self._tbt_slo_ms = tbt_slo_ms
        self._gap_ms = _FIRST_GAP_MS
        self._awaited: Lane | None = None  # was busy, with rows held, at the last look

    def waits(self, lane: Lane) -> bool:
        """Whether to plan nothing more now for a lane that is busy."""
        flights, roster = self._flights, self._roster
        if not (roster.held and flights.is_busy(lane)):
            return False
        columns, tickets = roster.columns, roster.columns.ticket[roster.held.batch().slots].tolist()
        held = sum(ticket in flights for ticket in tickets)
        slots = roster.decoding.batch().slots
        leash, planned = columns.leash[slots], columns.planned[slots]
        stepwise = int(((planned == leash - 1) & (leash < columns.end[slots])).sum())
        others = (len(slots) - stepwise) * flights.last(lane).launch.k
        took_ms, gap_ms = flights.took_ms(lane), self._gap_ms + _UNSEEN_MS
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
        """A launch is about to begin; a lane that comes after the other one had no gap."""
        if lane not in _DECODING:
            return
        if lane is self._awaited and not self._flights.is_busy(lane):
            gap_ms = min(self._flights.idle_ms(lane), self._flights.took_ms(lane))
            self._gap_ms += _LEARNED * (gap_ms - self._gap_ms)
        self._awaited = None
