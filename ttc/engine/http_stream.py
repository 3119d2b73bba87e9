"""An OpenAI-compatible server over HTTP: what it can do, its prompts in tokens, and its streams as ``Delta`` values.

Owns the pooled client, request bodies and the reading of server-sent events; knows nothing of branches, caps and retries. A
failure is a ``CallFailed`` that says whether the same call may succeed later. Differences between servers live here: fields that a
server refuses by name are left out from then on, with one warning each.
"""

from __future__ import annotations

import email.utils
import json
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from ttc.errors import InputError
from ttc.types import Problem, Sampling

LOG = logging.getLogger("ttc.engine.openai")
CONNECT_S = 10.0
KEEPALIVE_S = 4.0  # below uvicorn's 5 s, so that we let go of an idle connection before the server does
LONGEST_RETRY_AFTER_S = 120.0
OPTIONAL_FIELDS = (
    "stream_options", "continue_final_message", "add_generation_prompt", "chat_template_kwargs", "seed", "top_p",
    "top_logprobs", "logprobs",
)  # fmt: skip
"""Fields that a server may refuse by name (status 400 or 422) and that a call can do without."""


class CallFailed(Exception):
    """One HTTP call failed. ``again``: the same call may succeed later; ``wait_s``: the server's Retry-After (0: none given);
    ``unreachable``: no connection could be made at all; ``refused_field``: repeat at once, the body will be without it."""

    def __init__(
        self, message: str, *, again: bool, wait_s: float = 0.0, unreachable: bool = False, refused_field: str = ""
    ) -> None:
        super().__init__(message)
        self.again, self.wait_s, self.unreachable, self.refused_field = again, wait_s, unreachable, refused_field


class Usage(NamedTuple):
    """The server's own counts for one call, so far."""

    prompt: int
    completion: int
    cached: int


class Delta(NamedTuple):
    """One event of a stream. ``tokens`` is the least number of new tokens in it; ``ids`` are empty unless the server sends them;
    ``thought`` is text the server set apart as reasoning."""

    text: str = ""
    thought: str = ""
    ids: tuple[int, ...] = ()
    tokens: int = 0
    logprobs: tuple[float, ...] = ()
    finish: str = ""
    usage: Usage | None = None


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
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise InputError(f"engine: can't read the address {text!r}; write it as openai:http://localhost:8000/v1")
    return url


@dataclass(slots=True)
class Server:
    """A server and what was learned of it. ``exact``: prompts and continuations are token ids (/tokenize and /v1/completions);
    ``continues``: chat messages can end in a half-written assistant turn. Use from one event loop only."""

    url: str
    api_key: str | None
    connections: int
    timeout_s: float
    stream_interval: int
    cache_salt: str | None = None
    model: str = ""
    version: str = ""
    is_vllm: bool = False
    exact: bool = False
    continues: bool = False
    send_seeds: bool = True
    max_field: str = "max_tokens"
    refused: set[str] = field(default_factory=set)
    _client: httpx.AsyncClient | None = None
    _said: set[str] = field(default_factory=set)

    @property
    def client(self) -> httpx.AsyncClient:
        if self._client is None:
            loopback = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
            limits = httpx.Limits(
                max_connections=self.connections + 4,  # 4 for /tokenize, never waiting behind branches
                max_keepalive_connections=self.connections + 4,
                keepalive_expiry=KEEPALIVE_S,
            )
            headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {self.api_key}"} if self.api_key else {})
            self._client = httpx.AsyncClient(
                base_url=self.url, headers=headers, limits=limits, trust_env=not loopback,
                timeout=httpx.Timeout(self.timeout_s, connect=CONNECT_S, pool=None),
                verify=ssl.create_default_context() if self.url.startswith("https") else False,
            )  # fmt: skip
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            LOG.warning("%s: %s", self.url, message)

    # -- what the server is ------------------------------------------------------------------------------------------------
    async def models(self) -> list[ServedModel]:
        """What /v1/models lists. Raises CallFailed."""
        answer = await self._json("GET", "/v1/models")
        return [
            ServedModel(
                str(m.get("id")), str(m.get("root") or ""), int(m.get("max_model_len") or 0), str(m.get("owned_by") or "")
            )
            for m in answer.get("data") or []
        ]

    async def learn(self, model: ServedModel) -> None:
        """Find out what the server can do for ``model``, spending no output tokens."""
        self.model = model.id
        try:
            self.version = str((await self._json("GET", "/version")).get("version") or "")
        except CallFailed:
            self.version = ""
        self.is_vllm = model.owner == "vllm"
        try:
            ids = await self.tokenize(messages=[{"role": "user", "content": "Hi"}])
            self.exact = bool(ids) and await self._exists("/v1/completions")
        except CallFailed:
            self.exact = False
        self.is_vllm = self.is_vllm or self.exact
        self.continues = self.is_vllm or model.owner == "sglang"
        # A seeded request whose prefill is cut kills vLLM's engine on CPU ("CPU Generator does not use offset").
        self.send_seeds = not (self.is_vllm and "cpu" in self.version)
        if not self.exact:
            self.say_once(
                "no /tokenize or no /v1/completions here, so prompts are sent as chat messages; "
                "forced tokens and prompt lengths are estimates"
            )

    async def _exists(self, path: str) -> bool:
        try:
            return (await self.client.get(path)).status_code != 404  # 405: it is there, for POST
        except httpx.HTTPError:
            return False

    # -- tokens ------------------------------------------------------------------------------------------------------------
    async def tokenize(
        self, *, text: str = "", messages: Sequence[Mapping[str, str]] = (), effort: float | None = None
    ) -> list[int]:
        """Token ids of a text as it stands, or of chat messages up to where the answer starts."""
        body: dict[str, Any] = {"model": self.model, "add_special_tokens": False}
        if messages:
            body |= {"messages": [dict(m) for m in messages], "add_generation_prompt": True} | _template_options(effort)
        else:
            body["prompt"] = text
        return [int(i) for i in (await self._json("POST", "/tokenize", body)).get("tokens") or []]

    async def detokenize(self, ids: Sequence[int]) -> str:
        return str((await self._json("POST", "/detokenize", {"model": self.model, "tokens": list(ids)})).get("prompt") or "")

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self.client.request(method, path, json=body)
            if response.status_code != 200:
                raise self._refusal(response)
            answer = response.json()
        except httpx.HTTPError as error:
            raise _broken(error) from error
        except ValueError as error:
            raise CallFailed(f"{path} did not answer in JSON", again=False) from error
        return answer if isinstance(answer, dict) else {}

    # -- bodies ------------------------------------------------------------------------------------------------------------
    def completion_body(self, prompt_ids: Sequence[int], sampling: Sampling, max_tokens: int, **extra: Any) -> dict[str, Any]:
        """The body of a /v1/completions call on token ids. ``extra``: seed, signals (bool), answering (bool)."""
        body = self._common(sampling, max_tokens, extra) | {"prompt": list(prompt_ids), "return_token_ids": True}
        if extra.get("signals"):
            body["logprobs"] = 0
        return self._allowed(body)

    def chat_body(
        self, problem: Problem, written: str, effort: float | None, sampling: Sampling, max_tokens: int, **extra: Any
    ) -> dict[str, Any]:
        """The body of a /v1/chat/completions call; ``written`` is the half-written answer to go on from."""
        messages = [dict(m) for m in problem.messages]
        body = self._common(sampling, max_tokens, extra) | _template_options(effort)
        if written:
            messages.append({"role": "assistant", "content": written})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if extra.get("signals"):
            body |= {"logprobs": True, "top_logprobs": 0}
        return self._allowed(body | {"messages": messages})

    def _common(self, sampling: Sampling, max_tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model, self.max_field: max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.send_seeds:
            body["seed"] = extra["seed"]
        if self.is_vllm:  # all of the sampling is ours: the server would fill gaps from the model's generation_config
            body |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            body["stream_interval"] = self.stream_interval
            body["min_tokens"] = 1 if extra.get("answering") else 0
            if self.cache_salt:
                body["cache_salt"] = self.cache_salt
        return body

    def _allowed(self, body: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in body.items() if key not in self.refused}

    # -- streams -----------------------------------------------------------------------------------------------------------
    async def stream(self, path: str, body: Mapping[str, Any], receive: Callable[[Delta], bool]) -> None:
        """Run one call; ``receive`` sees an empty Delta once the server has accepted, then each event, and returns False to hang
        up. Cancelling closes the connection, at which the server drops the work. Raises CallFailed."""
        try:
            async with self.client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response)
                receive(Delta())
                if response.headers.get("content-type", "").startswith("application/json"):  # it does not stream
                    receive(_delta(json.loads(await response.aread())))
                    return
                await self._events(response, receive)
        except httpx.HTTPError as error:
            raise _broken(error) from error
        except ValueError as error:
            raise CallFailed(f"the server sent an event that is not JSON: {error}", again=True) from error

    @staticmethod
    async def _events(response: httpx.Response, receive: Callable[[Delta], bool]) -> None:
        rest, ended = b"", False
        async for data in response.aiter_raw():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    ended = True
                    continue
                delta = _delta(json.loads(payload))
                ended = ended or bool(delta.finish)
                if not receive(delta):
                    return
        if not ended:
            raise CallFailed("the server closed the stream before its end", again=True)

    def _refusal(self, response: httpx.Response) -> CallFailed:
        """An HTTP status other than 200 as a failure, with the server's own words in one line."""
        status, words = response.status_code, _server_words(response)
        message = f"HTTP {status}: {words}" if words else f"HTTP {status}"
        if status in (400, 422):
            if self.max_field in words and "max_completion_tokens" in words and self.max_field == "max_tokens":
                self.max_field = "max_completion_tokens"
                return CallFailed(message, again=True, refused_field="max_tokens")
            for name in OPTIONAL_FIELDS:
                if name in words and name not in self.refused:
                    self.refused.add(name)
                    self.say_once(f"the server does not take {name!r}; it is left out")
                    return CallFailed(message, again=True, refused_field=name)
        again = status in (408, 409, 425, 429) or status >= 500
        return CallFailed(message, again=again, wait_s=_retry_after_s(response.headers.get("retry-after", "")))


def _template_options(effort: float | None) -> dict[str, Any]:
    return {} if effort is None else {"chat_template_kwargs": {"effort": effort}}


def _delta(event: Any) -> Delta:
    """One event of either API: completions (text), chat (delta), or an unstreamed answer (message)."""
    if not isinstance(event, dict):
        raise ValueError(f"an event is {type(event).__name__}, not an object")
    if event.get("error"):
        error = event["error"]
        words = error.get("message") if isinstance(error, dict) else error
        code = error.get("code") if isinstance(error, dict) else None
        raise CallFailed(one_line(str(words)), again=not (isinstance(code, int) and 400 <= code < 500 and code != 429))
    usage = event.get("usage")
    counted = (
        Usage(
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        )
        if usage
        else None
    )
    choices = event.get("choices")
    if not choices:
        return Delta(usage=counted)
    choice = choices[0]
    part = choice.get("delta") or choice.get("message") or choice
    text = part.get("text") or part.get("content") or ""
    thought = part.get("reasoning_content") or part.get("reasoning") or ""
    ids = tuple(choice.get("token_ids") or ())
    logprobs = _logprobs(choice.get("logprobs"))
    tokens = len(ids) or len(logprobs) or int(bool(text or thought))
    return Delta(text, thought, ids, tokens, logprobs, choice.get("finish_reason") or "", counted)


def _logprobs(found: Any) -> tuple[float, ...]:
    """The sampled tokens' log-probabilities, as /v1/completions or as /v1/chat/completions writes them."""
    if not found:
        return ()
    values = found.get("token_logprobs") or [c.get("logprob") for c in found.get("content") or []]
    return tuple(float(v) for v in values if v is not None)


def _broken(error: httpx.HTTPError) -> CallFailed:
    if isinstance(error, httpx.ReadTimeout):
        return CallFailed("the server sent nothing for too long", again=True)
    unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    words = one_line(str(error)) or type(error).__name__
    return CallFailed(words, again=isinstance(error, httpx.TransportError), unreachable=unreachable)


def _server_words(response: httpx.Response) -> str:
    try:
        found = response.json()
    except ValueError:
        return one_line(response.text)
    if isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail") or found
    if isinstance(found, dict):
        found = found.get("message") or found
    return one_line(str(found))


def _retry_after_s(text: str) -> float:
    """Seconds from a Retry-After header, which holds a number or a date; 0 if there is none or it makes no sense."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if seconds == seconds else 0.0


def one_line(text: str) -> str:
    words = " ".join(text.split())
    return words[:300] + "…" if len(words) > 300 else words
