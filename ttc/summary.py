"""A run in figures: the JSON object of ``ttc solve --json``, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ttc.budget import Budget
from ttc.costmodel.intervals import proportion
from ttc.types import Charge, Result

if TYPE_CHECKING:
    from ttc.jobs import Status


def spent_json(charge: Charge, seconds: float) -> dict[str, float]:
    """A charge under the fixed names of ``--json``."""
    return {
        "tokens": charge.tokens,
        "tokens_generated": charge.tokens_generated,
        "tokens_forced": charge.tokens_forced,
        "tokens_probe": charge.tokens_probe,
        "tokens_judge": charge.tokens_judge,
        "tokens_prompt": charge.tokens_prompt,
        "eflops": charge.eflops,
        "eflops_kinetics": charge.eflops_kinetics,
        "flops": charge.flops,
        "bytes": charge.bytes,
        "kv_tokens": charge.kv_tokens,
        "seconds": seconds,
        "dollars": charge.dollars,
    }


def summarise(
    results: Sequence[Result], *, run: str, model: str, engine: str, policy: str, seed: int, budget: Budget,
    problems: int, seconds: float, overrun: float, status: Status, skipped_rows: int = 0, resumed: int = 0,
    verifier_failures: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """``problems`` are the whole run's, so that a run that was stopped has fewer results; ``status`` is the whole run's, also of
    branches whose problem did not finish. Accuracies are fractions of the results that have a gold answer; a problem that failed
    counts as wrong."""
    scored = [r for r in results if r.verdict is not None]
    correct = sum(r.verdict.correct for r in scored if r.verdict is not None)
    stopped: dict[str, int] = {}
    for result in results:
        stopped[result.stop] = stopped.get(result.stop, 0) + 1
    return {
        "run": run,
        "model": model,
        "engine": engine,
        "policy": policy,
        "seed": seed,
        "budget": {"amount": budget.amount, "unit": budget.unit, "scope": budget.scope},
        "problems": problems,
        "answered": sum(r.answer is not None for r in results),
        "scored": len(scored),
        "correct": correct,
        "accuracy": correct / len(scored) if scored else None,
        "accuracy_ci95": proportion(correct, len(scored)).interval if scored else None,
        "spent": spent_json(status.charge, seconds),
        "overrun": overrun,
        "samples": status.samples,
        "failed_samples": status.failed_samples,
        "retried_samples": status.retried_samples,
        "steps": status.steps,
        "stopped": stopped,
        "failed": sum(bool(r.error) for r in results),
        "skipped_rows": skipped_rows,
        "resumed": resumed,
        "verifier_failures": verifier_failures,
        "errors": {r.problem_id: r.error for r in results if r.error},
    }
