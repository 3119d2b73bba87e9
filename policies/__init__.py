"""What to buy for a budget. A policy is a frozen dataclass with a ``name`` and one generator method, ``run(problem, brief)``. One
that needs more than samples (confidences, a reward model, steering) says so in its ``traits`` (``ttc.jobs.Traits``), so that a run
without it is refused before it starts.

``parse`` reads what people write: ``self-consistency``, ``best-of-n?n=16&score=mean-logprob``, or for a policy of your own
``package.module:Class?key=value``.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, cast
from urllib.parse import parse_qsl, quote

from ttc import yours
from ttc.errors import InputError
from ttc.jobs import Policy
from ttc.policies.adaptive import Adaptive
from ttc.policies.baselines import AdaptiveConsistency, DeepConf, EarlyStopping, ParallelProbe
from ttc.policies.fixed import BestOfN, Greedy, SelfConsistency, WeightedVote
from ttc.policies.planned import Effort, Kinetics
from ttc.policies.search import Beam, Dvts, Particles
from ttc.policies.steered import BudgetForcing, IterativeDeepening, Plain

POLICIES: dict[str, type[Any]] = {
    "adaptive": Adaptive,
    "adaptive-consistency": AdaptiveConsistency,
    "beam": Beam,
    "best-of-n": BestOfN,
    "budget-forcing": BudgetForcing,
    "deepconf": DeepConf,
    "dvts": Dvts,
    "early-stopping": EarlyStopping,
    "effort": Effort,
    "greedy": Greedy,
    "iterative-deepening": IterativeDeepening,
    "kinetics": Kinetics,
    "parallel-probe": ParallelProbe,
    "particles": Particles,
    "plain": Plain,
    "self-consistency": SelfConsistency,
    "weighted-vote": WeightedVote,
}


def parse(text: str) -> Policy:
    """A policy from its name and options. Raises InputError for an unknown name, option or value, naming the valid ones."""
    name, _, query = text.partition("?")
    kind: type[Any] | None = yours.load("policy", name) if ":" in name else POLICIES.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"policy: unknown policy {name!r}; {hint}use one of {', '.join(POLICIES)}, or package.module:Class"
        )
    written = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)  # a plus is a plus
    options = dict(written)
    if len(options) < len(written):
        twice = next(key for key, _ in written if [k for k, _ in written].count(key) > 1)
        raise InputError(f"policy: {name} is given {twice} twice in {text!r}; give it once")
    fields = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in fields:
            raise InputError(f"policy: {name} has no option {key!r}; it takes {', '.join(fields) or 'none'}")
        values[key] = _coerce(name, key, value, fields[key].default)
    policy = yours.make("policy", name, kind, **values)
    if not (callable(getattr(policy, "run", None)) and isinstance(getattr(policy, "name", None), str)):
        raise InputError(
            f"policy: {name} is no policy; one has a name and a generator method run(problem, brief)"
        )
    return cast(Policy, policy)


def describe(policy: Policy) -> str:
    """The policy as ``parse`` would read it: its name and every option, for run.json."""
    names: list[str] = (
        [f.name for f in dataclasses.fields(policy)] if dataclasses.is_dataclass(policy) else []
    )
    options = "&".join(f"{name}={_written(getattr(policy, name))}" for name in names)
    return f"{policy.name}?{options}" if options else policy.name


def _written(value: Any) -> str:
    """An option's value as ``parse`` reads it: a policy within a policy is quoted, and of others what would end or change them."""
    if hasattr(value, "run"):
        return quote(describe(value))
    return "" if value is None else str(value).replace("%", "%25").replace("&", "%26")


def _coerce(policy: str, key: str, value: str, default: Any) -> Any:
    """``value`` in the type of the option's default; where that is None, a policy."""
    try:
        if default is None:
            return parse(value) if value else None
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(default, int):
            return int(value)
        if isinstance(default, float):
            return float(value)
    except InputError:
        raise  # a policy within this one
    except (ValueError, KeyError):
        raise InputError(
            f"policy: {policy} wants {type(default).__name__} for {key}, not {value!r}"
        ) from None
    return value


__all__ = [
    "POLICIES",
    "Adaptive",
    "AdaptiveConsistency",
    "Beam",
    "BestOfN",
    "BudgetForcing",
    "DeepConf",
    "Dvts",
    "EarlyStopping",
    "Effort",
    "Greedy",
    "IterativeDeepening",
    "Kinetics",
    "ParallelProbe",
    "Particles",
    "Plain",
    "Policy",
    "SelfConsistency",
    "WeightedVote",
    "describe",
    "parse",
]
