"""A scripted OpenAI-compatible server in a thread of the test: pure asyncio, one character a token.

As vLLM (``exact=True``) it has /tokenize, /detokenize, /v1/completions on token ids, and reports usage in every event; otherwise it
knows chat completions only. With ``plugin`` it says that it has ttc's (what it then does is the model's), with ``speculates`` that
it decodes speculatively. A test gives a function from ``Call`` to ``Script``: what the model writes, and what goes wrong. The
server keeps its own books: tokens sampled, prompts accepted, calls open at once, calls that the client hung up on. Nothing in it
takes a time: what comes late waits for a condition.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tests.waiting import LIMIT_S

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
    reasoning, before it; ``raw``: the stream's bytes, in place of all that; ``endless``: ``text`` over and over;
    ``drop_after`` / ``hang_after``: that many tokens, then the connection breaks, or nothing more comes; ``deaf``: max_tokens is
    ignored; ``whole``: no stream, one JSON answer; ``mute``: it samples a token and comes to no answer, not even a status;
    ``gate``: the token at a position (from 0) is sampled once this is true of it."""

    text: str = ""
    thought: str = ""
    raw: tuple[bytes, ...] = ()
    endless: bool = False
    status: int = 200
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    hang_after: int | None = None
    usage: bool = True
    interval: int = 1
    deaf: bool = False
    whole: bool = False
    mute: bool = False
    gate: Callable[[int], bool] = lambda position: True


Model = Callable[[Call], Script]


class _Reader(asyncio.StreamReader):
    """Knows when the client has hung up, without taking anything from the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


class MockServer:
    """Use as a context manager; ``url`` is then open. Attributes are the server's books: ``accepted`` are connections so far;
    ``peak`` the most calls that ran at once, by what the system knows at each call's arrival of those that hung up before it;
    a call is over before the client can have its end."""

    def __init__(
        self,
        model: Model,
        *,
        exact: bool = True,
        opens: str = "",
        name: str = "mock",
        context: int | None = 4096,
        plugin: bool = False,
        speculates: bool = False,
        port: int = 0,
    ) -> None:
        self.plugin, self.speculates, self.port = plugin, speculates, port
        self.model, self.exact, self.opens, self.name, self.context = model, exact, opens, name, context
        self.sampled = self.prompted = self.peak = self.hung_up = self.accepted = 0
        self.calls: list[Call] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> MockServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(timeout=LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def open(self) -> int:
        return len(self._open)

    async def _listen(self) -> asyncio.Server:
        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(_Reader(), self._accept)

        return await self._loop.create_server(protocol, "127.0.0.1", self.port, backlog=512)

    def refuse(self) -> None:
        """Take no connection any more, and let those that are there live, as a server that is being restarted."""

        async def close() -> None:
            self._server.close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    def welcome(self) -> None:
        """Take connections again, at the same ``port``."""
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _shut(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert isinstance(reader, _Reader)
        self._connections.add(task)
        self.accepted += 1
        try:
            while await self._one(reader, writer) and self._server.is_serving():
                pass
        except (asyncio.CancelledError, asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one(self, reader: _Reader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False ends the connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
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
        if self.speculates and path == "/metrics":
            return 200, 'vllm:spec_decode_num_drafts_total{engine="0"} 0.0'
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
        self, path: str, body: Mapping[str, Any], reader: _Reader, writer: asyncio.StreamWriter
    ) -> bool:
        if "routed_experts_prompt_start" in body:  # asked for plugins: as vLLM, it says what it finds first
            found = "extra_args['ttc']: unknown key '?'" if self.plugin else "routed_experts_prompt_start"
            _send_json(writer, 400, {"error": {"message": found}})
            return True
        ids = body.get("prompt")
        prompt = "".join(chr(i) for i in ids) if ids is not None else self._render(body["messages"])
        call = Call(path, body, prompt, len(self.calls))
        self.calls.append(call)
        script = self.model(call)
        if script.status != 200:
            _send_json(writer, script.status, {"error": {"message": script.message}}, script.headers)
            return True
        self.prompted += len(prompt)
        self._open.add(writer)
        self.peak = max(self.peak, self._running())
        gone = asyncio.ensure_future(reader.gone.wait())
        work = asyncio.ensure_future(self._write(call, script, writer))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not isinstance(work.exception(), OSError):
                return work.result()
            if writer in self._open:
                self._open.discard(writer)
                self.hung_up += 1
            return False
        finally:
            self._open.discard(writer)
            for task in (gone, work):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task

    def _running(self) -> int:
        """Open calls whose client has not hung up, whether or not this thread has come to notice."""
        numbers: list[int] = [writer.get_extra_info("socket").fileno() for writer in self._open]
        poll = select.poll()
        for number in numbers:
            if number >= 0:
                poll.register(number, select.POLLRDHUP)
        return sum(number >= 0 for number in numbers) - len(poll.poll(0))

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
            self._open.discard(writer)
            _send_json(writer, 200, {"choices": [choice], "usage": usage})
            return True
        if script.mute:
            self.sampled += 1
            await asyncio.sleep(3600)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for data in script.raw:
            _send_chunk(writer, data)
            await writer.drain()
        if script.raw:
            self._open.discard(writer)
            _send_chunk(writer, b"")
            await writer.drain()
            return True
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
                while not script.gate(position):
                    await asyncio.sleep(0.002)
                self.sampled += 1
            sent += len(part)
            last = sent >= len(ids)
            _send_event(writer, self._event(call, script, sent, part, finish if last else None))
            await writer.drain()
            await asyncio.sleep(0)
        self._open.discard(writer)
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
