"""Budgets over HTTP, on a scripted server: hard also where prompts are estimates, calls break, and anytime answers fail."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tests.engine.http_engine import serving
from tests.engine.mock_server import Call, Script
from ttc.api import Run, Settings
from ttc.errors import BudgetTooSmall
from ttc.types import AnswerFormat, Problem

CLOSE = "#"
FORM = AnswerFormat(think_open="<", think_close=CLOSE, close_text=CLOSE, answer_tokens=6)
PRICE = {"usd_per_m_input": 3.0, "usd_per_m_output": 4.0}
POLICIES = (
    "self-consistency?n=3", "plain?cap=9&n=2", "plain?text=Think briefly, now.&n=2", "budget-forcing?extend=2&n=2",
    "iterative-deepening?first=5&trigger=W|Hm", "parallel-probe?n=2&every=3", "adaptive?probe_every=4", "beam?n=4&width=2&tokens=6",
    "particles?n=3&step=;&tokens=9",
)  # fmt: skip


class Some:
    """A process reward model that is charged a token a text."""

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return len(texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [len(text) % 10 / 10 for text in texts]


def problems() -> list[Problem]:
    """Digits: a token each, so three times what an estimate by bytes says."""
    asked = ("1+1", "83748374 + 837483 + 9384 - 11 =", "数")
    return [Problem(f"p{i}", ({"role": "user", "content": text},), gold="4") for i, text in enumerate(asked)]


def solve(text: str, unit: str, exact: bool, seed: int) -> None:
    """The least budget and more of it; what the ledger says is within it, and where no call was cut it is what the server
    counts."""
    rng = random.Random(f"{text} {unit} {exact} {seed}")
    breaks = rng.random() < 0.4

    def model(call: Call) -> Script:
        lot = random.Random(f"{seed} {call.prompt} {call.number if breaks else 0}")
        if call.body.get("vllm_xargs"):
            return Script("x")
        drop = lot.randint(0, 30) if breaks and lot.random() < 0.3 else None
        if breaks and lot.random() < 0.1:
            return Script(status=400, message="no")
        if CLOSE in call.prompt.rpartition("<")[2]:
            return Script("4" * lot.randint(1, 9), drop_after=drop)
        thought = ("t" * lot.randint(1, 9) + ";") * lot.randint(0, 9)
        return Script(thought + CLOSE + "4", drop_after=drop, usage=lot.random() < 0.7 or not breaks)

    options = {"exact": exact, "opens": "<", "format": FORM, "max_retries": 2}
    with serving(model, **options) as (engine, server):  # type: ignore[arg-type]
        more = {"policy": text, "price": PRICE, "max_thinking_tokens": rng.randint(8, 60)}
        write = {"tokens": "{:.0f} tokens", "dollars": "${:.9f}"}[unit]
        with pytest.raises(BudgetTooSmall) as caught:
            Run(problems(), engine, Settings(budget="1e-7 $", **more), reward=Some())  # type: ignore[arg-type]
        least = caught.value.least if unit == "dollars" else engine.room_tokens + 9.0
        amount = least * rng.choice(
            [1.0 if unit == "dollars" else 1.2, rng.uniform(1.2, 4), rng.uniform(4, 30)]
        )
        settings = Settings(budget=write.format(amount + 1e-9), **more)  # type: ignore[arg-type]
        run = Run(problems(), engine, settings, reward=Some())
        asked = server.sampled, server.prompted  # for the plugin
        results = list(run.results())
        assert run.driver.overrun == 0, seed
        assert all(r.charge.dollars <= amount + 2e-9 for r in results if unit == "dollars"), seed
        if not breaks:
            assert all(r.answer is not None for r in results), seed
        cut = breaks or any(b.finish == "abort" or b.completion.forks for r in results for b in r.branches)
        if not cut:
            assert sum(r.charge.tokens_prompt for r in results) == server.prompted - asked[1], seed
            assert sum(r.charge.tokens_generated for r in results) == server.sampled - asked[0], seed


@pytest.mark.parametrize("unit", ["tokens", "dollars"])
@pytest.mark.parametrize("text", POLICIES)
def test_any_budget_is_kept_over_http(text: str, unit: str) -> None:
    for seed in range(8):
        solve(text, unit, True, seed)


@pytest.mark.parametrize(
    "text", ["self-consistency?n=3", "plain?cap=9&n=2", "plain?text=Think briefly, now."]
)
def test_dollars_are_kept_where_prompts_are_estimates(text: str) -> None:
    for seed in range(16):
        solve(text, "dollars", False, seed)
