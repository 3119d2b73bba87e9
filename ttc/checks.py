"""What a run refuses before it starts, in one line each: problems, policies, reward models and engines that don't fit together.

Raises ``InputError``; spends nothing, writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ttc.attention.settings import KvSetting
from ttc.budget import Unit
from ttc.cashier import efforts
from ttc.engine.course import FAR
from ttc.engine.protocol import Engine, ServedEngine, SteeringEngine, SteppingEngine
from ttc.errors import InputError
from ttc.jobs import Policy, RewardModel, traits_of
from ttc.rewards import check_priced, check_process
from ttc.types import Problem


def check_reward(policy: Policy, reward: RewardModel | None, unit: Unit = "tokens") -> None:
    """Raise InputError for a policy that scores with a reward model where there is none, or none that can, or that can't be charged
    in the budget's ``unit``."""
    needs = traits_of(policy).needs
    if "reward" in needs and reward is None:
        known = "nano-s-process" if "steps" in needs else "nano-s-outcome, or score by a confidence"
        raise InputError(
            f"policy: {policy.name} scores with a reward model; name one with --reward (reward=), as {known}"
        )
    if reward is not None and "reward" in needs:
        check_priced(reward, unit)
    if reward is not None and "steps" in needs:
        check_process(reward, policy.name)


def check_problems(problems: Sequence[Problem]) -> None:
    """Raise InputError for what is no problem, a reference that is no text, or an id that is there twice."""
    seen: set[str] = set()
    for problem in problems:
        if not isinstance(problem, Problem):
            raise InputError(
                f"problems: {problem!r} is no ttc.Problem; make one, or read texts and rows with ttc.problems.load"
            )
        if problem.gold is not None and not isinstance(problem.gold, str):
            raise InputError(
                f"problems: the answer {problem.gold!r} of {problem.id!r} is no text; write {str(problem.gold)!r}"
            )
        if problem.id in seen:
            raise InputError(f"problems: the id {problem.id!r} is there twice; give each problem its own")
        seen.add(problem.id)


def check_needs(policy: Policy, signals: Sequence[str], engine: str) -> None:
    for need in traits_of(policy).needs:
        if need not in ("reward", "control", "steps", "effort", "insert") and need not in signals:
            known = ", ".join(signals) or "none"
            mend = (
                "give one that it has, as in best-of-n?score=" + signals[0]
                if signals
                else "use another policy"
            )
            raise InputError(
                f"policy: {policy.name} needs {need}, which the {engine} engine can't measure (it has {known}); {mend}"
            )


def check_effort(policy: Policy, problems: Sequence[Problem], engine: Engine) -> None:
    """Raise InputError for a policy that chooses the effort where the model's chat template does not read it."""
    if "effort" in traits_of(policy).needs and not reads_effort(problems, engine):
        raise InputError(
            f"policy: {policy.name} needs a model that was trained for levels of effort; {engine.info.model} reads none in its"
            " chat template"
        )


def reads_effort(problems: Sequence[Problem], engine: Engine) -> bool:
    """True if the chat template says something of an effort (or there is nothing to ask it for)."""
    if not problems:
        return True
    plain, told = (engine.count_prompt(problems[0], effort) for effort in (None, 1.0))
    return plain != told


def worded(problems: Sequence[Problem], text: str) -> list[Problem]:
    """The problems, with ``text`` behind the last message of each ("": as they are)."""
    if not text:
        return list(problems)
    found = []
    for problem in problems:
        *before, last = problem.messages
        told = {**last, "content": f"{last['content']}\n{text}"}
        found.append(replace(problem, messages=(*before, told)))
    return found


def check_control(policy: Policy, engine: Engine, thinking: int = FAR) -> None:
    """Raise InputError for a policy that steers chains on an engine or a model where that can't be done, or with texts that find
    no place in ``thinking`` tokens, the most that any thought of the run may have."""
    told = traits_of(policy)
    thinking = min(thinking, told.cap or thinking)
    if told.check_room is not None:
        told.check_room(engine.room_tokens, thinking)
    if told.total:
        thinking = min(thinking, told.total - engine.room_tokens)
    if "steps" in told.needs:
        if not isinstance(engine, SteppingEngine):
            raise InputError(
                f"policy: {policy.name} grows chains step by step, which the {engine.info.name} engine can't; use --engine vllm"
            )
        engine.check_steps(told.step)
    if "insert" in told.needs and not engine.info.inserts:
        raise InputError(
            f"policy: {policy.name} puts text into chains as they run, which the {engine.info.name} engine can't; use --engine vllm"
        )
    if "control" not in told.needs:
        return
    if not isinstance(engine, SteeringEngine):
        raise InputError(
            f"policy: {policy.name} steers chains as they run, which the {engine.info.name} engine can't; use --engine vllm"
        )
    control = told.control(min(thinking, engine.info.context)) if told.control is not None else None
    if control is not None:
        engine.check_control(control, thinking)


def kv_in_force(kv: KvSetting | None, engine: Engine) -> KvSetting | None:
    """How branches that are asked to read the KV cache by ``kv`` will (None: all of it). Raises InputError for a budget under one
    of the engine's pages, and for an engine whose decoding can't be set from here; a model that can't decode so stays dense."""
    if kv is None:
        return None
    info = engine.learn_kv() if isinstance(engine, ServedEngine) else engine.info
    if info.kv_page is None and not info.kv_reason:
        raise InputError(
            f"kv-budget: how the {info.name} engine decodes can't be set from here; use --engine vllm, or leave it out"
        )
    if info.kv_page is None:
        return None
    kv.check_page(info.kv_page)
    return kv


def fit(
    problems: Sequence[Problem], engine: Engine, policy: Policy, effort: float | None
) -> tuple[list[Problem], list[str]]:
    """The problems whose prompts, as the policy sends them, leave the context room for an answer, and a line for each other. Raises
    InputError if none does."""
    room = engine.info.context - engine.room_tokens - 1
    kept, skipped = [], []
    for problem, told in zip(problems, worded(problems, traits_of(policy).text), strict=True):
        tokens = max(engine.count_prompt(told, effort) for effort in efforts(policy, effort))
        if tokens <= room:
            kept.append(problem)
        else:
            skipped.append(
                f"{problem.id}: the prompt has {tokens} tokens, more than the {room} that the context leaves"
            )
    if not kept:
        raise InputError(
            f"prompt: every prompt is longer than the {room} tokens that the context leaves; use a model with a longer one"
        )
    return kept, skipped
