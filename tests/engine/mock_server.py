"""A scripted OpenAI-compatible server in a thread of the test: pure asyncio, one character a token.

As vLLM (``exact=True``) it has /tokenize, /detokenize, /v1/completions on token ids, and reports usage in
every event; otherwise it knows chat completions only. A test gives a function from ``Call`` to ``Script``:
what the model writes, and what goes wrong. The server keeps its own books: tokens sampled, prompts accepted,
calls open at once, calls that the client hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

END = 0
"""The end-of-sequence token; all others are the character's own number."""


@dataclass(frozen=True)
class Call:
    """One generation call; ``prompt`` is all text up to where the model goes on, ``number`` counts from 0."""

    path: str
    body: Mapping[str, Any]
    prompt: str
    number: int


@dataclass(frozen=True)
class Script:
    """What the server does with one call. ``text`` then the end of sequence; ``thought`` is sent apart, as
    reasoning, before it; ``endless``: ``text`` over and over; ``drop_after`` / ``hang_after``: that many
    tokens, then the connection breaks, or nothing more comes; ``deaf``: max_tokens is ignored; ``whole``: no
    stream, one JSON answer; ``slow``: it samples a token and comes to no answer, not even a status; ``hold``: the last token
    comes once this is true."""

    text: str = ""
    thought: str = ""
    endless: bool = False
    status: int = 200
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    hang_after: int | None = None
    delay_s: float = 0.0
    usage: bool = True
    interval: int = 1
    deaf: bool = False
    whole: bool = False
    slow: bool = False
    hold: Callable[[], bool] = lambda: True


Model = Callable[[Call], Script]


class MockServer:
    """Use as a context manager; ``url`` is then open. Attributes are the server's books."""

    def __init__(
        self,
        model: Model,
        *,
        exact: bool = True,
        opens: str = "",
        name: str = "mock",
        context: int | None = 4096,
    ) -> None:
        self.model, self.exact, self.opens, self.name, self.context = model, exact, opens, name, context
        self.sampled = self.prompted = self.open = self.peak = self.hung_up = 0
        self.calls: list[Call] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> MockServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512)

    async def _shut(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.CancelledError, OSError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False ends the connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return False
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        body = json.loads(raw) if raw else {}
        if path in ("/v1/completions", "/v1/chat/completions") and method == "POST" and self._serves(path):
            return await self._generate(path, body, reader, writer)
        status, answer = self._answer(method, path, body)
        _send_json(writer, status, answer)
        return True

    def _serves(self, path: str) -> bool:
        return self.exact or path == "/v1/chat/completions"

    def _answer(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            entry = {
                "id": self.name,
                "owned_by": "vllm" if self.exact else "someone",
                "max_model_len": self.context,
            }
            return 200, {"data": [entry]}
        if self.exact and path == "/version":
            return 200, {"version": "9.9.9"}
        if self.exact and path == "/tokenize":
            text = body["prompt"] if "prompt" in body else self._render(body["messages"])
            return 200, {"tokens": [ord(c) for c in text], "count": len(text)}
        if self.exact and path == "/detokenize":
            return 200, {"prompt": "".join(chr(i) for i in body["tokens"])}
        return (405 if self._serves(path) and path.startswith("/v1/") else 404), {"detail": "Not Found"}

    def _render(self, messages: list[Mapping[str, str]]) -> str:
        written = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        asked = messages[:-1] if written is not None else messages
        return "|".join(m["content"] for m in asked) + "|" + (self.opens if written is None else written)

    async def _generate(
        self, path: str, body: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        ids = body.get("prompt")
        prompt = "".join(chr(i) for i in ids) if ids is not None else self._render(body["messages"])
        call = Call(path, body, prompt, len(self.calls))
        self.calls.append(call)
        script = self.model(call)
        if script.status != 200:
            _send_json(writer, script.status, {"error": {"message": script.message}}, script.headers)
            return True
        for _ in range(8):  # whoever hung up before this call came is counted first
            await asyncio.sleep(0)
        self.open += 1
        self.peak = max(self.peak, self.open)
        self.prompted += len(prompt)
        watch = asyncio.ensure_future(reader.read(1))
        work = asyncio.ensure_future(self._write(call, script, writer))
        try:
            await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.hung_up += 1
                return False
            return work.result()
        finally:
            self.open -= 1
            for task in (watch, work):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task

    async def _write(self, call: Call, script: Script, writer: asyncio.StreamWriter) -> bool:
        """The stream of one call; False breaks the connection."""
        tokens = script.thought + script.text
        cap = (
            1_000_000
            if script.deaf
            else call.body.get("max_tokens", call.body.get("max_completion_tokens", 16))
        )
        if script.endless:
            tokens = tokens * (cap // max(len(tokens), 1) + 1) if not script.deaf else tokens * 1000
        ids = ([ord(c) for c in tokens] + [END])[:cap]
        stopped = len(ids) <= len(tokens) or len(tokens) < cap
        words = call.body.get("stop", ())
        ends = [
            i
            for i, token in enumerate(ids)
            if token in call.body.get("stop_token_ids", ())
            or any("".join(map(chr, ids[: i + 1])).endswith(word) for word in words)
        ]
        ids = ids[: ends[0] + 1] if ends else ids
        finish = "stop" if ends or (stopped and ids[-1] == END) else "length"
        if script.whole:
            self.sampled += len(ids)
            message = {"role": "assistant", "content": script.text[:cap]}
            usage = {"prompt_tokens": len(call.prompt), "completion_tokens": len(ids)}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            _send_json(writer, 200, {"choices": [choice], "usage": usage})
            return True
        if script.slow:
            self.sampled += 1
            await asyncio.sleep(3600)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        sent = 0
        while sent < len(ids):
            width = 1 if sent == 0 else script.interval
            part = ids[sent : sent + width]
            for position in range(sent, sent + len(part)):
                if position == script.drop_after:
                    await writer.drain()
                    return False
                if position == script.hang_after:
                    await asyncio.sleep(3600)
                while position == len(ids) - 1 and not script.hold():
                    await asyncio.sleep(0.002)
                self.sampled += 1
            sent += len(part)
            last = sent >= len(ids)
            _send_event(writer, self._event(call, script, sent, part, finish if last else None))
            await writer.drain()
            await asyncio.sleep(script.delay_s)
        if script.usage:
            _send_event(writer, {"choices": [], "usage": _usage(call, sent)})
        _send_chunk(writer, b"data: [DONE]\n\n")
        _send_chunk(writer, b"")
        await writer.drain()
        return True

    def _event(
        self, call: Call, script: Script, sent: int, part: list[int], finish: str | None
    ) -> Mapping[str, Any]:
        hidden = (END, *call.body.get("stop_token_ids", ()))
        if call.body.get("include_stop_str_in_output"):
            hidden = (END,)
        text = "".join(chr(i) for i in part if i not in hidden)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if call.path == "/v1/completions":
            choice |= {"text": text, "token_ids": part}
            if call.body.get("logprobs") is not None:
                choice["logprobs"] = {"token_logprobs": [-0.5] * len(part)}
        else:
            thinking = sent <= len(script.thought)
            choice["delta"] = {"reasoning_content" if thinking else "content": text}
        event: dict[str, Any] = {"choices": [choice]}
        if script.usage and (call.body.get("stream_options") or {}).get("continuous_usage_stats"):
            event["usage"] = _usage(call, sent)
        return event


def _usage(call: Call, sent: int) -> dict[str, Any]:
    return {
        "prompt_tokens": len(call.prompt),
        "completion_tokens": sent,
        "total_tokens": len(call.prompt) + sent,
    }


def _send_json(
    writer: asyncio.StreamWriter, status: int, answer: Any, headers: Mapping[str, str] | None = None
) -> None:
    data = json.dumps(answer).encode()
    lines = [f"HTTP/1.1 {status} Scripted", "content-type: application/json", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)


def _send_event(writer: asyncio.StreamWriter, event: Any) -> None:
    _send_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
