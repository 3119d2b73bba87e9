"""What ends branches from outside: the clock of a seconds budget, stalls, Ctrl-C, an engine that died.

A part of the driver, which owns the flights and the money.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttc.jobs import Flight
from ttc.types import Charge, Completion

if TYPE_CHECKING:
    from ttc.driver import Driver

RETRIES = 2
"""How often the driver issues a failed request again (engines retry their own transport errors themselves)."""


class Watch:
    """Looks at the flights after each step. A request that brings no token for ``stall_seconds`` is cancelled and counts as
    failed."""

    def __init__(self, driver: Driver, stall_seconds: float) -> None:
        self.driver, self.stall_seconds = driver, stall_seconds
        self._next_look = 0.0

    def look(self, now: float) -> None:
        if self.driver.budget.unit == "seconds":
            self._clock()
        if now >= self._next_look:
            self._stalls(now)
            self._next_look = now + self.stall_seconds / 50

    def _clock(self) -> None:
        """Close the thoughts for which the time that closing takes is all that is left; cancel what runs at the end of time."""
        cashier, engine = self.driver.cashier, self.driver.engine
        late: list[int] = []
        for ticket, flight in self.driver.flights.items():
            left = cashier.seconds_left(flight.job)
            if left <= cashier.longest_step:
                late.append(ticket)
            elif left <= cashier.closing_seconds() and not flight.closing:
                flight.closing = True
                engine.steer(ticket, "close")
        if late:
            engine.abort(late)

    def _stalls(self, now: float) -> None:
        flights = self.driver.flights
        stalled = [t for t, f in flights.items() if now - f.moved > self.stall_seconds]
        if not stalled:
            return
        self.driver.engine.abort(stalled)
        for ticket in stalled:
            flights[ticket].moved = now
            flights[ticket].attempts = RETRIES
            why = f"no token for {self.stall_seconds:g} s"
            self.driver.decide(flights[ticket].job, "cancel 1", why, 0.0)

    def interrupt(self) -> None:
        """Cancel what runs and record it, so that its tokens are accounted for when the run is resumed."""
        flights, engine = self.driver.flights, self.driver.engine
        engine.abort(sorted(flights))
        for _ in range(100):
            if not flights:
                return
            for ticket, completion in engine.step().finished:
                flight = flights.pop(ticket, None)
                if flight is not None:
                    charge = self._record(flight, completion, interrupted=completion.finish == "abort")
                    self.driver.closing.charge(flight.job, charge)

    def settle_lost(self, why: str) -> None:
        """The engine is gone: what was running is charged at what was last seen of it."""
        self.driver.follow(self.driver.standing, self.driver.clock())
        for flight in self.driver.flights.values():
            lost = Completion(
                "", "abort", self.driver.cashier.prompt(flight.job, flight.request) if flight.tokens else 0, flight.tokens,
                weight_reads=flight.reads, error=why,
            )  # fmt: skip
            self._record(flight, lost, interrupted=True)
        self.driver.flights.clear()

    def _record(self, flight: Flight, completion: Completion, *, interrupted: bool) -> Charge:
        driver = self.driver
        seconds = driver.clock() - flight.submitted
        charge = flight.carried + driver.pricer.charge(flight.request, completion, seconds)
        branch = driver.branch(flight, completion, charge)
        driver.ledger.write_branch(branch, flight.request, interrupted=interrupted)
        return charge
