"""HTTP calls to an OpenAI-compatible server: a stream of events as ``Delta`` values, failures as ``CallFailed``.

Owns the client (aiohttp, whose streamed calls cost less processor time than httpx's) and its connections, and the wire format
(server-sent events, both APIs' shapes, error bodies, Retry-After). No retries, no caps.
"""

from __future__ import annotations

import email.utils
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

CONNECT_S = 10.0
KEEPALIVE_S = 4.0  # below uvicorn's 5 s: we let go of an idle connection before the server does
LONGEST_RETRY_AFTER_S = 120.0
LONG_WORD_BYTES, BYTES_PER_TOKEN = 24, 3
"""An event with more text than the one holds several tokens, a token for every three bytes: by estimate, on the safe side."""
CUT = ("length", "max_tokens", "max_output_tokens", "model_length")
"""How servers say that a text ended at its cap (in any case); "model_length" is Mistral's word for the context."""
BROKE = ("abort", "error", "insufficient_system_resource")
"""How they say that they gave up; the last is DeepSeek's."""


class CallFailed(Exception):
    """One HTTP call failed. ``status`` is 0 where there was none; ``again``: the same call may succeed later;
    ``wait_s``: the server's Retry-After (0: none given); ``unreachable``: no connection could be made;
    ``changed``: the caller has learned from the failure and shall repeat at once."""

    def __init__(
        self, message: str, *, again: bool, status: int = 0, wait_s: float = 0.0, unreachable: bool = False
    ) -> None:
        super().__init__(message)
        self.again, self.status, self.wait_s, self.unreachable = again, status, wait_s, unreachable
        self.changed = False


class Usage(NamedTuple):
    """The server's own counts for one call, so far."""

    prompt: int
    completion: int
    cached: int


class Delta(NamedTuple):
    """One event of a stream. ``tokens`` is how many new tokens it holds, an estimate where the server does not say (one, or more
    for a long text); ``ids`` are empty unless the server sends them; ``thought`` is text that the server set apart as
    reasoning; ``finish`` is "length" for all words for that."""

    text: str = ""
    thought: str = ""
    ids: tuple[int, ...] = ()
    tokens: int = 0
    logprobs: tuple[float, ...] = ()
    finish: str = ""
    usage: Usage | None = None


class Wire:
    """A pooled client of one server, for one event loop. Every running call has a connection of its own, however many there are;
    idle ones are kept. ``timeout_s`` is the longest silence while an answer is awaited. Every call raises CallFailed."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        headers = {"accept-encoding": "identity"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self.url = url
        self._client = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=_proxy(url),
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of an answer, whatever its status."""
        try:
            async with self._client.request(method, self.url + path, json=body) as response:
                return response.status, response.headers, await response.text(errors="replace")
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _broken(error) from error

    async def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The object that a call answers with; {} if it answers with something else."""
        status, headers, text = await self.ask(method, path, body)
        if status != 200:
            raise refusal(status, headers, text)
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise CallFailed(f"{path} did not answer in JSON", again=False) from error
        return answer if isinstance(answer, dict) else {}

    async def stream(self, path: str, body: Mapping[str, Any], receive: Callable[[Delta], bool]) -> None:
        """Run one call to its end. ``receive`` sees an empty Delta once the server has accepted, then each event, and returns
        False to hang up. Cancelling closes the connection, at which a server drops the work. A stream that breaks off raises
        CallFailed, too."""
        try:
            response = await self._client.post(self.url + path, json=body)
            try:
                if response.status != 200:
                    raise refusal(response.status, response.headers, await response.text(errors="replace"))
                receive(Delta())
                if response.content_type == "application/json":  # not streamed
                    receive(parse_event(json.loads(await response.read())))
                else:
                    await _read_events(response.content, receive)
            finally:  # back to the pool if it was read to its end, else closed
                response.release()
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _broken(error) from error
        except ValueError as error:
            raise CallFailed(f"the server sent an event that can't be read: {error}", again=True) from error


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for ``url`` (HTTPS_PROXY, NO_PROXY …); never one for loopback."""
    parts = urlsplit(url)
    if parts.hostname in ("localhost", "127.0.0.1", "::1") or proxy_bypass(parts.hostname or ""):
        return None
    found = getproxies()
    return found.get(parts.scheme) or found.get("all")


async def _read_events(content: aiohttp.StreamReader, receive: Callable[[Delta], bool]) -> None:
    rest, ended = b"", False
    async for data in content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            name, _, payload = line.partition(b":")
            payload = payload.strip()
            if payload == b"[DONE]":
                ended = True
                continue
            if name == b"error" and payload.startswith(b"{"):  # llama.cpp's own way, until 2025
                delta = parse_event({"error": json.loads(payload)})
            elif name == b"data" and payload:
                delta = parse_event(json.loads(payload))
            else:
                continue
            ended = ended or bool(delta.finish)
            if not receive(delta):
                return
            if delta.finish in BROKE:
                raise CallFailed(f"the server ended the request with {delta.finish!r}", again=True)
    if not ended:
        raise CallFailed("the server closed the stream before its end", again=True)


def parse_event(event: Any) -> Delta:
    """One event of either API: completions (text), chat (delta), or an answer in one piece (message).

    Raises CallFailed for an error event and ValueError for what is no event.
    """
    if not isinstance(event, dict):
        raise ValueError(f"{type(event).__name__} instead of an object")
    error = event.get("error") or (event if event.get("object") == "error" else None)
    if error:
        words = error.get("message") if isinstance(error, dict) else error
        code = error.get("code") if isinstance(error, dict) else None
        ours = isinstance(code, int) and 400 <= code < 500 and code not in (408, 429)
        raise CallFailed(one_line(str(words)), again=not ours)
    usage = _usage(event.get("usage"))
    choices = event.get("choices")
    if not choices:
        return Delta(usage=usage)
    choice = choices[0]
    part = choice.get("delta") or choice.get("message") or choice
    text = part.get("text") or part.get("content") or ""
    thought = part.get("reasoning_content") or part.get("reasoning") or ""
    if not isinstance(text, str):
        text, apart = _pieces(text)
        thought = thought or apart
    ids = tuple(choice.get("token_ids") or ())
    logprobs = _logprobs(choice.get("logprobs"))
    tokens = len(ids) or len(logprobs) or _estimate(text) + _estimate(thought)
    finish = str(choice.get("finish_reason") or "")
    return Delta(text, thought, ids, tokens, logprobs, "length" if finish.lower() in CUT else finish, usage)


def _pieces(content: Any) -> tuple[str, str]:
    """(text, thought) of a content that is a list of typed pieces, as Mistral's reasoning models write it."""
    texts = {"text": "", "thinking": ""}
    for piece in content if isinstance(content, list) else ():
        kind = piece.get("type") if isinstance(piece, dict) else None
        if kind in texts:
            value = piece.get(kind) or ""
            texts[kind] += value if isinstance(value, str) else _pieces(value)[0]
    return texts["text"], texts["thinking"]


def _estimate(text: str) -> int:
    size = len(text.encode())
    return int(size > 0) if size <= LONG_WORD_BYTES else -(-size // BYTES_PER_TOKEN)


def _usage(found: Any) -> Usage | None:
    """The counts of one answer. Of servers whose ``completion_tokens`` leave the reasoning out (xAI, Gemini) the total holds it."""
    if not found:
        return None
    details = found.get("prompt_tokens_details") or {}
    prompt, completion = int(found.get("prompt_tokens") or 0), int(found.get("completion_tokens") or 0)
    return Usage(
        prompt,
        max(completion, int(found.get("total_tokens") or 0) - prompt),
        int(details.get("cached_tokens") or 0),
    )


def _logprobs(found: Any) -> tuple[float, ...]:
    """The sampled tokens' log-probabilities, as either API writes them."""
    if not found:
        return ()
    values = found.get("token_logprobs") or [c.get("logprob") for c in found.get("content") or []]
    return tuple(float(v) for v in values if v is not None)


def refusal(status: int, headers: Mapping[str, str], text: str) -> CallFailed:
    """An HTTP status other than 200 as a failure, with the server's own words in one line. OpenAI says of an account without credit
    that there were too many requests: that is 402, for which no waiting helps."""
    words = _server_words(text)
    if status == 429 and "insufficient_quota" in text:
        status = 402
    return CallFailed(
        f"HTTP {status}: {words}" if words else f"HTTP {status}",
        again=status in (408, 409, 425, 429) or status >= 500,
        status=status,
        wait_s=retry_after_s(headers.get("retry-after", "")),
    )


def _broken(error: Exception) -> CallFailed:
    """A failure of the connection itself."""
    if isinstance(error, aiohttp.SocketTimeoutError):
        return CallFailed("the server sent nothing for too long", again=True)
    unreachable = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    words = one_line(str(error)) or type(error).__name__
    if isinstance(
        error, aiohttp.ClientConnectorError
    ):  # the system's own words: aiohttp's speak of ssl also where there is none
        number = error.os_error.errno or 0
        words = os.strerror(number) if number > 0 else error.os_error.strerror or words
    return CallFailed(words, again=not isinstance(error, aiohttp.InvalidURL), unreachable=unreachable)


def _server_words(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return one_line(text)
    if isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail") or found
    if isinstance(found, dict):
        found = found.get("message") or found
    return one_line(str(found))


def retry_after_s(text: str) -> float:
    """Seconds from a Retry-After header, which holds a number or a date; 0 where it makes no sense."""
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
