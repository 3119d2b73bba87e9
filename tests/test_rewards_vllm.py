"""Reward models that vLLM runs, in this process and as its own server: the embedded model's scores again, one a sequence or one a
token, marks behind steps, and searches led by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.engine.vllm_server import serving
from ttc import nano
from ttc.api import Run, Settings
from ttc.engine.vllm import VLLMEngine
from ttc.errors import InputError
from ttc.problems import from_task
from ttc.rewards import Local, PoolingReward, Served, load_reward
from ttc.types import Problem

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TASK = "rg:chain_sum?min_terms=3&max_terms=4&min_digits=2&max_digits=2"
PROBLEM = Problem("p", ({"role": "user", "content": "12 + 7 + 3 ="},))
TEXTS = ["12 + 7 = 19;", "12 + 7 = 20;", "12 + 7 = 19;19 + 3 = 22;So 22.</think>22"]
BF16 = 0.02
TOKENWISE = ["--pooler-config", '{"task": "token_classify"}']
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else two processes a server
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """``vllm serve --runner pooling`` of the process model, scoring sequences and scoring tokens; both start at once."""
    folder = tmp_path_factory.mktemp("servers")
    common = ["--model", str(nano.reward_folder("nano-s-process")), "--served-model-name", "judge"]
    common += ["--max-model-len", "1024", "--max-num-seqs", "16", "--runner", "pooling"]
    with ExitStack() as stack:
        starting = {
            kind: stack.enter_context(serving([*common, *more], ENVIRONMENT, folder / kind))
            for kind, more in (("sequence", []), ("token", TOKENWISE))
        }
        yield {kind: ready() for kind, ready in starting.items()}


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    opened = VLLMEngine("nano-s", concurrency=16, short_pages=True)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def local() -> PoolingReward:
    model = load_reward("vllm:nano-s-process")
    assert isinstance(model, PoolingReward)
    return model


def check_search(engine: VLLMEngine, reward: PoolingReward) -> None:
    """Four particles a problem, led by ``reward``: every step is scored and charged, every problem answered; a step computes no
    more than its last page again, which is short here."""
    before = engine.counters()
    settings = Settings(policy="particles?n=4&step=;", budget="8k tokens", max_thinking_tokens=160)
    results = list(Run(from_task(TASK, 4, 3), engine, settings, reward=reward).results())
    assert [r.error for r in results] == [""] * 4
    assert all(r.answer is not None for r in results)
    scored = sum(sum("score" in d.what for d in r.decisions) for r in results)
    assert scored >= 8, "step after step"
    assert all(r.charge.tokens_judge > 0 for r in results)
    after, steps = engine.counters(), sum(len(r.branches) for r in results)
    fresh = after.prompt_tokens - before.prompt_tokens - (after.cached_tokens - before.cached_tokens)
    assert engine.info.probe_prefill == 32
    assert fresh <= 32 * steps


def test_vllm_scores_as_the_embedded_model_does(local: PoolingReward) -> None:
    own = nano.reward("nano-s-process")
    assert local.score(PROBLEM, TEXTS) == pytest.approx(own.score(PROBLEM, TEXTS), abs=BF16)
    assert local.shape is not None and own.shape is not None
    assert local.shape.active_params == own.shape.active_params, "so that it can be charged in eFLOPs"


@contextmanager
def served(url: str) -> Iterator[PoolingReward]:
    pooler = Served(url)
    yield PoolingReward(pooler)
    pooler.close()


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_pooling_server_scores_as_the_embedded_model_does(servers: dict[str, str], kind: str) -> None:
    own = load_reward("nano-s-process")
    with served(servers[kind]) as model:
        assert model.tokens(PROBLEM, TEXTS[:1]) == own.tokens(PROBLEM, TEXTS[:1])
        assert model.score(PROBLEM, TEXTS) == pytest.approx(own.score(PROBLEM, TEXTS), abs=BF16)


def test_searches_are_led_by_them(servers: dict[str, str], engine: VLLMEngine, local: PoolingReward) -> None:
    check_search(engine, local)
    for url in servers.values():
        with served(url) as model:
            check_search(engine, model)


def test_a_process_model_that_scores_at_marks(tmp_path: Path) -> None:
    """The architecture of Qwen2.5-Math-PRM, small and random, against transformers and its head written out."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2Model
    from vllm.config import PoolerConfig

    from ttc.rl import tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=130, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, architectures=["Qwen2ForProcessRewardModel"], dtype="float32",
    )  # fmt: skip
    trunk = Qwen2Model(config)
    trunk.train(False)
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    for parameter in (*trunk.parameters(), *head.parameters()):
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    config.save_pretrained(tmp_path)
    weights = {
        f"{name}.{key}": value
        for name, part in (("model", trunk), ("score", head))
        for key, value in part.state_dict().items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizer.hf_tokenizer().save_pretrained(tmp_path)

    pooler = Local(str(tmp_path), dtype="float32", pooler_config=PoolerConfig(step_tag_id=tokenizer.ID["!"]))
    marked = PoolingReward(pooler, end="!", step=";")
    read = [text.replace(";", ";!") + ("" if text.endswith(";") else "!") for text in TEXTS]
    with torch.no_grad():
        rows = [tokenizer.encode(tokenizer.prompt(PROBLEM.text) + text) for text in read]
        expected = [
            float(head(trunk(torch.tensor([row])).last_hidden_state)[0, -1].softmax(-1)[1]) for row in rows
        ]
    assert marked.score(PROBLEM, TEXTS) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(InputError, match="scores at a mark of its own"):
        PoolingReward(pooler)
