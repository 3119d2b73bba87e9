"""Policies that choose how hard to think: ``kinetics`` asks the planner for samples, thinking length, KV budget and effort before
the run; ``effort`` climbs the levels of a model that was trained for them, problem by problem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttc.budget import Budget
from ttc.costmodel.hardware import Hardware
from ttc.costmodel.planner import Plan, cost_only, plan
from ttc.costmodel.points import Tariff, all_points
from ttc.costmodel.pools import read_all
from ttc.costmodel.shapes import ModelShape
from ttc.errors import InputError
from ttc.jobs import Policy, Situation, Traits, traits_of
from ttc.samplers import leader, tally
from ttc.types import Brief, Generate, Outcome, Problem, Routine

SEPARATOR = "|"
"""Between several files of data, and between levels of effort."""


def plan_policy(policy: Policy, budget: Budget, problems: int, **facts: Any) -> Policy:
    """``policy`` with what it plans before the run; one that plans nothing as it is. ``facts`` are the rest of ``Situation``."""
    planned = traits_of(policy).planned
    if planned is None:
        return policy
    amount = budget.amount / (problems if budget.scope == "run" else 1)
    return planned(Situation(budget=Budget(amount, budget.unit), **facts))


@dataclass(frozen=True, slots=True)
class Kinetics:
    """Asks the planner (``ttc plan``) before the run what the budget buys best of this model, and buys that for every problem:
    ``n`` votes of at most ``thinking`` tokens under ``kv_budget``, at ``effort``. ``data`` names the files that say how accurate
    each choice is (recorded branches, run directories, curves), ``task`` which of their tasks is meant; without data the plan rests
    on cost alone. What is given here is kept (0: the planner's choice). Raises InputError where a budget can't be planned for."""

    data: str = ""
    task: str = ""
    n: int = 0
    thinking: int = 0
    kv_budget: int = 0
    effort: float = 0.0
    name = "kinetics"

    def __post_init__(self) -> None:
        if not 0 <= self.n <= 4096 or self.thinking < 0 or self.kv_budget < 0 or not 0 <= self.effort <= 1:
            raise InputError(
                f"policy: n={self.n}, thinking={self.thinking}, kv_budget={self.kv_budget}, effort={self.effort:g}; give 0 for the"
                " planner's choice, or a count of at most 4096 samples, tokens, and an effort of at most 1"
            )

    @property
    def traits(self) -> Traits:
        return Traits(efforts=(self.effort,) if self.effort else (), planned=self.planned)

    def planned(self, situation: Situation) -> Kinetics:
        """This policy with the planner's choices filled in."""
        best = self._plan(situation).chosen
        cap = min(best.thinking_tokens or float("inf"), situation.thinking_tokens)
        return replace(
            self, n=self.n or best.samples, thinking=self.thinking or int(cap), kv_budget=self.kv_budget or best.kv_budget or 0,
            effort=self.effort or best.effort or 0.0,
        )  # fmt: skip

    def _plan(self, situation: Situation) -> Plan:
        unit, amount = situation.budget.unit, situation.budget.amount
        if unit not in ("tokens", "eflops"):
            raise InputError(
                f"policy: kinetics plans tokens and eFLOPs, not {unit}; give such a budget, or another policy"
            )
        if situation.shape is None:
            raise InputError(
                f"policy: kinetics prices by the shape of the model, which is not known of {situation.model}"
            )
        tariff = Tariff(
            Hardware.named("kinetics-b200"),
            prompt_tokens=situation.prompt_tokens,
            batch=float(situation.batch),
        )
        own = _known_as(situation.model)
        shape = replace(situation.shape, name=own)
        if not self.data:
            points = cost_only([shape], amount, unit, tariff)
            if not points:
                raise InputError(
                    f"policy: kinetics finds no plan that {situation.budget} would pay for; give a larger budget, or another policy"
                )
            return plan(points, amount, unit, tariff)
        pools, curves = read_all([Path(part) for part in self.data.split(SEPARATOR)])
        pools = [replace(p, model=_known_as(p.model or own)) for p in pools]
        curves = [replace(c, model=_known_as(c.model)) for c in curves]
        names = {str(p.model) for p in pools} | {str(c.model) for c in curves}
        if own not in names:
            raise InputError(
                f"policy: {self.data} is of {', '.join(sorted(names))}, not of {own}; give its own data"
            )
        points = all_points(
            [p for p in pools if p.model == own], [c for c in curves if c.model == own], tariff, shapes={own: shape},
            task=self.task or None,
        )  # fmt: skip
        tasks = sorted({str(point.task) for point in points})
        if len(tasks) > 1:
            raise InputError(f"policy: {self.data} holds several tasks; add task={' or task='.join(tasks)}")
        return plan(points, amount, unit, tariff)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        thinking = min(self.thinking or brief.max_thinking_tokens, brief.max_thinking_tokens)
        requests = tuple(
            brief.request(
                problem, i, thinking_tokens=thinking, effort=self.effort or brief.effort,
                kv_budget=self.kv_budget or brief.kv_budget,
            )
            for i in range(max(self.n, 1))
        )  # fmt: skip
        why = f"planned: {len(requests)} votes of at most {thinking} tokens"
        reply = yield Generate(requests, why=why)
        votes = tally(reply.branches)
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes, why)


def _known_as(model: str | None) -> str:
    """The registry's spelling of a model's name; as it is if the registry does not know it."""
    try:
        return ModelShape.of(model or "").name
    except InputError:
        return model or ""


@dataclass(frozen=True, slots=True)
class Effort:
    """Climbs the ``levels`` of a model that was trained for them (an effort in (0, 1] in its chat template), from the least:
    ``tries`` branches at each, on to the next while fewer than ``agree`` of a level's branches say the same, and at the last up to
    ``n``. A vote weighs its effort."""

    levels: str = "0.5|0.75|1.0"
    tries: int = 2
    agree: int = 2
    n: int = 8
    name = "effort"

    def __post_init__(self) -> None:
        if not all(0 < level <= 1 for level in self.ladder) or sorted(self.ladder) != list(self.ladder):
            raise InputError(
                f"policy: levels={self.levels!r}; give rising efforts in (0, 1], such as 0.5|0.75|1.0"
            )
        if not 1 <= self.agree <= self.tries <= self.n <= 4096:
            raise InputError(
                f"policy: agree={self.agree}, tries={self.tries}, n={self.n}; give 1 <= agree <= tries <= n <= 4096"
            )

    @property
    def ladder(self) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in self.levels.split(SEPARATOR))
        except ValueError:
            raise InputError(
                f"policy: levels={self.levels!r}; give numbers with {SEPARATOR!r} between them"
            ) from None

    @property
    def traits(self) -> Traits:
        return Traits(needs=("effort",), efforts=self.ladder)

    def run(self, problem: Problem, brief: Brief) -> Routine:
        votes: dict[str, float] = {}
        index = 0
        for level in self.ladder:
            here: dict[str, float] = {}
            rounds = [self.tries] + [1] * (self.n - self.tries if level == self.ladder[-1] else 0)
            for more in rounds:
                alike = max(here.values(), default=0.0)
                requests = tuple(brief.request(problem, index + i, effort=level) for i in range(more))
                reply = yield Generate(
                    requests, why=f"effort {level:g}: {alike:g} alike, {self.agree} wanted"
                )
                index += more
                for answer, weight in tally(reply.branches).items():
                    here[answer] = here.get(answer, 0.0) + weight
                    votes[answer] = votes.get(answer, 0.0) + weight * level
                if max(here.values(), default=0.0) >= self.agree:
                    why = f"{self.agree} alike at effort {level:g}"
                    return Outcome(leader(votes, brief.seed, problem.id), "confident", votes, why)
                if any(branch.finish == "denied" for branch in reply.branches):
                    return Outcome(leader(votes, brief.seed, problem.id), "samples", votes, "the budget")
        return Outcome(leader(votes, brief.seed, problem.id), "samples", votes, "as many as allowed")


__all__ = ["Effort", "Kinetics", "Situation", "plan_policy"]
