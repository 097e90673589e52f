"""One client connection of HTTP/1.1: bytes in and out, and the response of the exchange that owns it at the moment."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, cast

import httptools

from .upstream_errors import BadResponse, ClosedEarly

if TYPE_CHECKING:
    from .upstream import Exchange, Upstream

MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 * 1024
"""Of a response's header block, names and values together."""


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Connection(asyncio.Protocol):
    """A TCP connection. It belongs to one exchange, or to the pool while it is idle."""

    __slots__ = (
        "_header_bytes",
        "_headers",
        "_informational",
        "_owner",
        "_parser",
        "_paused",
        "_status",
        "_until_eof",
        "address",
        "exchange",
        "idle_since",
        "lost",
        "reused",
        "transport",
    )

    def __init__(self, owner: Upstream, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self.address = address
        self.lost: asyncio.Future[None] = loop.create_future()
        """Done once both directions are closed."""
        self.exchange: Exchange | None = None
        self.reused = False
        self.idle_since = 0.0
        self.transport: asyncio.Transport
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # asyncio and uvloop set TCP_NODELAY themselves

    @property
    def usable(self) -> bool:
        """False once the connection is closed or about to be."""
        return not self.lost.done() and not self.transport.is_closing()

    def begin(self, exchange: Exchange) -> None:
        """Hands the connection to `exchange` for one request and its response."""
        self.exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._informational = False
        self._until_eof = False
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0

    def pause(self) -> None:
        """Stops reading: the exchange holds more than its reader took."""
        if not self._paused and self.usable:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Reads again."""
        if self._paused:
            self._paused = False
            if self.usable:
                self.transport.resume_reading()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # nobody asked: an answer that nobody could tell from the next one's
            self.transport.abort()
            return
        exchange.received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self.exchange is exchange:
                self._fail(error.__context__ if isinstance(error.__context__, BadResponse) else BadResponse(str(error)))
            else:
                self.transport.abort()  # bytes after the end of the message

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self.exchange = self.exchange, None
        if not self.lost.done():
            self.lost.set_result(None)
        self._owner.forget(self)
        if exchange is None:
            return
        if exc is None and self._until_eof:
            exchange.complete()
        else:
            what = "the answer was not complete" if exchange.received else "no answer came"
            exchange.break_off(ClosedEarly(f"{self.address} closed the connection: {what}"))

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES or len(self._headers) >= MAX_HEADERS:
            raise BadResponse(f"{self.address} sent more than {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} lines of headers")
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._informational = status < 200
        if self._informational:
            self._headers = {}
            return
        headers = self._headers
        bodiless = status in (204, 304)
        self._until_eof = not bodiless and b"content-length" not in headers and b"transfer-encoding" not in headers
        if self.exchange is not None:
            self.exchange.begin_body(status, headers)

    def on_body(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.feed(data)

    def on_message_complete(self) -> None:
        if self._informational:
            return
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        self.resume()  # a paused transport never sees the peer's FIN
        streamed = self._headers.get(b"content-type", b"").startswith(b"text/event-stream")
        keep = exchange.reusable and not streamed and not self._until_eof and self._parser.should_keep_alive()
        if keep and self.usable and self.transport.get_write_buffer_size() == 0:
            self._owner.keep(self)
        else:
            self.transport.close()
        exchange.complete()

    def _fail(self, error: BadResponse) -> None:
        exchange, self.exchange = self.exchange, None
        self.transport.abort()
        if exchange is not None:
            exchange.break_off(error)
