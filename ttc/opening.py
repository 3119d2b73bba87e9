"""The beginning of a run: which problems can run, as jobs, and whether the budget buys one answer for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ttc.budget import Meter, format_amount
from ttc.cashier import Cashier, efforts, rounded_up
from ttc.errors import BudgetTooSmall
from ttc.jobs import Account, Job, Policy
from ttc.types import Brief, Problem


@dataclass(frozen=True, slots=True)
class Opened:
    """The jobs of a run, to be done once; ``refused`` are the problems that can't run (prompt too long), and why; ``account`` is
    the one that all jobs share (None: each has its own)."""

    jobs: Sequence[Job]
    refused: Sequence[tuple[Problem, str]] = ()
    account: Account | None = None


def open_jobs(problems: Sequence[Problem], policy: Policy, brief: Brief, cashier: Cashier) -> Opened:
    """Price every problem's least answer; in a budget that all share it is set aside for each. Spends nothing.

    Raises BudgetTooSmall if the budget can't buy one answer for each, and says the least that would do.
    """
    budget, engine = cashier.budget, cashier.engine
    shared = Account(Meter(budget.amount)) if budget.scope == "run" else None
    brief = replace(
        brief, budget_amount=budget.amount, budget_unit=budget.unit, budget_scope=budget.scope,
        budget_share=budget.amount / (max(len(problems), 1) if shared is not None else 1), probe_tokens=engine.info.probe_tokens,
    )  # fmt: skip
    jobs: list[Job] = []
    refused: list[tuple[Problem, str]] = []
    least_sum = least_max = 0.0
    for order, problem in enumerate(problems):
        prompts = {effort: engine.count_prompt(problem, effort) for effort in efforts(policy, brief.effort)}
        prompt, room = max(prompts.values()), engine.room_tokens
        longest = engine.info.context - prompt - room
        if longest < 1:
            why = (
                f"prompt: {problem.id} has {prompt} tokens, and with {room} kept for the answer that is more than the"
                f" model's context of {engine.info.context}; shorten it or use a model with a longer context"
            )
            refused.append((problem, why))
            continue
        own = replace(brief, max_thinking_tokens=min(longest, brief.max_thinking_tokens))
        job = Job(order, problem, own, prompts, shared or Account(Meter(budget.amount)))
        least = cashier.least(job)
        least_sum, least_max = least_sum + least, max(least_max, least)
        if shared is not None:
            shared.meter.reserve(order, least)
        jobs.append(job)
    least = least_sum if shared is not None else least_max
    if least > budget.amount:
        whole = "for one answer to each problem" if shared is not None else "for one answer"
        raise BudgetTooSmall(
            f"budget: {format_amount(budget.amount, budget.unit)} is too small {whole};"
            f" give at least {rounded_up(least, budget.unit)}",
            least,
        )
    return Opened(jobs, refused, shared)
