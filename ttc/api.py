"""The Python API: open an engine, solve one problem, run many under one budget. Sync; ``asolve`` and ``arun`` for event loops.

import ttc
result = ttc.solve("What is 17 * 24 - 5?", model="nano-s", budget="2k tokens")
with ttc.open_engine("nano-s") as engine:
    for result in ttc.run(problems, engine=engine, policy="self-consistency?n=16", budget="1M tokens", scope="run"): ...
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from numbers import Integral, Real
from typing import Any, TypedDict, Unpack

from ttc.attention.settings import KvSetting
from ttc.budget import Budget
from ttc.cashier import Cashier
from ttc.checks import (
    check_control,
    check_effort,
    check_needs,
    check_problems,
    check_reward,
    fit,
    kv_in_force,
    reads_effort,
    worded,
)
from ttc.driver import Driver
from ttc.engine.protocol import Engine, SparseEngine
from ttc.errors import InputError
from ttc.jobs import Policy, RewardModel, Status, traits_of
from ttc.judge import Jury
from ttc.ledger import Ledger
from ttc.opening import open_jobs
from ttc.policies import describe
from ttc.policies import parse as parse_policy
from ttc.policies.planned import plan_policy
from ttc.pricing import Pricer
from ttc.problems import from_text, problem_to_json
from ttc.rewards import Scorer, load_reward, reward_name
from ttc.summary import summarise
from ttc.types import Brief, Problem, Result, Sampling

DEFAULT_MODEL = "nano-s"
DEFAULT_BUDGET = "4k tokens"


@contextmanager
def open_engine(model: str = DEFAULT_MODEL, engine: str = "vllm", **options: Any) -> Iterator[Engine]:
    """Open an engine, and close it at the end. ``engine`` is ``vllm`` (in process) or ``openai:URL``.

    ``options`` of both: ``concurrency`` (branches in flight, 64), ``context`` (tokens of the longest sequence). Of ``vllm``:
    ``engine_args`` (vLLM's own, as a dict), ``think_close``, ``kv_page``, ``kv_when``, ``short_pages``, ``dtype``
    (``ttc.engine.vllm.VLLMEngine``). Of ``openai``: ``api_key``, ``shape``, ``timeout_s``, ``max_retries`` and what else
    ``ttc.engine.openai.OpenAIEngine`` takes. Raises InputError or EngineError, one line each.
    """
    opened = start_engine(model, engine, **options)
    try:
        yield opened
    finally:
        opened.close()


def start_engine(model: str, engine: str = "vllm", **options: Any) -> Engine:
    """As ``open_engine``, for callers that close it themselves."""
    kind, _, rest = engine.partition(":")
    if kind == "vllm" and not rest:
        from ttc.engine.vllm import VLLMEngine

        return VLLMEngine(model, **options)
    if kind == "openai":
        if not rest:
            raise InputError("engine: 'openai' needs the server's address; write openai:http://HOST:PORT")
        from ttc.engine.openai import OpenAIEngine

        return OpenAIEngine(rest, model=model or None, **options)
    raise InputError(f"engine: unknown engine {engine!r}; use 'vllm' or 'openai:URL'")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run: everything but problems and engine. ``None`` takes the model's own."""

    policy: Policy | str = "self-consistency"
    budget: Budget | str = DEFAULT_BUDGET
    scope: str = "problem"
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_thinking_tokens: int | None = None
    effort: float | None = None
    kv_budget: int | None = None
    kv_method: str | None = None
    intensity: float | None = None
    price: Mapping[str, float] = field(default_factory=dict)

    def resolved(self) -> tuple[Policy, Budget]:
        """The policy and budget, parsed. Raises InputError."""
        policy = parse_policy(self.policy) if isinstance(self.policy, str) else self.policy
        budget = Budget.parse(self.budget, self.scope) if isinstance(self.budget, str) else self.budget
        if isinstance(policy, type):
            raise InputError(f"policy: {policy.__name__} is a class; give a value of it, {policy.__name__}()")
        if not (isinstance(getattr(policy, "name", None), str) and callable(getattr(policy, "run", None))):
            raise InputError(
                f"policy: {type(policy).__name__} has no name or no run(problem, brief); see CONTRIBUTING, 'Add a policy'"
            )
        if not isinstance(budget, Budget):
            raise InputError(f"budget: {budget!r} has no unit; write it as '2k tokens', '30 s' or '$0.05'")
        return policy, budget

    def check(self) -> None:
        """Raise InputError for values that no run could use."""
        self._check_kinds()
        self.resolved()
        if isinstance(self.budget, Budget) and self.scope not in ("problem", self.budget.scope):
            raise InputError(
                f"scope: {self.scope!r}, but the budget is for each {self.budget.scope}; say it there: Budget(..., scope='run')"
            )
        if self.effort is not None and not 0 < self.effort <= 1:
            raise InputError(f"effort: {self.effort:g} is not in (0, 1]; give a fraction of full effort")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: {self.temperature:g} is no temperature; give 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top-p: {self.top_p:g} is not in (0, 1]")
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top-k: {self.top_k} is below 0; give 0 (all tokens) or more")
        if self.intensity is not None and not 0 < self.intensity < math.inf:
            raise InputError(f"intensity: {self.intensity:g} FLOP per byte; give a number above 0")
        for name, usd in self.price.items():
            if not 0 <= usd < math.inf:
                option = name.replace("usd_per_m_", "price-")
                raise InputError(f"{option}: {usd:g} dollars per million tokens; give 0 or more")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 1:
            raise InputError(f"max-thinking: {self.max_thinking_tokens} tokens is no thought; give 1 or more")
        KvSetting.asked(self.kv_budget, self.kv_method)

    def _check_kinds(self) -> None:
        """Raise InputError for what is no number where one belongs, and for prices of nothing that is known."""
        for name, kind, words in (
            ("seed", Integral, "whole number"), ("top_k", Integral, "whole number"),
            ("max_thinking_tokens", Integral, "whole number"), ("temperature", Real, "number"), ("top_p", Real, "number"),
            ("effort", Real, "number"), ("intensity", Real, "number"),
        ):  # fmt: skip
            value = getattr(self, name)
            if (value is not None or name == "seed") and not isinstance(value, kind):
                raise InputError(f"{name}: {value!r} is no {words}; give one")
        known = ("usd_per_m_input", "usd_per_m_output")
        if not isinstance(self.price, Mapping) or set(self.price) - set(known):
            raise InputError(f"price: {self.price!r}; give a dict with {' and '.join(known)}")


class Run:
    """One run: problems through a policy on an engine under a budget. Iterate ``results()`` once; read ``status`` and ``summary()``
    at any time. ``out`` names a run directory, which is resumed if it is there; ``on_step`` is called after each engine step."""

    def __init__(
        self,
        problems: Sequence[Problem],
        engine: Engine,
        settings: Settings | None = None,
        *,
        out: Out = None,
        reward: Reward = None,
        on_step: Callable[[Status], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        skipped_rows: Sequence[str] = (),
    ) -> None:
        settings = settings or Settings()
        settings.check()
        check_problems(problems)
        self.reward = load_reward(reward) if reward is not None else None
        self.policy, self.budget = settings.resolved()
        self.engine, self.settings = engine, settings
        self.problems = worded(problems, traits_of(self.policy).text)
        self.skipped_rows = tuple(skipped_rows)
        self.sampling = _sampling(engine.info.sampling, settings)
        self.kv = kv_in_force(KvSetting.asked(settings.kv_budget, settings.kv_method), engine)
        info = engine.info
        force = cache(lambda budget, method: _in_force(engine, budget, method))
        told = force(self.kv.budget, self.kv.method) if self.kv is not None else None
        self._below = told[0] if told is not None else None
        pricer = Pricer(
            info.shape, info.concurrency, info.steerable, kv_page=info.kv_page,
            kv_force=force,
            **({"intensity": settings.intensity} if settings.intensity is not None else {}), **settings.price,
        )  # fmt: skip
        self.policy = _planned(self.policy, self.budget, self.problems, engine, settings)
        if (ready := traits_of(self.policy).ready) is not None:
            ready()
        check_reward(self.policy, self.reward, self.budget.unit)
        check_needs(self.policy, info.signals, info.name)
        check_effort(self.policy, self.problems, engine)
        brief = Brief(
            seed=settings.seed,
            max_thinking_tokens=settings.max_thinking_tokens or info.thinking_tokens or info.context,
            sampling=self.sampling,
            effort=settings.effort,
            kv_budget=self.kv.budget if self.kv is not None else None,
            kv_method=self.kv.method if self.kv is not None else None,
            room_tokens=engine.room_tokens,
        )
        self.jury = Jury(info.format, hurried=self.budget.unit == "seconds")
        cashier = Cashier(self.budget, pricer, engine, clock)
        opened = open_jobs(self.problems, self.policy, brief, cashier)  # before anything is written
        if opened.refused:
            more = f" ({len(opened.refused) - 1} more like it)" if len(opened.refused) > 1 else ""
            raise InputError(opened.refused[0][1] + more)
        self._opened = opened
        thinking = max((job.brief.max_thinking_tokens for job in opened.jobs), default=info.context)
        self.thinking_limit = thinking
        if self.budget.unit == "tokens":
            thinking = min(thinking, int(self.budget.amount) - engine.room_tokens)
        check_control(self.policy, engine, thinking)
        self.ledger = Ledger.open(out, self._config()) if out is not None else Ledger()
        self.resumed = len(self.ledger.results)
        self.driver = Driver(
            engine, self.policy, self.budget, self.jury, self.ledger, pricer,
            brief=brief, reward=self.reward, clock=clock, on_step=on_step,
        )  # fmt: skip
        self.jury.start(job.problem for job in opened.jobs if job.problem.id not in self.ledger.results)
        self._results: list[Result] = []
        self._started = clock()
        self._clock = clock
        self._ended: float | None = None

    @property
    def status(self) -> Status:
        return self.driver.status

    @property
    def notices(self) -> list[str]:
        """Words about what was found on resuming (a torn line that was dropped), decoding that stays dense, and, once the run has
        begun, a budget that leaves the engine idle."""
        found = list(self.ledger.notices)
        if self.driver.crowded:
            found.append(self.driver.crowded)
        effort = next(iter(traits_of(self.policy).efforts), None) or self.settings.effort
        if effort and not reads_effort(self.problems, self.engine):
            found.append(
                f"effort: {self.engine.info.model}'s chat template reads none, so {effort:g} changes nothing; 'plain?text=…' says"
                " it in words"
            )
        if self.settings.kv_budget is not None and self.kv is None and self.settings.kv_method != "dense":
            found.append(f"kv-budget: decoding stays dense; {self.engine.info.kv_reason}")
        below = self._below
        if self.kv is not None and below is not None:
            if below >= self.engine.info.context:
                found.append(
                    "kv-budget: decoding stays dense; at every context that this model takes, choosing pages would take longer than"
                    " it saves here (--kv-when cheaper, or always, chooses nevertheless)"
                )
            elif below > 2 * self.kv.budget:
                found.append(
                    f"kv-budget: a branch reads everything up to {below:,.0f} tokens of context, where choosing pages would take"
                    " longer than it saves here (--kv-when cheaper, or always, chooses nevertheless)"
                )
        return found

    def results(self) -> Iterator[Result]:
        """Each problem's result as it finishes. Closes the ledger at the end, whatever the end."""
        try:
            with closing(self.driver.run_opened(self._opened)) as stream:
                for result in stream:
                    self._results.append(result)
                    yield result
        finally:
            self._ended = self._clock()
            self.ledger.close()
            self.jury.close()

    def stop(self) -> None:
        """End the run after the current step; all that finished is in the ledger. Safe in a signal handler."""
        self.driver.stop()

    @property
    def interrupted(self) -> bool:
        return self.driver.interrupted

    def summary(self) -> dict[str, Any]:
        """The run in figures: the object of ``ttc solve --json``."""
        return summarise(
            self._results, run=str(self.ledger.directory or ""), model=self.engine.info.model, engine=self.engine.info.name,
            policy=describe(self.policy), seed=self.settings.seed, budget=self.budget, problems=len(self.problems),
            seconds=(self._ended or self._clock()) - self._started, overrun=self.driver.overrun,
            status=self.status, skipped_rows=len(self.skipped_rows), resumed=self.resumed,
            verifier_failures=self.jury.failures,
        )  # fmt: skip

    def _config(self) -> dict[str, Any]:
        """run.json. What must match for a resume is in ``ttc.ledger.COMPARED``."""
        import hashlib

        settings, info = self.settings, self.engine.info
        rows = [json.dumps(problem_to_json(problem), sort_keys=True) for problem in self.problems]
        return {
            "model": info.model,
            "engine": info.name,
            "identity": dict(info.identity),
            "policy": describe(self.policy),
            "budget": {"amount": self.budget.amount, "unit": self.budget.unit, "scope": self.budget.scope},
            "seed": settings.seed,
            "sampling": asdict(self.sampling),
            "format": asdict(info.format),
            "effort": settings.effort,
            "kv_budget": settings.kv_budget,
            "kv_method": settings.kv_method,
            "max_thinking_tokens": settings.max_thinking_tokens,
            "thinking_limit": self.thinking_limit,
            "intensity": settings.intensity,
            "price": dict(settings.price),
            "reward": reward_name(self.reward) if self.reward is not None else None,
            "task": _task(self.problems),
            "problems": {"count": len(rows), "sha256": hashlib.sha256("\n".join(rows).encode()).hexdigest()},
            "files": dict(info.files),
            "digests": {
                problem.id: hashlib.sha256(row.encode()).hexdigest()[:8]
                for problem, row in zip(self.problems, rows, strict=True)
            },
            "concurrency": info.concurrency,
            "engine_args": info.engine_args,
            "versions": {"ttc": version("ttc"), "python": platform.python_version()},
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def fitting(
    problems: Sequence[Problem], engine: Engine, settings: Settings
) -> tuple[list[Problem], list[str]]:
    """The problems whose prompts, as the policy sends them, leave the context room for an answer, and a line for each other. Raises
    InputError if none does."""
    policy, _ = settings.resolved()
    return fit(problems, engine, policy, settings.effort)


def _in_force(engine: Engine, budget: int, method: str | None) -> tuple[float, float] | None:
    """``SparseEngine.sparse`` of a budget and a method; None where the engine does not count what is read."""
    kv = KvSetting.asked(budget, method)
    return engine.sparse(kv) if kv is not None and isinstance(engine, SparseEngine) else None


def _planned(
    policy: Policy, budget: Budget, problems: Sequence[Problem], engine: Engine, settings: Settings
) -> Policy:
    """The policy with what it plans before the run (``ttc.policies.planned``); one that plans nothing as it is."""
    if traits_of(policy).planned is None:
        return policy
    info, count = engine.info, max(len(problems), 1)
    prompts = [engine.count_prompt(problem, settings.effort) for problem in problems]
    return plan_policy(
        policy, budget, count, model=info.model, shape=info.shape, batch=info.concurrency,
        prompt_tokens=sum(prompts) / count,
        thinking_tokens=settings.max_thinking_tokens or info.thinking_tokens or info.context,
    )  # fmt: skip


def _task(problems: Sequence[Problem]) -> str | None:
    """The task that all problems are of, if there is one."""
    tasks = {problem.meta.get("task") for problem in problems}
    task = tasks.pop() if len(tasks) == 1 else None
    return task if isinstance(task, str) else None


def _sampling(own: Sampling, settings: Settings) -> Sampling:
    changes = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(settings, name)) is not None
    }
    return replace(own, **changes)


class Options(TypedDict, total=False):
    """The fields of ``Settings`` as keyword arguments."""

    policy: Policy | str
    budget: Budget | str
    scope: str
    seed: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_thinking_tokens: int | None
    effort: float | None
    kv_budget: int | None
    kv_method: str | None
    intensity: float | None
    price: Mapping[str, float]


Out = str | os.PathLike[str] | None
Reward = RewardModel | Scorer | str | None


def run(
    problems: Sequence[Problem], *, engine: Engine, out: Out = None, reward: Reward = None, **settings: Unpack[Options]
) -> Iterator[Result]:  # fmt: skip
    """Solve ``problems`` on an open engine; yields each ``Result`` as it is done. ``settings`` are those of ``Settings``, ``out``
    is a run directory, ``reward`` a reward model, its name, or a callable (``ttc.rewards``)."""
    yield from Run(problems, engine, Settings(**settings), out=out, reward=reward).results()


def solve(
    problem: str | Problem, *, model: str = DEFAULT_MODEL, engine: Engine | str = "vllm", out: Out = None, reward: Reward = None,
    **settings: Unpack[Options],
) -> Result:  # fmt: skip
    """Solve one problem under a hard budget. Opens (and closes) an engine unless one is given; the rest as for ``run``.

    Raises InputError for bad input and EngineError for an engine that fails; a problem that fails is ``Result.error``.
    """
    problems = from_text(problem) if isinstance(problem, str) else [problem]
    Settings(**settings).check()
    with nullcontext(engine) if not isinstance(engine, str) else open_engine(model, engine) as opened:
        [result] = run(problems, engine=opened, out=out, reward=reward, **settings)
        return result


async def asolve(
    problem: str | Problem, *, model: str = DEFAULT_MODEL, engine: Engine | str = "vllm", out: Out = None, reward: Reward = None,
    **settings: Unpack[Options],
) -> Result:  # fmt: skip
    """``solve`` for event loops; the work is done in a thread. Cancelling it stops the run after the current step, and waits for
    that: nothing is spent any more when ``CancelledError`` arrives."""
    problems = from_text(problem) if isinstance(problem, str) else [problem]
    Settings(**settings).check()
    cancelled, sessions = threading.Event(), list[Run]()

    def work() -> list[Result]:
        with nullcontext(engine) if not isinstance(engine, str) else open_engine(model, engine) as opened:
            if cancelled.is_set():
                return []
            sessions.append(Run(problems, opened, Settings(**settings), out=out, reward=reward))
            if cancelled.is_set():
                sessions[0].stop()
            return list(sessions[0].results())

    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        [result] = await asyncio.shield(working)
        return result
    except asyncio.CancelledError:
        cancelled.set()
        for session in sessions:
            session.stop()
        await asyncio.wait([working])
        raise


async def arun(
    problems: Sequence[Problem], *, engine: Engine, out: Out = None, reward: Reward = None, **settings: Unpack[Options]
) -> AsyncIterator[Result]:  # fmt: skip
    """``run`` for event loops: results as they are done; leaving the loop early stops the run after the current step."""
    session = Run(problems, engine, Settings(**settings), out=out, reward=reward)
    arrived: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for result in session.results():
                arrived.put(result)
            arrived.put(None)
        except BaseException as error:  # handed to the awaiting side, which raises it
            arrived.put(error)

    thread = threading.Thread(target=work, name="ttc-run", daemon=True)
    thread.start()
    try:
        while (item := await asyncio.to_thread(arrived.get)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        session.stop()
        await asyncio.to_thread(thread.join)
