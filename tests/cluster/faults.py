"""A proxy in front of an API server that can be made to fail: refuse, stall, cut, and answer in the server's place."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from cluster.apiserver import ApiServer

_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "host"}
Answer = Callable[[web.Request], web.StreamResponse | None]


@dataclass
class FaultyProxy:
    """A running proxy. Plain HTTP on this side."""

    url: str
    answer: Answer = lambda _: None
    """Answers in the server's place; None lets a request through."""
    requests: list[str] = field(default_factory=list)
    """`METHOD /path?query` of every request, also of those that were refused."""
    connections: set[tuple[str, int]] = field(default_factory=set)
    """The client's ends of all connections that there ever were."""
    streams: int = 0
    """Answers under way."""
    _refusing: bool = False
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _transports: set[asyncio.Transport] = field(default_factory=set)

    def cut(self, *, refuse: bool = False) -> None:
        """Resets every connection; with `refuse`, every further request too, until `mend`."""
        self._refusing = refuse
        for transport in self._transports:
            transport.abort()

    def stall(self) -> None:
        """From now on nothing comes through, and no connection is closed, until `mend`."""
        self._flowing.clear()

    def mend(self) -> None:
        """Ends refusing and stalling."""
        self._refusing = False
        self._flowing.set()


@asynccontextmanager
async def faulty_proxy(server: ApiServer) -> AsyncIterator[FaultyProxy]:
    """Runs a proxy in front of `server`."""
    tls = ssl.create_default_context(cafile=str(server.ca))
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    # The server's gzip goes through as it is.
    async with aiohttp.ClientSession(server.url, connector=connector, auto_decompress=False) as upstream:
        proxy = FaultyProxy(url="")
        proxy.mend()

        async def handle(request: web.Request) -> web.StreamResponse:
            return await _forwarded(proxy, upstream, request)

        application = web.Application(client_max_size=1 << 24)
        application.router.add_route("*", "/{path:.*}", handle)
        # Cancelled as soon as the client goes, so that the server's side goes too.
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield proxy
        finally:
            proxy.mend()
            proxy.cut()
            await runner.cleanup()


async def _forwarded(proxy: FaultyProxy, upstream: aiohttp.ClientSession, request: web.Request) -> web.StreamResponse:
    assert isinstance(request.transport, asyncio.Transport)
    transport = request.transport
    proxy.requests.append(f"{request.method} {request.path_qs}")
    proxy.connections.add(transport.get_extra_info("peername"))
    if proxy._refusing:
        transport.abort()
        return web.Response(status=502)
    if (answer := proxy.answer(request)) is not None:
        return answer
    headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
    proxy.streams += 1
    proxy._transports.add(transport)
    try:
        await proxy._flowing.wait()
        body = await request.read()
        async with upstream.request(request.method, request.path_qs, headers=headers, data=body) as theirs:
            ours = web.StreamResponse(status=theirs.status)
            ours.headers.update({name: value for name, value in theirs.headers.items() if name.lower() not in _HOP_BY_HOP})
            if "Content-Encoding" in theirs.headers:
                ours.headers["Content-Encoding"] = theirs.headers["Content-Encoding"]
            await ours.prepare(request)
            async for chunk in theirs.content.iter_any():
                await proxy._flowing.wait()
                await ours.write(chunk)
            await ours.write_eof()
            return ours
    except (ConnectionError, aiohttp.ClientError):
        transport.abort()
        return web.Response(status=502)
    finally:
        proxy._transports.discard(transport)
        proxy.streams -= 1
