"""The upstream client against servers that answer every way a server can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from llorch_web.upstream import (
    HIGH_WATER,
    Abandoned,
    Address,
    BadResponse,
    ClosedEarly,
    ConnectFailed,
    TimedOut,
    Upstream,
    UpstreamError,
    split_url,
)

pytestmark = pytest.mark.functional

Script = Callable[["Visit"], Awaitable[None]]


class Visit:
    """One connection as the server sees it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number, self.reader, self.writer = number, reader, writer

    async def request(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return head + await self.reader.readexactly(length)

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()


class Scripted:
    """A server that does what a script says on every connection."""

    def __init__(self, script: Script) -> None:
        self.script, self.visits, self.running = script, 0, set[asyncio.Task[None]]()

    async def visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        try:
            await self.script(Visit(self.visits, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.running.discard(task)
            writer.close()


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[tuple[Scripted, Address, Upstream]]:
    scripted = Scripted(script)
    server = await asyncio.start_server(scripted.visit, "127.0.0.1", 0)
    upstream = Upstream(idle_timeout=2.0)
    try:
        yield scripted, Address("127.0.0.1", server.sockets[0].getsockname()[1]), upstream
    finally:
        await upstream.close()
        server.close()
        if scripted.running:
            await asyncio.wait(scripted.running, timeout=5)
        assert not scripted.running, "a connection was left open"
        assert upstream.open_connections == 0


async def post(upstream: Upstream, address: Address, body: bytes = b"{}") -> tuple[int, bytes]:
    async with await upstream.send(address, "POST", "/x", [("X-A", "b")], body) as exchange:
        return await exchange.head(), await exchange.read(1 << 24)


async def test_sized_answers_keep_the_connection() -> None:
    async def script(visit: Visit) -> None:
        while True:
            request = await visit.request()
            assert b"X-A: b\r\n" in request
            await visit.say(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"he", b"llo")

    async with serving(script) as (server, address, upstream):
        for _ in range(3):
            assert await post(upstream, address) == (200, b"hello")
        assert server.visits == 1


async def test_chunked_answers_come_as_they_are_sent() -> None:
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"3\r\none\r\n")
        await go.wait()
        await visit.say(b"3\r\ntwo\r\n0\r\n\r\n")
        await visit.reader.read()

    async with serving(script) as (_, address, upstream), await upstream.send(address, "POST", "/") as exchange:
        assert await exchange.head() == 200
        assert await anext(exchange) == b"one"
        go.set()
        assert [chunk async for chunk in exchange] == [b"two"]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nKeep-Alive: timeout=5, max=100\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=["event stream", "connection close", "ends with the connection", "http 1.0"],
)
async def test_no_connection_is_reused_that_the_server_will_close(head: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(head)

    async with serving(script) as (server, address, upstream):
        for _ in range(2):
            assert await post(upstream, address) == (200, b"ok")
        assert server.visits == 2


async def test_a_stale_pooled_connection_is_replaced_once_and_unseen() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await visit.request()
        if visit.number > 1:
            await visit.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")

    async with serving(script) as (server, address, upstream):
        assert await post(upstream, address) == (200, b"ok")
        assert await post(upstream, address) == (200, b"ok")
        assert server.visits == 2


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n"], ids=["nothing", "half a head"])
async def test_a_request_on_a_fresh_connection_is_never_sent_twice(sent: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(sent)

    async with serving(script) as (server, address, upstream):
        with pytest.raises(ClosedEarly):
            await post(upstream, address)
        assert server.visits == 1


async def test_a_request_whose_answer_began_on_a_pooled_connection_is_not_sent_again() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await visit.request()
        await visit.say(b"HTTP/1.1 2")

    async with serving(script) as (server, address, upstream):
        await post(upstream, address)
        with pytest.raises(ClosedEarly):
            await post(upstream, address)
        assert server.visits == 1


async def test_an_answer_that_breaks_off_says_so_after_what_came() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    async with serving(script) as (_, address, upstream), await upstream.send(address, "POST", "/") as exchange:
        await exchange.head()
        assert await anext(exchange) == b"half"
        with pytest.raises(ClosedEarly, match="not complete"):
            await anext(exchange)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(200)) + b"\r\n",
    ],
    ids=["not http", "a long header", "many headers"],
)
async def test_what_is_not_an_http_answer_is_refused(answer: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(answer)
        await visit.reader.read()

    async with serving(script) as (_, address, upstream):
        with pytest.raises(BadResponse):
            await post(upstream, address)


async def test_informational_answers_are_skipped() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with serving(script) as (_, address, upstream):
        assert await post(upstream, address) == (200, b"ok")


async def test_a_silent_server_times_out() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.reader.read()

    async with serving(script) as (_, address, upstream):
        exchange = await upstream.send(address, "POST", "/", idle_timeout=0.05)
        with pytest.raises(TimedOut):
            await exchange.head()


async def test_a_closed_port_is_a_connect_failure() -> None:
    async def script(visit: Visit) -> None: ...

    async with serving(script) as (_, address, upstream):
        pass
    upstream = Upstream()
    with pytest.raises(ConnectFailed):
        await upstream.send(address, "POST", "/")
    await upstream.close()


async def test_a_reader_that_stops_stops_the_server_and_loses_nothing() -> None:
    total, sent = 64 << 20, 0

    async def script(visit: Visit) -> None:
        nonlocal sent
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total >> 16):
            await visit.say(b"x" * (1 << 16))
            sent += 1 << 16

    async with serving(script) as (_, address, upstream), await upstream.send(address, "POST", "/") as exchange:
        await exchange.head()
        await asyncio.sleep(0.3)
        assert sent < total // 2, "the server was never slowed down"
        sizes = [len(chunk) async for chunk in exchange]
        assert sum(sizes) == total
        assert max(sizes) < HIGH_WATER * 3


async def test_the_end_of_a_paused_answer_is_seen_as_soon_as_it_is_read() -> None:
    body = b"x" * (HIGH_WATER + 1)

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\n\r\n", body)

    async with serving(script) as (_, address, upstream), await upstream.send(address, "POST", "/") as exchange:
        await exchange.head()
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(exchange.read(1 << 24), 1) == body


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_the_server_sees_at_once_that_the_client_is_gone(how: str) -> None:
    gone = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.reader.read()
        gone.set()

    async def ask(upstream: Upstream, address: Address) -> None:
        async with await upstream.send(address, "POST", "/") as exchange:
            await exchange.head()

    async with serving(script) as (_, address, upstream):
        if how == "cancel":
            task = asyncio.create_task(ask(upstream, address))
            await asyncio.sleep(0.05)
            task.cancel()
        else:
            (await upstream.send(address, "POST", "/")).close()
        await asyncio.wait_for(gone.wait(), 1)


async def test_an_abandoned_exchange_wakes_who_waits_for_it() -> None:
    async def script(visit: Visit) -> None:
        await visit.reader.read()

    async with serving(script) as (_, address, upstream):
        exchange = await upstream.send(address, "POST", "/")
        asyncio.get_running_loop().call_later(0.02, exchange.abandon, Abandoned("taken for dead"))
        with pytest.raises(Abandoned, match="taken for dead"):
            await exchange.head()


async def test_leaving_ends_when_the_server_has_let_go() -> None:
    let_go = 0.0

    async def script(visit: Visit) -> None:
        nonlocal let_go
        await visit.request()
        await visit.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        assert await visit.reader.read() == b""
        await visit.say(b"5\r\nagain\r\n")
        await asyncio.sleep(0.1)
        let_go = asyncio.get_running_loop().time()

    async with serving(script) as (_, address, upstream):
        exchange = await upstream.send(address, "POST", "/", reuse=False)
        await exchange.head()
        assert await exchange.leave(5.0)
        assert let_go > 0
        assert asyncio.get_running_loop().time() - let_go < 0.05


async def test_leaving_does_not_wait_for_ever() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        assert await visit.reader.read() == b""
        while not visit.writer.is_closing():
            await asyncio.sleep(0.01)
            await visit.say(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    async with serving(script) as (_, address, upstream):
        exchange = await upstream.send(address, "POST", "/", reuse=False)
        assert not await exchange.leave(0.1)
        with pytest.raises(UpstreamError):
            await exchange.head()


async def test_a_header_cannot_smuggle_another() -> None:
    upstream = Upstream()
    with pytest.raises(ValueError, match="line break"):
        await upstream.send(Address("127.0.0.1", 1), "POST", "/", [("X", "a\r\nY: b")])
    await upstream.close()


def test_urls_split_into_address_and_path() -> None:
    assert split_url("http://10.0.0.1:9200/replicas/a-1") == (Address("10.0.0.1", 9200), "/replicas/a-1")
    assert split_url("http://[::1]:9200/") == (Address("::1", 9200), "")
    assert split_url("https://gpu-1/x") == (Address("gpu-1", 443, True), "/x")
    for bad in ("ftp://x", "x", "http:///p", "http://u@h/"):
        with pytest.raises(ValueError, match="http URL"):
            split_url(bad)
