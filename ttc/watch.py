"""What ends branches from outside: the clock of a seconds budget, stalls, Ctrl-C, an engine that died, kill -9."""

from __future__ import annotations

from ttc.books import Books
from ttc.cashier import Cashier
from ttc.errors import EngineError
from ttc.flights import Flights

RETRIES = 2
"""How often the driver issues a failed request again (engines retry their own transport errors themselves)."""

PATIENCE_SECONDS, PATIENCE_STEPS = 5.0, 100
"""How long, and for how many steps at the least, the driver waits to hear how cancelled branches ended when a run is stopped."""


NOTE_SECONDS = 2.0
"""How often what runs is noted in the run directory: a killed process has spent no more than this much time unseen."""


class Watch:
    """Looks at the flights after each step. A request that brings no token for ``stall_seconds`` is cancelled and counts as
    failed. What has been spent on running branches is noted in the run directory every ``NOTE_SECONDS``."""

    def __init__(self, flights: Flights, cashier: Cashier, books: Books, stall_seconds: float) -> None:
        self.flights, self.cashier, self.books, self.stall_seconds = flights, cashier, books, stall_seconds
        self._next_look = self._next_note = 0.0

    def look(self, now: float) -> None:
        if self.cashier.budget.unit == "seconds":
            self._clock()
        if now >= self._next_look:
            self._stalls(now)
            self._next_look = now + self.stall_seconds / 50
        if now >= self._next_note and self.books.ledger.kept:
            self._note(now)
            self._next_note = now + NOTE_SECONDS

    def _note(self, now: float) -> None:
        flights = self.flights
        flights.follow(flights.standing, now)
        running = [(flights.so_far(t, "the process was killed"), f.request) for t, f in flights.aloft.items()]
        self.books.ledger.note_running(running)

    def _clock(self) -> None:
        """Close the thoughts for which the time that closing takes is all that is left; cancel what runs at the end of time."""
        cashier, closing = self.cashier, self.cashier.closing_seconds()
        late: list[int] = []
        for ticket, flight in self.flights.aloft.items():
            left = cashier.seconds_left(flight.job)
            if left <= cashier.longest_step:
                late.append(ticket)
            elif left <= closing and not flight.closing:
                flight.closing = True
                self.flights.close(ticket)
        if late:
            self.flights.cancel(late)

    def _stalls(self, now: float) -> None:
        stalled = {t: f for t, f in self.flights.aloft.items() if now - f.moved > self.stall_seconds}
        if not stalled:
            return
        self.flights.cancel(list(stalled))
        for flight in stalled.values():
            flight.moved, flight.attempts = now, RETRIES
            self.books.decide(flight.job, "cancel 1", f"no token for {self.stall_seconds:g} s", 0.0)

    def interrupt(self) -> None:
        """Cancel what runs and record it, so that its tokens are accounted for when the run is resumed. An engine that dies over
        it, or does not say what became of a branch in ``PATIENCE_SECONDS``, loses the count of the last tokens at the most."""
        flights, clock = self.flights, self.flights.clock
        if not flights.aloft:
            return
        try:
            flights.cancel(sorted(flights.aloft))
            begun, steps = clock(), 0
            while flights.aloft and (steps < PATIENCE_STEPS or clock() - begun < PATIENCE_SECONDS):
                steps += 1
                report = flights.engine.step()
                flights.follow(report.progress, clock(), gone=True)
                for ticket, completion in report.finished:
                    if ticket in flights.aloft:
                        flights.record(ticket, completion)
        except EngineError:
            pass  # the run was to end anyway, and what it has cost is recorded below
        finally:
            self.settle_lost("the engine did not say how it ended")

    def settle_lost(self, why: str) -> None:
        """The engine is gone: what was running is charged at what was last seen of it."""
        flights = self.flights
        flights.follow(flights.standing, flights.clock(), gone=True)
        for ticket in list(flights.aloft):
            flights.record_lost(ticket, why)
