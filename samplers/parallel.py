"""N independent branches of one problem: the sampler under best-of-n, self-consistency and weighted votes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from ttc.types import Branch, Brief, Generate, Problem, Reply, Work


@dataclass(frozen=True, slots=True)
class Parallel:
    """Draw ``n`` branches at once, at the run's sampling settings (``temperature`` overrides). ``signals`` are the confidence
    measures that the policy will read."""

    n: int
    temperature: float | None = None
    signals: tuple[str, ...] = ()

    def run(
        self,
        problem: Problem,
        brief: Brief,
        until: Callable[[Sequence[Branch]], bool] | None = None,
        why: str = "",
    ) -> Generator[Work, Reply, tuple[Branch, ...]]:
        sampling = (
            brief.sampling
            if self.temperature is None
            else replace(brief.sampling, temperature=self.temperature)
        )
        requests = tuple(
            brief.request(problem, index, sampling=sampling, signals=self.signals) for index in range(self.n)
        )
        reply = yield Generate(requests, until, why or f"{self.n} independent branches")
        return reply.branches
