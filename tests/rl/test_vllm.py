"""Every shipped model loads in stock vLLM and says there what it says here."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("vllm")

import ttc.nano
from ttc.rl import heldout, tokenizer
from ttc.rl.evaluate import THINK_CLOSE, Bench
from ttc.rl.generate import VllmSampler

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("model", ttc.nano.catalog(), ids=lambda model: model.name)
def test_reasoners_think_close_and_answer(model: ttc.nano.NanoModel) -> None:
    sampler = VllmSampler(model.path, concurrency=32)
    try:
        bench = Bench(sampler, model.tasks[0], 8, 4)
        news = bench.extend(bench.prompts(), 1024, (THINK_CLOSE, tokenizer.EOS))
        assert sum(new[-1] == THINK_CLOSE for new in news) >= 0.9 * len(news)
        answers = bench.answer([new[:-1] for new in news])
        assert all(answer for row in answers.answers for answer in row)
        assert answers.closed.all()
    finally:
        sampler.close()


@pytest.mark.parametrize("name", ttc.nano.rewards())
def test_reward_models_score_alike(name: str) -> None:
    from ttc.engine.vllm_start import import_vllm

    item = heldout.items(heldout.GRADED["sums"][0], 1)[0]
    texts = ["12 + 3 = 15;So 15.</think>15", f"So {item.answer}.</think>{item.answer}"]
    rows = [tokenizer.encode(tokenizer.prompt(item.prompt) + text) for text in texts]
    reward = ttc.nano.reward(name)
    ours = [row[-1] for row in reward.positions(rows)]
    llm = import_vllm().LLM(
        str(ttc.nano.REWARDS / name),
        runner="pooling",
        enforce_eager=True,
        max_model_len=4096,
        use_tqdm_on_load=False,
    )
    found = llm.classify([{"prompt_token_ids": row} for row in rows], use_tqdm=False)
    theirs = [one.outputs.probs[0] for one in found]
    expected = ours if reward.kind == "process" else [1 / (1 + math.exp(-score)) for score in ours]
    assert theirs == pytest.approx(expected, abs=0.05)  # bf16
    llm.llm_engine.engine_core.shutdown()
