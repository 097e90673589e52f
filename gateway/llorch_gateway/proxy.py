"""One request's way through the gateway: a replica is picked, asked, and its answer passed on; or the next one is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from llorch_web.correlation import HEADER as CORRELATION_HEADER
from llorch_web.correlation import correlation_id
from llorch_web.errors import ApiError
from llorch_web.outcomes import Outcome
from llorch_web.upstream import ConnectFailed, Exchange, Upstream, UpstreamError

from .agents import AgentLink, Agents
from .core.picker import Candidate, in_order
from .core.pools import EndpointView, PoolTable, PoolView, load_state
from .metrics import GatewayMetrics

log = logging.getLogger("llorch.gateway")

MAX_TRIES = 3
RETRY_SECONDS = 10.0
"""A request that took longer than this to fail is not tried again."""
BUFFERED = 1 << 20
"""An answer of at most so many bytes that is no stream is read whole before its first byte goes out: until then another
replica can take over."""
MAX_HELD = 1 << 20
SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
TRY_NEXT = frozenset({"no_slot", "no_replica", "not_ready", "draining", "engine_failed"})
"""Refusals of an agent after which another replica may answer."""


class _Error(msgspec.Struct):
    code: str | None = None
    message: str = ""


class _Envelope(msgspec.Struct):
    error: _Error = msgspec.field(default_factory=_Error)


_ENVELOPE = msgspec.json.Decoder(_Envelope)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants, as far as the gateway looks at it."""

    pool: PoolView
    model: str
    path: str
    """Below /v1."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """A try that ended before its first byte."""

    code: str
    message: str


class Proxy:
    """Forwards requests to the replicas of pools."""

    def __init__(
        self,
        upstream: Upstream,
        agents: Agents,
        table: Callable[[], PoolTable],
        metrics: GatewayMetrics,
        *,
        draw: Callable[[], float],
    ) -> None:
        self._upstream = upstream
        self._agents = agents
        self._table = table
        self._metrics = metrics
        self._draw = draw

    async def forward(self, request: web.Request, asked: Asked, outcome: Outcome) -> web.StreamResponse:
        """The answer of a replica. Raises ApiError where none gives one."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + RETRY_SECONDS
        tried: set[str] = set()
        failures: list[Failed] = []
        while len(tried) < MAX_TRIES and (not failures or loop.time() < give_up):
            order = self._order(asked.pool, tried)
            if not order:
                break
            endpoint = order[0].endpoint
            tried.add(endpoint.id)
            result = await self._try(request, asked, endpoint, tried, outcome)
            if isinstance(result, web.StreamResponse):
                return result
            failures.append(result)
            self._metrics.retry(asked.pool.name, result.code)
        raise _refusal(asked.pool, failures)

    def _order(self, pool: PoolView, tried: set[str]) -> list[Candidate]:
        """The replicas left to try, best first, as things are now."""
        now = self._table().resolve(pool.name) or pool
        found = []
        for endpoint in now.endpoints:
            link = self._agents.link(endpoint.agent)
            if endpoint.id in tried or link is None:
                continue
            if (each := link.candidate(endpoint, kept=now.kept)) is not None:
                found.append(each)
        return in_order(found, self._draw)

    async def _try(
        self, request: web.Request, asked: Asked, endpoint: EndpointView, tried: set[str], outcome: Outcome
    ) -> web.StreamResponse | Failed:
        link = self._agents.link(endpoint.agent)
        if link is None:
            return Failed("connect", f"{endpoint.url} is not an address")

        def elsewhere() -> bool:
            return any(not each.ejected and each.free > 0 for each in self._order(asked.pool, tried))

        with link.sending(endpoint.replica):
            try:
                exchange = await self._send(link, endpoint, asked)
            except ConnectFailed as error:
                link.connect_failed(error)
                return Failed("connect", str(error))
            async with exchange:
                with link.watching(exchange, elsewhere):
                    return await self._answer(request, link, exchange, outcome)

    async def _send(self, link: AgentLink, endpoint: EndpointView, asked: Asked) -> Exchange:
        headers = [
            ("Content-Type", "application/json"),
            (CORRELATION_HEADER, correlation_id.get()),
            *self._agents.tokens.headers(),
        ]
        if asked.model.isascii() and asked.model.isprintable():
            headers.append(("X-Llorch-Model", asked.model))
        target = endpoint.url.removeprefix(endpoint.agent)
        return await self._upstream.send(link.address, "POST", f"{link.prefix}{target}/v1/{asked.path}", headers, asked.body)

    async def _answer(
        self, request: web.Request, link: AgentLink, exchange: Exchange, outcome: Outcome
    ) -> web.StreamResponse | Failed:
        try:
            status = await exchange.head()
            kind = exchange.headers.get(b"content-type", b"application/json").decode("latin-1")
            if status == 200 and kind.startswith("text/event-stream"):
                return await self._stream(request, link, exchange, outcome)
            length = int(exchange.headers.get(b"content-length", b"-1"))
            if status == 200 and not 0 <= length <= BUFFERED:
                link.begun(exchange)
                return await self._copy(request, exchange, kind, length)
            body = await exchange.read(BUFFERED)
        except UpstreamError as error:
            return Failed("broken", str(error))
        return _checked(status, kind, body)

    async def _stream(
        self, request: web.Request, link: AgentLink, exchange: Exchange, outcome: Outcome
    ) -> web.StreamResponse | Failed:
        """Passes events on as they come, whole ones only: should the agent die, what the client has can still be parsed."""
        response: web.StreamResponse | None = None
        held = b""
        problem: UpstreamError | None = None
        try:
            async for chunk in exchange:
                held += chunk
                cut = held.rfind(b"\n\n") + 2
                if cut < 2:
                    if len(held) < MAX_HELD:
                        continue
                    cut = len(held)
                if response is None:
                    link.begun(exchange)
                    response = web.StreamResponse(headers=SSE_HEADERS)
                    await response.prepare(request)
                    outcome.first_token()
                await response.write(held[:cut])
                held = held[cut:]
        except UpstreamError as error:
            problem = error
        if response is None:
            return Failed("broken", str(problem or "the stream was empty"))
        if problem is not None:
            log.warning("a stream broke: %s", problem)
            message = "the replica that answered is gone; what came so far is not complete"
            await response.write(b"data: " + ApiError(502, message, code="engine_failed").body() + b"\n\n")
        await response.write_eof()
        return response

    async def _copy(self, request: web.Request, exchange: Exchange, kind: str, length: int) -> web.StreamResponse:
        """A long answer that is no stream. When it breaks off, so does the client's: there is no other way to say it."""
        response = web.StreamResponse(headers={"Content-Type": kind})
        if length >= 0:
            response.content_length = length
        await response.prepare(request)
        try:
            async for chunk in exchange:
                await response.write(chunk)
        except UpstreamError as error:
            log.warning("a long answer broke: %s", error)
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError(str(error)) from error
        await response.write_eof()
        return response


def _checked(status: int, kind: str, body: bytes) -> web.StreamResponse | Failed:
    """The answer for the client, or why the next replica should be asked."""
    if status != 200:
        try:
            error = _ENVELOPE.decode(body).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            error = _Error(message=body[:200].decode(errors="replace"))
        if status in (401, 403):
            log.error("an agent refused this gateway's token: %s", error.message)
            return Failed("refused", "an agent refused this gateway")
        if error.code in TRY_NEXT or status == 503:
            return Failed(error.code or "not_ready", error.message)
    return web.Response(status=status, body=body, headers={"Content-Type": kind})


def _refusal(pool: PoolView, failures: list[Failed]) -> ApiError:
    """What the client is told when no replica answered."""
    codes = {failure.code for failure in failures}
    if "no_slot" in codes:
        message = f"all slots of model {pool.name!r} are taken"
        return ApiError(429, message, code="no_slot", headers={"Retry-After": "1"})
    if not codes or codes <= {"no_replica", "not_ready", "draining"}:
        detail = failures[-1].message if failures else load_state(pool)
        message = f"model {pool.name!r} has no replica that is ready: {detail}"
        return ApiError(503, message, code="model_not_ready", headers={"Retry-After": "2"})
    if "engine_failed" in codes:
        message = next(failure.message for failure in reversed(failures) if failure.code == "engine_failed")
        return ApiError(502, message, code="engine_failed")
    message = f"no replica of model {pool.name!r} can be reached; {len(failures)} did not answer"
    return ApiError(503, message, code="no_replica_available", headers={"Retry-After": "1"})
