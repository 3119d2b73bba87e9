"""Replays of recorded pools: any policy, through the same driver, many times with the branches in another order.

``simulate`` is ``ttc simulate``: accuracy with its interval, tokens, the longest dependent chain, probes, samples, overrun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttc.budget import Budget
from ttc.costmodel import intervals
from ttc.costmodel.ledgers import pool_of_run
from ttc.costmodel.pools import read
from ttc.costmodel.records import Pool
from ttc.costmodel.shapes import ModelShape
from ttc.driver import Driver
from ttc.engine.replay import NOTHING, RecordedJudge, ReplayEngine
from ttc.errors import InputError
from ttc.jobs import Policy, traits_of
from ttc.ledger import Ledger
from ttc.policies import parse
from ttc.policies.planned import plan_policy
from ttc.pricing import Pricer
from ttc.types import Brief

UNLIMITED = Budget(1e15, "tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """What a policy did on a pool: arrays (shuffles, problems) of right or wrong, tokens, the longest chain, probe tokens and
    branches; ``stops`` counts why problems ended, ``overrun`` is the largest excess over the budget, ``errors`` by problem."""

    right: NDArray[np.float64]
    tokens: NDArray[np.float64]
    chain: NDArray[np.float64]
    probes: NDArray[np.float64]
    samples: NDArray[np.float64]
    stops: Mapping[str, int]
    overrun: float
    errors: Mapping[str, str]
    answered: int

    def summary(self) -> dict[str, Any]:
        """The object of ``ttc simulate --json``. ``accuracy_ci95`` is over problems, ``accuracy_shuffle_se`` the
        standard error of the mean over shuffles."""
        estimate = intervals.mean(self.right.mean(axis=0))
        return {
            "accuracy": float(self.right.mean()),
            "accuracy_ci95": estimate.interval,
            "accuracy_shuffle_se": float(self.right.mean(axis=1).std() / max(len(self.right), 2) ** 0.5),
            "tokens_per_problem": float(self.tokens.mean()),
            "sequential_tokens_per_problem": float(self.chain.mean()),
            "probe_tokens_per_problem": float(self.probes.mean()),
            "samples_per_problem": float(self.samples.mean()),
            "overrun": self.overrun,
            "problems": self.right.shape[1],
            "answered": self.answered,
            "shuffles": self.right.shape[0],
            "stopped": dict(self.stops),
            "errors": dict(self.errors),
        }


def load(path: str | Path) -> Pool:
    """A pool of branches in any format that ``ttc`` reads. Raises InputError, also for a table of published curves."""
    found = pool_of_run(Path(path), cut=True) if Path(path).is_dir() else read(path)[0]
    if not isinstance(found, Pool):
        raise InputError(
            f"pool {path}: a table of published accuracies can't be replayed; give recorded branches"
        )
    return found


def replay(
    pool: Pool, policy: Policy, *, budget: Budget = UNLIMITED, shuffles: int = 100, max_branches: int = 64,
    free_probes: bool = False, abstain: bool = False, seed: int = 0, in_order: bool = False, thinking_tokens: int | None = None,
) -> Replay:  # fmt: skip
    """Run ``policy`` over all problems of ``pool``, ``shuffles`` times. ``max_branches`` 0 is all.
    ``abstain``: branches without an answer don't vote. ``in_order``: branches as recorded, not shuffled. ``thinking_tokens`` is
    the limit on thinking that the policy is told (if None the one that the pool was sampled under, or its longest branch)."""
    count = len(pool.problems)
    thinking_tokens = thinking_tokens or pool.thinking_tokens or None
    place = {p.id: i for i, p in enumerate(pool.problems)}
    if len(place) != count:
        raise InputError(f"pool {pool.name}: two problems have the same id")
    right, tokens, chain, probes, samples = (np.zeros((shuffles, count)) for _ in range(5))
    stops: dict[str, int] = {}
    errors: dict[str, str] = {}
    overrun, answered = 0.0, 0
    for shuffle in range(shuffles):
        engine = ReplayEngine(
            pool, seed + shuffle, max_branches, concurrency=count * (max_branches or 4096), free_probes=free_probes,
            unanswered=None if abstain else NOTHING, in_order=in_order, limit=thinking_tokens or 0,
        )  # fmt: skip
        driver = _driver(engine, policy, budget, seed + shuffle, thinking_tokens)
        for result in driver.run(engine.problems()):
            at = (shuffle, place[result.problem_id])
            right[at] = result.verdict is not None and result.verdict.correct
            tokens[at], probes[at] = result.charge.tokens, result.charge.tokens_probe
            chain[at] = engine.chains.get(result.problem_id, 0)
            samples[at] = sum(b.completion.output_tokens > 0 for b in result.branches)
            stops[result.stop] = stops.get(result.stop, 0) + 1
            answered += result.answer is not None
            if result.error:
                errors[result.problem_id] = result.error
        overrun = max(overrun, driver.overrun)
    return Replay(right, tokens, chain, probes, samples, stops, overrun, errors, answered)


def _driver(engine: ReplayEngine, policy: Policy, budget: Budget, seed: int, thinking: int | None) -> Driver:
    info = engine.info
    missing = sorted(set(traits_of(policy).needs) - set(info.signals))
    if missing:
        raise InputError(f"policy: {policy.name} needs {missing[0]}, which this pool has not recorded")
    if traits_of(policy).planned is not None:
        count = len(engine.pool.problems)
        shape = ModelShape.of(engine.pool.model) if engine.pool.model else None
        policy = plan_policy(
            policy, budget, count, model=info.model, shape=shape, batch=64, prompt_tokens=engine.pool.prompt_tokens or 150.0,
            thinking_tokens=info.context,
        )  # fmt: skip
    brief = Brief(seed=seed, max_thinking_tokens=thinking or info.context, sampling=info.sampling)
    return Driver(
        engine, policy, budget, RecordedJudge(), Ledger(), Pricer(None, info.concurrency, False),
        brief=brief, clock=engine.clock, stall_seconds=float("inf"),
    )  # fmt: skip


def simulate(
    path: str | Path, policy: str, *, budget: str | None = None, scope: str = "problem", **options: Any
) -> dict[str, Any]:
    """``ttc simulate``: read, replay, sum up. ``options`` are ``replay``'s. Raises InputError."""
    chosen = parse(policy)
    amount = Budget.parse(budget if budget is not None else "1e15 tokens", scope)
    if amount.unit != "tokens":
        raise InputError(
            f"budget: {budget!r}; a pool tells tokens, not {amount.unit}; write it as '20k tokens'"
        )
    for name in ("shuffles", "max_branches"):
        if options.get(name, 1) < 1:
            raise InputError(f"{name.replace('_', '-')}: {options[name]} is not 1 or more")
    pool = load(path)
    what = {"policy": policy, "pool": pool.name, "model": pool.model, "task": pool.task}
    return what | replay(pool, chosen, budget=amount, **options).summary()


__all__: Sequence[str] = ["Replay", "load", "replay", "simulate"]


if __name__ == "__main__":
    from ttc.crossfit import main

    main()
