"""Budgets as people write them, and the meter."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttc.budget import Budget, Meter, format_amount
from ttc.errors import BudgetTooSmall, InputError, TTCError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("20k tokens", 20e3, "tokens"), ("20000 token", 20e3, "tokens"), ("1,500 tokens", 1500, "tokens"),
        ("1.5M tokens", 1.5e6, "tokens"), ("3e15 eflops", 3e15, "eflops"), ("40 TeFLOPs", 40e12, "eflops"),
        ("40 tera-eflops", 40e12, "eflops"), ("0.2 PeFLOPs", 0.2e15, "eflops"), ("30 s", 30, "seconds"), ("30s", 30, "seconds"),
        ("2 min", 120, "seconds"), ("250 ms", 0.25, "seconds"), ("1 h", 3600, "seconds"), ("$0.05", 0.05, "dollars"),
        ("0.05 usd", 0.05, "dollars"), ("$ 2", 2, "dollars"), ("2 Tokens", 2, "tokens"),
    ],
)  # fmt: skip
def test_budgets_as_people_write_them(text: str, amount: float, unit: str) -> None:
    budget = Budget.parse(text)
    assert budget.unit == unit
    assert budget.amount == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "20",
        "20k",
        "tokens",
        "-5 tokens",
        "0 tokens",
        "20 parsecs",
        "nan tokens",
        "1e999 tokens",
        "k tokens",
        "5 5 tokens",
    ],
)
def test_what_is_no_budget_is_refused_with_a_mend(text: str) -> None:
    with pytest.raises(InputError, match=r"budget: .*(write it as|above 0|finite)") as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_unknown_scope() -> None:
    with pytest.raises(InputError, match="'problem' or 'run'"):
        Budget.parse("5 tokens", "galaxy")


@given(st.floats(1e-3, 1e20), st.sampled_from(["tokens", "eflops"]))
def test_what_is_printed_can_be_read_back(amount: float, unit: str) -> None:
    again = Budget.parse(format_amount(amount, unit))
    assert again.unit == unit
    assert again.amount == pytest.approx(amount, rel=6e-3)


@given(
    st.lists(
        st.tuples(st.sampled_from(["hold", "settle"]), st.integers(0, 5), st.floats(0, 40), st.floats(0, 1)),
        max_size=60,
    )
)
def test_meter_never_promises_more_than_it_has(moves: list[tuple[str, int, float, float]]) -> None:
    meter = Meter(100.0)
    holds: dict[int, float] = {}
    for move, ticket, amount, part in moves:
        if move == "hold":
            if meter.hold(ticket, amount):
                holds[ticket] = amount
        elif ticket in holds:
            meter.settle(ticket, holds.pop(ticket) * part)
        assert meter.spent + meter.held <= 100.0 * (1 + 1e-9)
        assert meter.held == pytest.approx(sum(holds.values()), abs=1e-6)


def test_errors_pickle_and_are_the_stdlib_types_they_replace() -> None:
    error = BudgetTooSmall("too small", 7.0)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.least) == ("too small", 7.0)
    assert isinstance(error, TTCError)
    assert isinstance(error, ValueError)
