"""A small HTTP/1.1 client for proxies: pooled connections, streamed answers, exact about what happened to a request.

- A connection goes back to the pool only after a complete answer of known length that announced keep-alive. After an event
  stream, `Connection: close`, an answer that ends with the connection, or a broken one, it is closed: llama-server announces
  keep-alive on event streams and closes all the same.
- A request is sent again only when a pooled connection turned out stale: closed by the peer without one byte of an answer.
  Then once, on a fresh connection.
- Cancelling a wait leaves the exchange as it is; `close` aborts it at once, and `leave` half-closes it and waits for the peer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from .upstream_connection import Address, Connection
from .upstream_errors import Abandoned, BadResponse, ClosedEarly, ConnectFailed, TimedOut, UpstreamError

__all__ = [
    "Abandoned",
    "Address",
    "BadResponse",
    "ClosedEarly",
    "ConnectFailed",
    "Exchange",
    "TimedOut",
    "Upstream",
    "UpstreamError",
    "split_url",
]

HIGH_WATER = 256 * 1024
"""Bytes an exchange buffers before it stops reading from the peer."""
MAX_IDLE_SECONDS = 30.0
"""A pooled connection older than this is not used again: something on the way may have forgotten it."""

Headers = Sequence[tuple[str, str]]


def split_url(url: str) -> tuple[Address, str]:
    """`http://host:port/path` as address and path without a trailing slash; https too. ValueError for anything else."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{url!r} is not an http URL with a host")
    tls = parts.scheme == "https"
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls), parts.path.rstrip("/")


class Exchange:
    """One request and its answer.

    `await head()` until the answer begins, then iterate over the chunks of its body. Use as an async context manager, or
    call `close`: an answer that is not complete by then is aborted.
    """

    __slots__ = (
        "_chunks",
        "_complete",
        "_connection",
        "_error",
        "_idle_timeout",
        "_owner",
        "_payload",
        "_size",
        "_waiter",
        "address",
        "discarding",
        "headers",
        "received",
        "reusable",
        "status",
    )

    def __init__(self, owner: Upstream, address: Address, payload: bytes, *, idle_timeout: float, reusable: bool) -> None:
        self._owner = owner
        self.address = address
        self._payload = payload
        self._idle_timeout = idle_timeout
        self.reusable = reusable
        self._reset()

    def _reset(self) -> None:
        self._connection: Connection | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._complete = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.discarding = False
        self.received = False
        """True once one byte of the answer came."""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        """Lower-case names; the last of several lines of one name."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        """True once the peer has nothing more to do for this request, as far as this side can know."""
        return self._complete or self._error is not None

    async def head(self) -> int:
        """Waits for the answer to begin and returns its status. Raises UpstreamError."""
        while True:
            try:
                while self.status == 0:
                    await self._wait()
                return self.status
            except ClosedEarly:
                stale = self._connection is not None and self._connection.reused and not self.received
                if not stale:
                    raise
            self._reset()
            connection = await self._owner.connect(self.address)
            if self._error is not None:  # given up meanwhile
                connection.transport.abort()
                raise self._error
            self.attach(connection)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """What came since the last call, in one piece. Raises UpstreamError when the answer breaks off."""
        while not self._chunks:
            if self._complete:
                raise StopAsyncIteration
            await self._wait()
        chunks, self._chunks, self._size = self._chunks, [], 0
        if self._connection is not None and not self._complete:
            self._connection.resume()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def read(self, limit: int) -> bytes:
        """The rest of the body. Raises BadResponse when it is longer than `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self:
            size += len(chunk)
            if size > limit:
                self.close()
                raise BadResponse(f"{self.address} sent an answer of more than {limit} bytes")
            parts.append(chunk)
        return b"".join(parts)

    def close(self) -> None:
        """Ends the exchange at once; does nothing to one that is complete."""
        self.abandon(Abandoned(f"the request to {self.address} was closed"))

    def abandon(self, error: UpstreamError) -> None:
        """Aborts the connection; whoever waits on this exchange gets `error`."""
        if self.ended:
            return
        connection = self._connection
        if connection is not None:
            connection.exchange = None
            connection.transport.abort()
        self.break_off(error)

    async def leave(self, timeout: float) -> bool:
        """Says that nobody reads any more, and waits until the peer has let go of the request and closed its side too.

        The half-close is what servers look for when they test whether their client is still there; what they send
        meanwhile is thrown away. False when the peer did not close within `timeout` seconds: then it is aborted.
        """
        connection = self._connection
        if connection is None or connection.exchange is not self:
            return True
        self.discarding, self.reusable = True, False
        self._chunks, self._size = [], 0
        connection.resume()
        try:
            if connection.usable and connection.transport.can_write_eof():
                connection.transport.write_eof()
            async with asyncio.timeout(timeout):
                await asyncio.shield(connection.lost)
            return True
        except TimeoutError:
            return False
        except OSError:  # reset between the look and the half-close
            return True
        finally:
            self.close()

    # called by Upstream and Connection

    def attach(self, connection: Connection) -> None:
        """Sends the request on `connection`."""
        self._connection = connection
        connection.begin(self)
        connection.transport.write(self._payload)

    def begin_body(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        self._payload = b""  # never sent again, and it may be large
        self._wake()

    def feed(self, data: bytes) -> None:
        if self.discarding:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER and self._connection is not None:
            self._connection.pause()
        self._wake()

    def complete(self) -> None:
        self._complete = True
        self._wake()

    def break_off(self, error: UpstreamError) -> None:
        if not self.ended:
            self._error = error
        self._wake()

    # waiting

    async def _wait(self) -> None:
        """Until something happened. Raises the error that ended the exchange."""
        if self._error is not None:
            raise self._error
        if self._complete:
            return
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        timer = loop.call_later(self._idle_timeout, self._time_out)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None
        if self._error is not None and not self._chunks:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _time_out(self) -> None:
        self.abandon(TimedOut(f"{self.address} sent nothing for {self._idle_timeout:g} s"))


class Upstream:
    """The connections of one process to the servers that it asks. Needs a running loop; close it with `close`."""

    def __init__(
        self,
        *,
        connect_timeout: float = 2.0,
        idle_timeout: float = 300.0,
        max_idle: int = 64,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`connect_timeout` and `idle_timeout` (silence of the peer) in seconds; `max_idle` connections kept per address;
        `tls` verifies servers, by default with the system's authorities."""
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._max_idle = max_idle
        self._tls = tls
        self._idle: dict[Address, deque[Connection]] = {}
        self._open: set[Connection] = set()
        self._closed = False

    @property
    def open_connections(self) -> int:
        """Connections that exist now, idle ones too."""
        return len(self._open)

    async def send(
        self,
        address: Address,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes = b"",
        *,
        reuse: bool = True,
        idle_timeout: float | None = None,
    ) -> Exchange:
        """Sends a request and returns its exchange. Raises ConnectFailed, and ValueError for a header that would be two.

        Without `reuse` a fresh connection is made for this request alone.
        """
        lines = [f"{method} {target} HTTP/1.1", f"Host: {address}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines.append(f"Content-Length: {len(body)}")
        if not reuse:
            lines.append("Connection: close")
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a header or target holds a line break")
        payload = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        exchange = Exchange(
            self,
            address,
            payload,
            idle_timeout=self._idle_timeout if idle_timeout is None else idle_timeout,
            reusable=reuse,
        )
        exchange.attach((self._pooled(address) if reuse else None) or await self.connect(address))
        return exchange

    async def connect(self, address: Address) -> Connection:
        """A fresh connection. Raises ConnectFailed."""
        if self._closed:
            raise ConnectFailed(f"{address}: this client is closed")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, address, loop), address.host, address.port, ssl=self._verification(address)
                )
        except TimeoutError:
            raise ConnectFailed(f"{address} did not accept a connection within {self._connect_timeout:g} s") from None
        except OSError as error:
            raise ConnectFailed(f"{address}: {error.strerror or error}") from error
        self._open.add(connection)
        return connection

    def _verification(self, address: Address) -> ssl.SSLContext | None:
        if address.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls if address.tls else None

    async def close(self) -> None:
        """Aborts every connection and waits until they are gone."""
        self._closed = True
        connections = list(self._open)
        for connection in connections:
            connection.transport.abort()
        if connections:
            await asyncio.wait([connection.lost for connection in connections])

    # called by Connection

    def keep(self, connection: Connection) -> None:
        """Takes an idle connection back."""
        now = asyncio.get_running_loop().time()
        idle = self._idle.setdefault(connection.address, deque())
        while idle and now - idle[0].idle_since > MAX_IDLE_SECONDS:
            idle.popleft().transport.close()
        if self._closed or len(idle) >= self._max_idle:
            connection.transport.close()
            return
        connection.idle_since = now
        idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """Drops a connection that is closed."""
        self._open.discard(connection)
        idle = self._idle.get(connection.address)
        if idle is not None:
            if connection in idle:
                idle.remove(connection)
            if not idle:
                del self._idle[connection.address]

    def _pooled(self, address: Address) -> Connection | None:
        idle = self._idle.get(address)
        now = asyncio.get_running_loop().time()
        while idle:
            connection = idle.pop()
            if connection.usable and now - connection.idle_since <= MAX_IDLE_SECONDS:
                connection.reused = True
                return connection
            connection.transport.close()
        return None
