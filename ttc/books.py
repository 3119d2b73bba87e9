"""The books of a run: what was decided and why, and what was spent, by problem and in all."""

from __future__ import annotations

from ttc.budget import Unit
from ttc.jobs import Job, Status
from ttc.ledger import Ledger
from ttc.pricing import spent_in
from ttc.types import Charge, Decision


class Books:
    """Keeps the accounts of jobs, the run's ``status`` and the ``ledger`` in step."""

    def __init__(self, ledger: Ledger, status: Status, unit: Unit) -> None:
        self.ledger, self.status, self.unit = ledger, status, unit

    def decide(self, job: Job, what: str, why: str, price: float) -> None:
        """A line of the decision log."""
        decision = Decision(job.problem.id, what, why, price, job.account.meter.remaining)
        job.decisions.append(decision)
        self.ledger.write_decision(decision)

    def charge(self, job: Job, charge: Charge) -> None:
        """What a piece of the job's work cost (its meter is settled by whoever held the money)."""
        job.charge = job.charge + charge
        self.status.charge = self.status.charge + charge

    def replay(self, job: Job, charge: Charge) -> None:
        """What an earlier session of this run spent on the job: charged, and gone from its budget (but for seconds, which are
        over)."""
        self.charge(job, charge)
        if self.unit != "seconds":
            job.account.meter.spent += spent_in(self.unit, charge)
        self.status.replayed_tokens += charge.tokens
