"""Tokens drawn by the processor: the right distribution, a function of seed and position alone, and nobody else's row touched."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.engine

VOCAB = 12


@pytest.fixture(autouse=True, scope="module")
def _kernel() -> None:
    from ttc.engine import draws

    if not draws.available():
        pytest.skip("this vLLM has no kernel that draws a batch by seeds: it draws itself")


def branch(row: int, seed: int, written: int = 0, **sampling: Any) -> Any:
    from ttc.engine.control import Control

    return Control(row=row, seed=seed, drawn=True, output=cast(Any, range(written)), **sampling)


def draw(branches: list[Any], logits: Any) -> None:
    from ttc.engine.draws import Draws

    draws = Draws()
    for one in branches:
        draws.put(one)
    draws.apply(logits)


def drawn(branches: list[Any], logits: Any) -> list[int]:
    """The token that a greedy sampler takes in each row once the branches have drawn."""
    logits = logits.clone()
    draw(branches, logits)
    return list(logits.argmax(-1).tolist())


def logits_of(rows: int) -> Any:
    line = torch.linspace(-2.0, 2.0, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))]
    return line.repeat(rows, 1)


def expected(line: Any, temperature: float, top_k: int, top_p: float) -> list[float]:
    """Softmax after temperature, the ``top_k`` likeliest kept, then the fewest likeliest with mass ``top_p``: by brute force."""
    p = (line.double() / temperature).softmax(-1).tolist()
    order = sorted(range(VOCAB), key=lambda i: -p[i])[: top_k or VOCAB]
    mass, kept, whole = 0.0, [], sum(p[i] for i in order)
    for i in order:
        if mass >= top_p * whole:
            break
        kept.append(i)
        mass += p[i]
    return [p[i] / mass if i in kept else 0.0 for i in range(VOCAB)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 5, 1.0), (1.0, 0, 0.8), (0.8, 6, 0.9)],
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_the_distribution_is_the_samplers(temperature: float, top_k: int, top_p: float, by: str) -> None:
    n = 8_000
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    branches = [branch(i, i if by == "seed" else 7, 0 if by == "seed" else i, **sampling) for i in range(n)]
    logits = logits_of(n)
    counts = torch.bincount(torch.tensor(drawn(branches, logits)), minlength=VOCAB).tolist()
    wanted = expected(logits[0], temperature, top_k, top_p)
    assert all(count == 0 for count, p in zip(counts, wanted, strict=True) if p == 0)
    found, hoped = zip(*((c, p * n) for c, p in zip(counts, wanted, strict=True) if p), strict=True)
    assert stats.chisquare(found, hoped).pvalue > 1e-4


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1 << 31, 0), (1 << 62, 0)])
def test_neighbouring_seeds_and_positions_draw_independently(step: tuple[int, int]) -> None:
    n = 8_000
    logits = torch.zeros(n, 4)
    here = drawn([branch(i, 2 * i + 1, i % 50) for i in range(n)], logits)
    there = drawn([branch(i, 2 * i + 1 + step[0], i % 50 + step[1]) for i in range(n)], logits)
    pairs = torch.bincount(torch.tensor(here) * 4 + torch.tensor(there), minlength=16).tolist()
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_a_draw_depends_on_seed_and_position_not_on_the_batch() -> None:
    logits = logits_of(40)
    alone = [drawn([branch(0, seed, 5)], logits[:1])[0] for seed in range(40)]
    together = drawn([branch(row, row, 5) for row in range(40)], logits)
    backwards = drawn([branch(39 - seed, seed, 5) for seed in range(40)], logits)
    assert together == alone
    assert backwards[::-1] == alone
    mixed = drawn([branch(row, row, 5, temperature=1.0 if row % 2 else 0.5) for row in range(40)], logits)
    assert mixed[1::2] == alone[1::2]


def test_rows_that_come_go_and_swap_draw_what_they_draw_alone() -> None:
    from tests.engine.test_control import Batch
    from ttc.engine.control import CONTROLS, Control

    def add(batch: Batch, key: int) -> list[int]:
        CONTROLS[key] = Control(key=key, seed=key, drawn=True)
        return batch.add(key=key)

    keys = range(1 << 40, (1 << 40) + 3)
    try:
        alone = []
        for key in keys:
            batch = Batch()
            row = add(batch, key)
            for _ in range(30):
                batch.step()
            alone.append(list(row))
        batch = Batch()
        rows = [add(batch, key) for key in keys[:2]]
        for n in range(30):
            if n == 5:
                rows.append(add(batch, keys[2]))
            if n in (10, 20):
                batch.swap(0, 2)
            if n == 25:
                batch.remove_last()
            batch.step()
    finally:
        for key in keys:
            CONTROLS.pop(key, None)
    assert len(set(map(tuple, alone))) == 3
    assert [len(row) for row in rows] == [30, 30, 20]
    assert rows == [line[: len(row)] for line, row in zip(alone, rows, strict=True)]


def test_rows_of_others_are_not_touched() -> None:
    logits = logits_of(6)
    after = logits.clone()
    draw([branch(4, 1), branch(1, 2)], after)
    assert torch.equal(after[[0, 2, 3, 5]], logits[[0, 2, 3, 5]])
    assert (after[[1, 4]] == math.inf).sum(-1).tolist() == [1, 1]


def test_what_is_forced_and_what_is_forbidden_hold() -> None:
    logits = logits_of(500)
    logits[:, 3] = -math.inf
    logits[:250] = -math.inf
    logits[:250, 8] = 0.0
    tokens = drawn([branch(row, row, temperature=1.5) for row in range(500)], logits)
    assert tokens[:250] == [8] * 250
    assert 3 not in tokens[250:]
