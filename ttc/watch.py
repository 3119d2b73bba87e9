"""What ends branches from outside: the clock of a seconds budget, stalls, Ctrl-C, an engine that died.

A part of the driver, which owns the flights and the money.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttc.errors import EngineError
from ttc.jobs import Flight
from ttc.types import Completion

if TYPE_CHECKING:
    from ttc.driver import Driver

RETRIES = 2
"""How often the driver issues a failed request again (engines retry their own transport errors themselves)."""

PATIENCE_SECONDS, PATIENCE_STEPS = 5.0, 100
"""How long, and for how many steps at the least, the driver waits to hear how cancelled branches ended when a run is stopped."""


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
        """Cancel what runs and record it, so that its tokens are accounted for when the run is resumed. An engine that dies over
        it, or does not say what became of a branch in ``PATIENCE_SECONDS``, loses the count of the last tokens at the most."""
        flights, engine, clock = self.driver.flights, self.driver.engine, self.driver.clock
        if not flights:
            return
        try:
            engine.abort(sorted(flights))
            begun, steps = clock(), 0
            while flights and (steps < PATIENCE_STEPS or clock() - begun < PATIENCE_SECONDS):
                steps += 1
                report = engine.step()
                self.driver.follow(report.progress, clock(), gone=True)
                for ticket, completion in report.finished:
                    flight = flights.get(ticket)
                    if flight is not None:
                        self._record(flight, completion)
                        del flights[ticket]
        except EngineError:
            pass  # the run was to end anyway, and what it has cost is recorded below
        finally:
            self.settle_lost("the engine did not say how it ended")

    def settle_lost(self, why: str) -> None:
        """The engine is gone: what was running is charged at what was last seen of it."""
        driver = self.driver
        driver.follow(driver.standing, driver.clock(), gone=True)
        for ticket, flight in list(driver.flights.items()):
            lost = Completion(
                "", "abort", driver.cashier.prompt(flight.job, flight.request) if flight.tokens else 0, flight.tokens,
                weight_reads=flight.reads, error=why,
            )  # fmt: skip
            self._record(flight, lost)
            del driver.flights[ticket]

    def _record(self, flight: Flight, completion: Completion) -> None:
        driver = self.driver
        seconds = driver.clock() - flight.submitted
        charge = flight.carried + driver.pricer.charge(flight.request, completion, seconds)
        driver.closing.charge(flight.job, charge)
        cut = completion.finish not in ("stop", "length")
        driver.ledger.write_branch(driver.branch(flight, completion, charge), flight.request, interrupted=cut)
