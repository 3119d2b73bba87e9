"""A connection pool for many streams at once: an httpx transport that gives every running call a connection
of its own and keeps the idle ones.

httpx's own pool looks through all connections and all waiting requests whenever a call starts or ends: with
64 streams that is ten milliseconds of Python per call, a hidden cap on the server's throughput. Here one
httpx transport with one connection serves a call at a time, so the cost does not grow with the number of
calls (11 ms against 2 ms a call, measured with 64 streams of 10 events). How many run at once is for the
caller to bound.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx

KEEPALIVE_S = 4.0  # below uvicorn's 5 s: we let go of an idle connection before the server does


class ConnectionPerCall(httpx.AsyncBaseTransport):
    """``proxy`` is passed on to httpx. The most recently used connection is taken first, so that the others
    can expire."""

    def __init__(self, *, verify: bool, proxy: str | None = None) -> None:
        # One context for all: making one takes longer than a call. Unverified it is never used (http).
        self._context = ssl.create_default_context() if verify else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._proxy = proxy
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._closed = False

    def _new(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S)
        return httpx.AsyncHTTPTransport(verify=self._context, limits=limits, proxy=self._proxy)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        transport = self._idle.pop() if self._idle else self._new()
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            await transport.aclose()
            raise
        stream = _Returning(response.stream, self, transport)
        return httpx.Response(
            response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
        )

    async def give_back(self, transport: httpx.AsyncHTTPTransport) -> None:
        if self._closed:
            await transport.aclose()
        else:
            self._idle.append(transport)

    async def aclose(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()


class _Returning(httpx.AsyncByteStream):
    """A response body that gives its connection back once it is closed (httpx closes every response)."""

    def __init__(self, inner: Any, pool: ConnectionPerCall, transport: httpx.AsyncHTTPTransport) -> None:
        self._inner, self._pool, self._transport = inner, pool, transport
        self._open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            yield part

    async def aclose(self) -> None:
        if not self._open:
            return
        self._open = False
        await self._inner.aclose()
        await self._pool.give_back(self._transport)
