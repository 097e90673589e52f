"""A listening aiohttp application: bound with a readable error, stopped without cutting off who is being answered."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
import ssl

from aiohttp import web

from .settings import StartError

log = logging.getLogger("llorch.web")

BACKLOG = 1024
CUT_OFF_SECONDS = 0.05
"""aiohttp waits twice this long for a handler before it cancels it; by then `stop` has waited its whole deadline."""
POLL_SECONDS = 0.02
GRACE_SECONDS = 0.1
"""For requests of which the first bytes are there: aiohttp reads no more from a connection that was told to close."""
_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:]*)):(?P<port>\d{1,5})")


def parse_address(text: str, variable: str) -> tuple[str, int]:
    """`host:port`, `[v6]:port` or `:port` (all interfaces). Raises StartError."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65_535:
        raise StartError(f"{variable}={text} — must be host:port, for example 127.0.0.1:8080")
    return match["v6"] or match["host"] or "0.0.0.0", int(match["port"])


class Server:
    """Serves `app` on one address.

    `start` and `stop` belong to one owner, which also handles signals. Streams that never end by themselves are ended by
    their owner before `stop`, or stop waits for its whole deadline.
    """

    def __init__(
        self,
        app: web.Application,
        address: str,
        *,
        variable: str,
        reuse_port: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`address` is host:port; port 0 takes a free one. `variable` is the setting that errors name. With `tls`
        nothing but TLS is spoken."""
        self._app = app
        self._address = address
        self._variable = variable
        self._reuse_port = reuse_port
        self._tls = tls
        self._runner: web.AppRunner | None = None
        self._host, self._port = parse_address(address, variable)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._port

    @property
    def url(self) -> str:
        """Base URL as seen from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._host, f"[{self._host}]" if ":" in self._host else self._host)
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._port}"

    async def start(self) -> None:
        """Listens. Raises StartError."""
        # Without cancellation a handler learns that its client left only when it writes the next time.
        runner = web.AppRunner(self._app, access_log=None, handler_cancellation=True, shutdown_timeout=CUT_OFF_SECONDS)
        await runner.setup()
        site = web.TCPSite(
            runner, self._host, self._port, backlog=BACKLOG, reuse_port=self._reuse_port or None, ssl_context=self._tls
        )
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise StartError(f"{self._variable}={self._address} — {_why(error)}") from error
        self._runner = runner
        self._port = site.port

    async def stop(self, deadline: float = 5.0) -> None:
        """Takes no more connections, lets running answers end for up to `deadline` seconds, then cancels them."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in runner.sites:
            await site.stop()
        server = runner.server
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline
        if server is not None and server.connections:
            await asyncio.sleep(min(GRACE_SECONDS, deadline))
        while server is not None and server.connections and loop.time() < end:
            server.pre_shutdown()  # idle connections close now, busy ones after their answer
            await asyncio.sleep(POLL_SECONDS)
        if server is not None and server.connections:
            log.warning("%d requests were cut off after %.1f s", len(server.connections), deadline)
        await runner.cleanup()


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is taken by another process; choose another or stop it"
    if error.errno == errno.EACCES:
        return "this user may not listen there; choose a port from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    return (error.strerror or str(error)).lower()
