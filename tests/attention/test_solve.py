"""--kv-budget from the request to the ledger, on the embedded reasoner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attention.models import decode, open_engine, prompts, save_model
from ttc.api import Run, Settings
from ttc.attention.settings import KvSetting
from ttc.costmodel import full
from ttc.engine.vllm import VLLMEngine
from ttc.errors import InputError
from ttc.problems import from_text
from ttc.types import Request, Result, Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SUM = "State the final answer to the following arithmetic problem: " + " + ".join(["37"] * 12) + " ="


Opening = Callable[[dict[str, object]], VLLMEngine]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opening]:
    """An engine with these options of the plugin's, the same to all who ask for them."""
    engines: dict[str, VLLMEngine] = {}

    def open_with(options: dict[str, object]) -> VLLMEngine:
        key = repr(sorted(options.items()))
        if key not in engines:
            told = {"additional_config": {"ttc_sparse": options}}
            engines[key] = VLLMEngine("nano-s", concurrency=16, kv_page=32, engine_args=told)
        return engines[key]

    yield open_with
    for each in engines.values():
        each.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    opened = VLLMEngine("nano-s", concurrency=16, kv_page=32, kv_when="cheaper")
    yield opened
    opened.close()


def solve(engine: VLLMEngine, **settings: object) -> tuple[Run, Result]:
    told = {"policy": "self-consistency?n=4", "budget": "4k tokens", "max_thinking_tokens": 300} | settings
    run = Run(from_text(SUM), engine, Settings(**told))  # type: ignore[arg-type]
    return run, next(iter(run.results()))


@pytest.mark.parametrize("method", ["block-topk", "streaming"])
def test_what_was_read_is_counted_and_priced(engine: VLLMEngine, method: str) -> None:
    run, result = solve(engine, kv_budget=64, kv_method=method)
    vectors, shape = {"block-topk": 1, "streaming": 0}[method], engine.info.shape
    assert run.summary()["spent"]["kv_tokens"] == pytest.approx(result.charge.kv_tokens)
    assert shape is not None
    for branch in result.branches:
        made, read, scored = branch.completion, 0, 0
        for step in range(1, made.output_tokens):
            length = made.prompt_tokens + step
            pages = -(-length // 32)
            dense = pages * 32 <= 64 + pages * vectors / 2
            read += length if dense or pages <= 2 else length - (pages - 2) * 32
            scored += 0 if dense else pages * vectors
        assert branch.charge.kv_tokens == read
        assert made.kv_scored == scored
        whole = full(
            shape, prompt_tokens=made.prompt_tokens, cached_prompt_tokens=made.cached_tokens,
            generated_tokens=made.output_tokens, weight_reads=made.weight_reads,
        )  # fmt: skip
        saved = (made.kv_skipped or 0) * shape.kv_bytes - made.kv_scored * shape.kv_bytes / 2
        assert branch.charge.bytes == pytest.approx(float(whole.bytes) - saved)
        bound = full(
            shape, prompt_tokens=made.prompt_tokens, cached_prompt_tokens=made.cached_tokens,
            generated_tokens=made.output_tokens, weight_reads=made.weight_reads, kv_budget=64, kv_block=32, method=method,
        )  # fmt: skip
        assert (
            branch.charge.bytes <= float(bound.bytes) + 1e-6
        )  # the model of the cost is a bound of what is charged
        assert branch.charge.bytes > 0.9 * float(bound.bytes)


def test_dense_branches_count_their_context(engine: VLLMEngine) -> None:
    _, result = solve(engine)
    for branch in result.branches:
        made = branch.completion
        assert branch.charge.kv_tokens == sum(made.prompt_tokens + i for i in range(1, made.output_tokens))


def test_a_wide_budget_says_what_dense_says(engine: VLLMEngine) -> None:
    dense, wide = (solve(engine, **told)[1] for told in ({}, {"kv_budget": 4096}))
    assert [b.completion.text for b in dense.branches] == [b.completion.text for b in wide.branches]
    narrow = solve(engine, kv_budget=32, kv_method="streaming")[1]
    assert [b.completion.text for b in dense.branches] != [b.completion.text for b in narrow.branches]


def test_bad_input_is_named(engine: VLLMEngine) -> None:
    with pytest.raises(InputError, match="kv-budget: 16 tokens is under one page of 32"):
        solve(engine, kv_budget=16)
    with pytest.raises(InputError, match="kv-method: 'x'"):
        solve(engine, kv_budget=64, kv_method="x")
    with pytest.raises(InputError, match="kv-page: 48 tokens; this backend's pages are multiples of 32"):
        VLLMEngine("nano-s", kv_page=48)
    with pytest.raises(InputError, match="kv-when: 'often'; use faster, cheaper, always"):
        VLLMEngine("nano-s", kv_when="often")


def test_where_choosing_takes_longer_than_it_saves_a_branch_stays_dense(
    engine: VLLMEngine, opened: Opening
) -> None:
    """What choosing costs is told, so that the machine decides nothing here: first all contexts, then those over 96 tokens."""
    dense = [b.completion.text for b in solve(engine)[1].branches]
    for overhead, below in (([0.5, 1e9], 1e9), ([0.5, 32.0], 96.0)):
        slow = opened({"overhead": overhead})
        told_below, part = slow.sparse(KvSetting(64)) or (0, 0)
        assert told_below == pytest.approx(below, rel=0.05)
        assert part == 1
        run, result = solve(slow, kv_budget=64)
        said = [b.completion.text for b in result.branches]
        skipped = [b.completion.kv_skipped for b in result.branches]
        assert (said == dense) == (skipped == [0.0] * len(skipped)) == (below > 96)
        assert [("reads everything" in n or "stays dense" in n) for n in run.notices] == (
            [True] if below > 96 else []
        )


def test_a_window_stays_dense_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model of sliding windows: its layers are left to vLLM, whatever a request asks."""
    from ttc.attention.rows import batch_of

    folder = save_model(
        tmp_path / "window", use_sliding_window=True, sliding_window=64, max_window_layers=0,
        layer_types=["sliding_attention"] * 3,
    )  # fmt: skip
    opened = open_engine(folder)
    assert set(batch_of(opened.vllm_config).served.values()) == {"a sliding window"}
    asked = prompts(4)
    wanted = decode(opened, asked)
    with caplog.at_level("WARNING", logger="ttc.attention"):
        assert decode(opened, asked, KvSetting(64), salted=False) == wanted
    assert [r.message.count("stay dense: a sliding window") for r in caplog.records] == [1]


@pytest.mark.parametrize(
    "options", [{"when": "cheaper"}, {"overhead": [0.5, 1e9]}, {"overhead": [1, 0], "dense_layers": 2}]
)
def test_eflops_stay_under_the_budget(options: dict[str, object], opened: Opening) -> None:
    """Also where branches, or some layers, stay dense; and no piece is let begin that could exceed it."""
    for method in ("quest", "streaming"):
        run, result = solve(opened(options), kv_budget=64, kv_method=method, budget="2e11 eflops")
        assert run.summary()["overrun"] == 0
        for branch in result.branches:
            made = branch.completion
            alone = run.driver.cashier.pricer.most(
                "eflops", asked(run, method), made.prompt_tokens, made.output_tokens, done=made.output_tokens,
                reads=made.weight_reads or 0.0,
            )  # fmt: skip
            assert branch.charge.eflops <= alone * (1 + 1e-9)
            assert branch.charge.eflops > 0.9 * alone


def asked(run: Run, method: str) -> Request:
    """A request with the budget of these tests."""
    return Request(run.problems[0], 0, 0, 300, Sampling(), kv_budget=64, kv_method=method)
