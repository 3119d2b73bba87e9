"""An OpenAI-compatible server: what it can do, its prompts in tokens, and the bodies of its calls.

Owns all differences between servers (vLLM's extras; fields that a server refuses by
name are left out from then on, with one warning each); knows nothing of branches, caps and retries.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ttc.attention.settings import EXTRA_ARGS_KEY, KvSetting
from ttc.engine.http_stream import CallFailed, Delta, Wire
from ttc.errors import InputError, TTCError
from ttc.types import Request

LOG = logging.getLogger("ttc.engine.openai")
OPTIONAL_FIELDS = (
    "stream_options",
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
    "seed",
    "temperature",
    "top_p",
    "top_logprobs",
    "logprobs",
)
"""Fields that a server may refuse by name (status 400 or 422) and that a call can do without (OpenAI's reasoning models take no
temperature but their own)."""
CONTEXT_FIELDS = ("max_model_len", "context_length", "context_window", "max_context_length")
"""What servers call a model's context in /v1/models: vLLM and SGLang, OpenRouter and Together, Groq, Mistral."""
_NO_CALL = {"routed_experts_prompt_start": 1 << 30}
"""What vLLM (0.32) refuses after it has read the instructions, so that asking for plugins writes no token. Where the field is not
known one token is written, which is in no one's budget."""
_NO_KV_PLUGIN = "ttc's plugin is not loaded in the server; install ttc beside that vLLM"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of /v1/models; ``context`` 0 and ``root`` "" where the server does not say."""

    id: str
    root: str
    context: int
    owner: str


def base_url(text: str) -> str:
    """The server's root, without ``openai:`` in front and ``/v1`` behind. Raises InputError."""
    url = text.removeprefix("openai:").strip()
    url = url if "://" in url else f"http://{url}"
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"engine: can't read the address {text!r}; write it as openai:http://host:8000/v1")
    return url


@dataclass(slots=True)
class Server:
    """A server and what was learned of it. ``exact``: prompts and continuations are token ids (/tokenize and
    /v1/completions); ``continues``: a chat may end in a half-written assistant turn; ``seeds``: requests
    carry theirs (None: where the server is not vLLM); ``steers``: ttc's plugin is loaded there (None: not
    asked yet); ``kv_page``: tokens of its KV page, once it is known that requests can set a KV budget;
    ``thinks_in_turn``: a half-written turn need not be told to think no more (llama.cpp refuses it else). Use from one event loop
    only."""

    url: str
    api_key: str | None
    timeout_s: float
    stream_interval: int = 1
    seeds: bool | None = None
    cache_salt: str | None = None
    model: str = ""
    version: str = ""
    context: int = 0
    is_vllm: bool = False
    exact: bool = False
    continues: bool = False
    steers: bool | None = None
    kv_page: int | None = None
    thinks_in_turn: bool = True
    max_field: str = "max_tokens"
    refused: set[str] = field(default_factory=set)
    _wire: Wire | None = None
    _said: set[str] = field(default_factory=set)
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def wire(self) -> Wire:
        if self._wire is None:
            self._wire = Wire(self.url, self.api_key, self.timeout_s)
        return self._wire

    async def close(self) -> None:
        if self._wire is not None:
            await self._wire.close()
            self._wire = None

    def say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            LOG.warning("%s: %s", self.url, message)

    # -- what the server is ------------------------------------------------------------------------
    async def models(self) -> list[ServedModel]:
        """What /v1/models lists. Raises CallFailed, and KeyError, TypeError, ValueError or AttributeError for a list of another
        form."""
        entries = (await self.wire.json("GET", "/v1/models")).get("data") or []
        return [
            ServedModel(
                id=str(entry["id"]),
                root=str(entry.get("root") or ""),
                context=next((int(entry[name]) for name in CONTEXT_FIELDS if entry.get(name)), 0),
                owner=str(entry.get("owned_by") or ""),
            )
            for entry in entries
        ]

    async def learn(self, model: ServedModel) -> None:
        """Find out what the server can do for ``model``, spending no output tokens."""
        self.model = model.id
        try:
            self.version = str((await self.wire.json("GET", "/version")).get("version") or "")
        except CallFailed:
            self.version = ""
        try:
            ids = await self.tokenize(messages=[{"role": "user", "content": "Hi"}])
            self.exact = bool(ids) and await self._exists("/v1/completions")
        except CallFailed as failure:
            if (
                failure.again and failure.status != 501
            ):  # a vLLM that is busy or starting is no server that can't tokenise
                raise
            self.exact = False
        self.is_vllm = model.owner == "vllm" or self.exact
        self.context = model.context or await self._slot_context()
        self.continues = self.is_vllm or model.owner == "sglang"
        if self.seeds is None:
            self.seeds = not self.is_vllm
        if not self.exact:
            self.say_once(
                "no /tokenize or no /v1/completions, so prompts go as chat messages; prompt lengths before "
                "the call and forced tokens are estimates"
            )

    async def learn_plugin(self) -> bool:
        """Whether the server executes instructions (``ttc.engine.control``): one that does refuses a wrong one by name, one that
        does not finds another fault (``_NO_CALL``). Raises CallFailed."""
        async with self._asking:
            if self.steers is None:
                ids = await self.tokenize(text="Hi")
                body = {"model": self.model, "prompt": ids, "max_tokens": 1, "stream": True, **_NO_CALL}
                body |= {"vllm_xargs": {"ttc": '{"?": 0}'}}
                try:
                    await self.wire.stream("/v1/completions", body, lambda delta: True)
                    self.steers = False
                except CallFailed as failure:
                    self.steers = "extra_args['ttc']" in str(failure)
                    if not self.steers and failure.status not in (400, 422):
                        self.steers = None
                        raise
                if self.steers and await self._speculates():
                    self.steers = False
                    self.say_once(
                        "it decodes speculatively, for which vLLM loads no logits processor: chains are capped and steered by calls"
                        " of their own"
                    )
            return self.steers

    async def _speculates(self) -> bool:
        """True if vLLM decodes speculatively there: it then checks our instructions all the same, and executes none."""
        try:
            return "vllm:spec_decode" in (await self.wire.ask("GET", "/metrics"))[2]
        except CallFailed:
            return False

    async def learn_kv(self) -> tuple[int | None, str]:
        """The tokens of the server's KV page where requests can set a KV budget (else None, and why not). Asked as ``learn_plugin``
        asks; the page is in vLLM's /metrics. Raises CallFailed."""
        if not self.exact:
            return (
                None,
                "the server has no /tokenize or no /v1/completions, so it is no vLLM that takes KV budgets",
            )
        ids = await self.tokenize(text="Hi")
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "stream": True, **_NO_CALL}
        body |= {"vllm_xargs": {EXTRA_ARGS_KEY: "{}"}}
        try:
            await self.wire.stream("/v1/completions", body, lambda delta: True)
            return None, _NO_KV_PLUGIN
        except CallFailed as failure:
            if any(name in str(failure) for name in _NO_CALL):
                return None, _NO_KV_PLUGIN
            if EXTRA_ARGS_KEY not in str(failure):
                if failure.status not in (400, 422):
                    raise
                return None, "the server takes no KV budgets"
        _, _, text = await self.wire.ask("GET", "/metrics")
        found = re.search(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', text)
        if found is None:
            return None, "the server's /metrics does not tell its KV page, so a budget can't be checked"
        return int(found[1]), ""

    async def _slot_context(self) -> int:
        """The context of llama.cpp's server, which does not tell it in /v1/models; 0 for any other."""
        try:
            settings = (await self.wire.json("GET", "/props")).get("default_generation_settings")
            return int(settings.get("n_ctx") or 0) if isinstance(settings, dict) else 0
        except (CallFailed, TypeError, ValueError):
            return 0

    async def _exists(self, path: str) -> bool:
        try:
            return (await self.wire.ask("GET", path))[0] != 404  # 405: it is there, for POST
        except CallFailed:
            return False

    # -- tokens ------------------------------------------------------------------------------------
    async def tokenize(
        self, *, text: str = "", messages: Sequence[Mapping[str, str]] = (), effort: float | None = None
    ) -> list[int]:
        """Token ids of a text as it stands, or of chat messages up to where the answer starts."""
        body: dict[str, Any] = {"model": self.model, "add_special_tokens": False}
        if messages:
            body |= {"messages": [dict(m) for m in messages], "add_generation_prompt": True}
            body |= _template_options(effort)
        else:
            body["prompt"] = text
        return [int(i) for i in (await self.wire.json("POST", "/tokenize", body)).get("tokens") or []]

    async def detokenize(self, ids: Sequence[int]) -> str:
        body = {"model": self.model, "tokens": list(ids)}
        return str((await self.wire.json("POST", "/detokenize", body)).get("prompt") or "")

    # -- calls -------------------------------------------------------------------------------------
    async def generate(self, path: str, body: dict[str, Any], receive: Callable[[Delta], bool]) -> None:
        """``Wire.stream``; learns from a refusal which fields the server does not take. Raises CallFailed."""
        try:
            await self.wire.stream(path, body, receive)
        except CallFailed as failure:
            failure.changed = self._learn_thinking(str(failure), body) or (
                failure.status in (400, 422) and self._learn_refused(str(failure), body)
            )
            raise

    def _learn_thinking(self, words: str, body: Mapping[str, Any]) -> bool:
        """True if the server (llama.cpp; by status 400 or 500) wants a half-written turn only where thinking is turned off, and the
        next body will say so."""
        goes_on = bool(body.get("messages")) and body["messages"][-1]["role"] == "assistant"
        told = (body.get("chat_template_kwargs") or {}).get("enable_thinking") is False
        if "enable_thinking" not in words or not goes_on or told or "chat_template_kwargs" in self.refused:
            return False
        self.thinks_in_turn = False
        return True

    def _learn_refused(self, words: str, body: Mapping[str, Any]) -> bool:
        """True if the server named a field of ``body`` that the next body will be without."""
        if "max_tokens" in body and "max_completion_tokens" in words:
            self.max_field = "max_completion_tokens"
            return True
        for name in OPTIONAL_FIELDS:
            if name in body and re.search(rf"\b{name}\b", words):
                self.refused |= {name, "top_logprobs"} if name == "logprobs" else {name}
                self.say_once(f"the server does not take {name!r}; it is left out")
                return True
        return False

    def completion_body(
        self,
        request: Request,
        prompt_ids: Sequence[int],
        max_tokens: int,
        seed: int,
        *,
        answering: bool,
        steering: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The body of a /v1/completions call on token ids; ``answering``: it may not come back empty;
        ``steering``: fields that make the server steer, or stop where the client will."""
        body = self._common(request, max_tokens, seed, answering)
        body |= {"prompt": list(prompt_ids), "return_token_ids": True, **steering}
        kv = KvSetting.asked(request.kv_budget, request.kv_method)
        if (
            kv is not None and self.kv_page is not None
        ):  # what was written under one setting is never read under another
            told = json.dumps(kv.extra_args()[EXTRA_ARGS_KEY])
            body["vllm_xargs"] = body.get("vllm_xargs", {}) | {EXTRA_ARGS_KEY: told}
            body["cache_salt"] = "/".join(filter(None, (self.cache_salt, kv.salt)))
        if "mean-logprob" in request.signals:
            body["logprobs"] = 0
        return self._allowed(body)

    def chat_body(
        self, request: Request, written: str, max_tokens: int, seed: int, *, answering: bool
    ) -> dict[str, Any]:
        """The body of a /v1/chat/completions call; ``written`` is a half-written answer to go on from."""
        body = self._common(request, max_tokens, seed, answering) | _template_options(request.effort)
        messages = [dict(m) for m in request.problem.messages]
        if written:
            messages.append({"role": "assistant", "content": written})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
            if not self.thinks_in_turn:
                options = body.get("chat_template_kwargs", {}) | {"enable_thinking": False}
                body["chat_template_kwargs"] = options
        if "mean-logprob" in request.signals:
            body |= {"logprobs": True, "top_logprobs": 0}
        return self._allowed(body | {"messages": messages})

    def _common(self, request: Request, max_tokens: int, seed: int, answering: bool) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            self.max_field: max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.seeds:
            body["seed"] = seed
        if self.is_vllm:  # name all of the sampling: gaps are filled from the model's generation_config
            body |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"skip_special_tokens": False, "stream_interval": self.stream_interval}
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            if answering:
                body["min_tokens"] = 1
            if self.cache_salt:
                body["cache_salt"] = self.cache_salt
        return body

    def _allowed(self, body: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in body.items() if key not in self.refused}


def _template_options(effort: float | None) -> dict[str, Any]:
    return {} if effort is None else {"chat_template_kwargs": {"effort": effort}}


def choose_model(model: str | None, served: Sequence[ServedModel], url: str) -> ServedModel:
    """The entry that ``model`` names: by id, by path, by a folder's name, or as a nano model. Raises
    InputError."""
    names = ", ".join(m.id for m in served) or "none"
    if model is None:
        if len({m.root or m.id for m in served}) == 1:
            return served[0]
        raise InputError(f"model: {url} serves {names}; name one of them")
    wanted = {model, str(Path(model).expanduser())} | _nano_paths(model)
    for entry in served:
        if (
            {entry.id, entry.root} & wanted
            or Path(entry.id).name == model
            or (entry.root and Path(entry.root).name == model)
        ):
            return entry
    raise InputError(f"model: {url} does not serve {model!r}; it serves {names}")


def _nano_paths(model: str) -> set[str]:
    """Where an embedded model lies, if ``model`` names one."""
    try:
        from ttc import nano

        folder = nano.resolve(model)
    except (ImportError, AttributeError, TTCError):
        return set()
    return {str(folder), str(Path(folder).resolve())} if folder is not None else set()


def cannot_open(url: str, error: CallFailed) -> str:
    words = str(error)
    if error.unreachable:
        mend = (
            "start the server (python -m vllm.entrypoints.openai.api_server --model …) or correct the address"
        )
    elif "HTTP 401" in words or "HTTP 403" in words:
        mend = "set OPENAI_API_KEY"
    elif "HTTP 404" in words or "can't be read" in words or "did not answer in JSON" in words:
        mend = "give the address of an OpenAI-compatible server, such as openai:http://localhost:8000/v1"
    else:
        mend = "see the server's log"
    return f"engine: can't use {url} ({words}); {mend}"
