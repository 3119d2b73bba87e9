"""Reward models by name, for ``--reward`` and ``reward=``.

``nano-s-process`` (embedded, see 'ttc models') or a folder of that kind; ``vllm:MODEL``, a classifier of sequences or of tokens run
by vLLM in this process; ``http://HOST:PORT``, one that a vLLM server serves (``vllm serve MODEL --runner pooling``);
``package.module:NAME``, a callable or class of your own. A pooling model reads the prompt in its own chat template and the text
behind it, and then ``end`` (``vllm:MODEL?end=<|im_end|>``, for one that was trained on ended turns); its score is the activated
output at the last token, with several labels the last one's: in [0, 1], so it can lead a search. One that scores at a mark behind
every step gets the mark as ``end`` and, as ``step``, what ends a step of the text: behind it the mark is put, white space left out
(``vllm:Qwen/Qwen2.5-Math-PRM-7B?step=%0A%0A&end=<extra_0>``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl

from ttc import yours
from ttc.budget import Unit
from ttc.costmodel import ModelShape
from ttc.errors import EngineError, InputError
from ttc.jobs import RewardModel
from ttc.types import Problem

if TYPE_CHECKING:
    import httpx

Scorer = Callable[[Problem, Sequence[str]], Sequence[float]]
KEPT_PROMPTS = 4096
KV_BYTES = 1 << 30
"""KV cache of a pooling model in process on a CPU; else vLLM would take most of the memory."""


def load_reward(given: RewardModel | Scorer | str) -> RewardModel:
    """The reward model of that name; a callable as one. Raises InputError for a name that means none, a server that does not answer
    among them."""
    if not isinstance(given, str):
        return _own(given, "reward")
    address, _, query = given.partition("?")
    if address.startswith(("http://", "https://", "vllm:")):
        options = dict(parse_qsl(query, keep_blank_values=True))
        if unknown := set(options) - {"end", "step"}:
            raise InputError(f"reward: {address} has no option {min(unknown)!r}; it takes end and step")
        end, step = options.get("end", ""), options.get("step", "")
        if step and not end:
            raise InputError(f"reward: step={step!r} needs end, the mark that stands behind a step")
        name = address.removeprefix("vllm:")
        if not name:
            raise InputError("reward: 'vllm:' needs a model; write vllm:NAME-OR-FOLDER")
        return PoolingReward(Local(name) if address.startswith("vllm:") else Served(name), end, step)
    module, colon, _ = given.partition(":")
    if colon and module.replace(".", "").isidentifier():
        found = yours.load("reward", given)
        return _own(yours.make("reward", given, found) if isinstance(found, type) else found, given)
    from ttc import nano

    return nano.reward(given)


def _own(found: Any, name: str) -> RewardModel:
    if hasattr(found, "score") and hasattr(found, "tokens"):
        return found  # type: ignore[no-any-return]
    if callable(found):
        return CallableReward(found)
    raise InputError(f"reward: {name} is no reward model; it needs tokens and score, or be callable")


def reward_name(model: RewardModel) -> str:
    """What run.json calls it."""
    return str(getattr(model, "name", type(model).__name__))


def scores_of(model: RewardModel, problem: Problem, texts: Sequence[str]) -> tuple[float, ...]:
    """A score a text. Raises ValueError for a model that gives more or fewer, or one that is no finite number."""
    scores = tuple(float(score) for score in model.score(problem, texts))
    if len(scores) != len(texts):
        raise ValueError(f"reward {reward_name(model)} gave {len(scores)} scores for {len(texts)} texts")
    for place, score in enumerate(scores, 1):
        if not math.isfinite(score):
            raise ValueError(
                f"reward {reward_name(model)} gave {score} for text {place} of {len(texts)}; a score is a finite number"
            )
    return scores


def check_priced(model: RewardModel, unit: Unit) -> None:
    """Raise InputError for a model whose work can't be charged in this unit."""
    if unit == "eflops" and getattr(model, "shape", None) is None and not isinstance(model, CallableReward):
        raise InputError(
            f"reward: {reward_name(model)} does not tell its shape, so eFLOPs can't be charged for it; use a budget in tokens, or"
            " an embedded reward model"
        )


def check_process(model: RewardModel, policy: str) -> None:
    """Raise InputError where a search is to be led by a model that scores whole chains only."""
    if getattr(model, "kind", "process") == "outcome":
        raise InputError(
            f"reward: {reward_name(model)} scores whole chains, and {policy} needs the chance of each step; use a"
            " process reward model"
        )


@dataclass(frozen=True, slots=True)
class CallableReward:
    """A function of (problem, texts) that gives a score a text. What it reads is its own affair: nothing is charged. With a true
    attribute ``slow`` it is asked in a thread of its own."""

    scorer: Scorer

    @property
    def name(self) -> str:
        return str(getattr(self.scorer, "__qualname__", type(self.scorer).__name__))

    @property
    def slow(self) -> bool:
        return bool(getattr(self.scorer, "slow", False))

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return 0

    def score(self, problem: Problem, texts: Sequence[str]) -> Sequence[float]:
        return self.scorer(problem, texts)


class Pooler(Protocol):
    """A pooling model: prompts and texts in its tokens, and its activated outputs. Raises EngineError where it gives none."""

    name: str
    at_once: (
        int  # requests that it takes side by side, from several threads (0: it is asked in the driver's own)
    )

    @property
    def shape(self) -> ModelShape | None:
        """None: not known."""
        ...

    def prompt(self, problem: Problem) -> list[int]: ...
    def text(self, text: str) -> list[int]: ...
    def outputs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """For each row of token ids its labels' values at the last token."""
        ...


class PoolingReward:
    """A pooling model as the driver wants it. It is charged all that it is handed, prompt included: what its prefix cache saves
    is not seen from here. Raises InputError for one that gives no score behind ``end``."""

    def __init__(self, pooler: Pooler, end: str = "", step: str = "") -> None:
        self.pooler, self.name, self.shape, self._step = pooler, pooler.name, pooler.shape, step
        self.slow, self.at_once = pooler.at_once > 0, max(pooler.at_once, 1)
        self._end = pooler.text(end) if end else []
        self._prompts: dict[str, list[int]] = {}
        self._texts: dict[str, list[int]] = {}  # what is asked for its tokens is scored next
        try:
            pooler.outputs([[*pooler.text("1"), *self._end]])
        except EngineError as error:
            raise InputError(str(error)) from None

    def _prompt(self, problem: Problem) -> list[int]:
        key = repr(problem.messages)
        if key not in self._prompts:
            if len(self._prompts) >= KEPT_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = self.pooler.prompt(problem)
        return self._prompts[key]

    def _text(self, text: str) -> list[int]:
        """In tokens, ``end`` included."""
        if text not in self._texts:
            if len(self._texts) >= KEPT_PROMPTS:
                self._texts.clear()
            *steps, rest = text.split(self._step) if self._step else [text]
            pieces = [(step + self._step).rstrip() for step in steps] + ([rest] if rest or not steps else [])
            self._texts[text] = [
                token
                for piece in pieces
                for token in [*(self.pooler.text(piece) if piece else ()), *self._end]
            ]
        return self._texts[text]

    def _rows(self, problem: Problem, texts: Sequence[str]) -> list[list[int]]:
        return [self._prompt(problem) + self._text(text) for text in texts]

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return sum(map(len, self._rows(problem, texts)))

    def reads(self, problem: Problem, texts: Sequence[str]) -> list[tuple[int, int]]:
        return [(len(row), 0) for row in self._rows(problem, texts)]

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [output[-1] for output in self.pooler.outputs(self._rows(problem, texts))] if texts else []


class Local:
    """A pooling model in vLLM in this process. On a GPU it shares the card's memory with the reasoner: leave it room there
    (``engine_args`` of both), or serve it."""

    at_once = 0

    def __init__(self, model: str, **engine_args: Any) -> None:
        from ttc import nano
        from ttc.engine.vllm_start import import_vllm, one_line

        vllm = import_vllm()
        folder = nano.reward_folder(model)
        if "/" not in model and not folder.is_dir():
            raise InputError(
                f"reward: there is no {model!r} for vLLM; use one of {', '.join(nano.rewards())}, a folder, or a hub id"
            )
        path = str(folder)
        on_cpu = vllm.platforms.current_platform.is_cpu()
        args: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": KV_BYTES} if on_cpu else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._llm = vllm.LLM(path, runner="pooling", use_tqdm_on_load=False, **(args | engine_args))
        except Exception as error:
            raise InputError(
                f"reward: vLLM can't run {model!r} as a pooling model: {one_line(error)}"
            ) from error
        tasks = self._llm.supported_tasks
        self._task = next((task for task in ("classify", "token_classify") if task in tasks), "")
        if not self._task:
            raise InputError(
                f"reward: {model!r} classifies nothing (it can {', '.join(tasks)}); give a sequence classifier"
            )
        self._tokenizer: Any = self._llm.get_tokenizer()
        self.name = f"vllm:{model}"
        config = self._llm.llm_engine.vllm_config.model_config.hf_config
        self.shape: ModelShape | None = None
        with suppress(InputError):  # of a kind that the cost model does not know
            self.shape = ModelShape.from_config(config.to_dict(), name=self.name)

    def prompt(self, problem: Problem) -> list[int]:
        messages = [dict(message) for message in problem.messages]
        return list(
            self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def outputs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        prompts = [{"prompt_token_ids": row} for row in rows]
        found = [
            each.outputs.data for each in self._llm.encode(prompts, pooling_task=self._task, use_tqdm=False)
        ]
        if self._task == "classify":
            return [row.reshape(-1).tolist() for row in found]
        return [_last(row.tolist(), self.name) for row in found]


class Served:
    """A pooling model on a vLLM server: /tokenize, and /classify or, for one with an output a token, /pooling."""

    shape: ModelShape | None = None  # the server does not tell
    at_once = 16

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        import httpx

        from ttc.engine.http_stream import CONNECT_S, KEEPALIVE_S

        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S),
        )
        try:
            self.model = self._served()
            tried = self._send("POST", "/classify", {"model": self.model, "input": [[0]]})
        except (EngineError, InputError) as error:
            self.close()
            raise InputError(str(error)) from None
        self.name = f"{self.url} ({self.model})"
        self._whole = (
            tried.status_code == 200
        )  # the path is there for a classifier of tokens, too: it answers 501

    def close(self) -> None:
        self._client.close()

    def _served(self) -> str:
        """The model that the server lists first."""
        models = self._call("GET", "/v1/models", None)["data"]
        if not models:
            raise InputError(f"reward: {self.url} serves no model")
        try:
            return str(models[0]["id"])
        except (KeyError, TypeError):
            raise InputError(f"reward: {self.url} names no model in /v1/models; give a vLLM server") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """What the server answers. A call is made again if the server lets go of an idle connection just as it is used."""
        import httpx

        try:
            try:
                return self._client.request(method, path, json=body)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                return self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineError(
                f"reward: {self.url} does not answer ({type(error).__name__}: {error})"
            ) from None

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        reply = self._send(method, path, body)
        if reply.status_code != 200:
            text = " ".join(reply.text.split())[:200]
            raise EngineError(
                f"reward: {self.url}{path} answered {reply.status_code} ({text}); serve a classifier with --runner pooling"
            )
        try:
            found = reply.json()
        except ValueError:
            found = None
        wanted = "tokens" if path == "/tokenize" else "data"
        if not isinstance(found, dict) or not isinstance(found.get(wanted), list):
            raise EngineError(f"reward: {self.url}{path} answers without {wanted}; give a vLLM server")
        return found

    def prompt(self, problem: Problem) -> list[int]:
        messages = [dict(message) for message in problem.messages]
        body = {"model": self.model, "messages": messages, "add_generation_prompt": True}
        return list(self._call("POST", "/tokenize", body)["tokens"])

    def text(self, text: str) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return list(self._call("POST", "/tokenize", body)["tokens"])

    def outputs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        body: dict[str, Any] = {"model": self.model, "input": list(rows)}
        path = "/classify" if self._whole else "/pooling"
        body |= {} if self._whole else {"task": "token_classify"}
        data = sorted(self._call("POST", path, body)["data"], key=lambda each: each["index"])
        return [list(each["probs"]) if self._whole else _last(each["data"], self.name) for each in data]


def _last(found: Sequence[Any], name: str) -> list[float]:
    """The labels' values at the last token that has any. Raises EngineError where none has."""
    if not len(found):
        raise EngineError(
            f"reward: {name} scores at a mark of its own, which the text does not hold; name the mark that its card tells, as in"
            " 'vllm:MODEL?end=<extra_0>'"
        )
    last = found[-1]
    return [float(value) for value in last] if isinstance(last, Sequence) else [float(last)]
