"""The way in to a node's engines: grants slot leases, asks the engine, and answers as the client wants to be answered.

A lease ends when the engine's slot is really free. When a client leaves, the request is half-closed and the lease kept until
the engine has closed its side: with tokens flowing that takes a token, while it reads the prompt one batch. A bare close
would be noticed as late, and nobody would know when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry

from llorch_api import ReplicaState
from llorch_web.body import read_body
from llorch_web.errors import ApiError
from llorch_web.outcomes import Outcome
from llorch_web.sse import EventSplitter, EventTooLong, data_of
from llorch_web.upstream import Abandoned, Exchange, Upstream, UpstreamError, split_url

from .core.answers import DONE, BadEvent, Chunks, WholeAnswer, WholeEmbeddings, is_error
from .core.engine_error import EngineError, engine_error
from .core.engine_request import BadRequest, EmbeddingsRequest, EngineRequest, Kind, embeddings, generation
from .frontdoor_leases import Hold, Leases
from .frontdoor_metrics import FrontDoorMetrics
from .replicas import Replica, Replicas
from .slot_stream import SlotStream

log = logging.getLogger("llorch.frontdoor")

MODEL_HEADER = "X-Llorch-Model"
MAX_BODY = 32 << 20
MAX_ERROR_BODY = 1 << 20
MAX_EMBEDDINGS = 256 << 20
"""Bytes of one batch of embeddings."""
BODY_SECONDS = 60.0
"""In which a request's body must have come."""
STALL_SECONDS = 60.0
"""How long a client may leave its stream unread once all buffers are full: until then it keeps a slot from others."""
LAST_WORDS_SECONDS = 1.0
"""How long handlers may take to tell their clients that the agent stops."""
SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class FrontDoor:
    """Serves the replicas of one node. Mount `routes()`, and end it with `shutdown`."""

    def __init__(
        self,
        replicas: Replicas,
        *,
        node_id: str = "",
        registry: CollectorRegistry | None = None,
        max_body: int = MAX_BODY,
        connect_timeout: float = 2.0,
        idle_timeout: float = 300.0,
        body_timeout: float = BODY_SECONDS,
        stall_timeout: float = STALL_SECONDS,
    ) -> None:
        """`max_body` in bytes; the time-outs in seconds: `idle_timeout` is silence of an engine, `body_timeout` and
        `stall_timeout` are the client's, for sending its request and for taking its answer."""
        self._body_timeout = body_timeout
        self._stall_timeout = stall_timeout
        self._replicas = replicas
        self._max_body = max_body
        self._idle_timeout = idle_timeout
        self._upstream = Upstream(connect_timeout=connect_timeout, idle_timeout=idle_timeout)
        self._leases = Leases(replicas)
        self._slots = SlotStream(replicas, self._leases)
        self._metrics = FrontDoorMetrics(node_id, registry)
        self._running: set[Exchange] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.AbstractRouteDef]:
        """The routes of the data path."""
        return [
            *(web.post(f"/replicas/{{id}}/v1/{kind}", self._handler(kind)) for kind in Kind),
            web.get("/replicas/slots", self._slots.serve),
        ]

    @property
    def in_flight(self) -> int:
        """Requests that hold a lease, those included whose client has left."""
        return self._leases.out

    async def shutdown(self, deadline: float) -> None:
        """Grants no more leases, waits up to `deadline` seconds for those that are out, then ends the rest and the streams."""
        self._leases.close()
        try:
            async with asyncio.timeout(deadline):
                await self._leases.wait_until_idle()
        except TimeoutError:
            if self.in_flight:
                log.warning("%d requests are ended: they outlasted the drain of %.0f s", self.in_flight, deadline)
            reason = f"the agent of this node stops, and the answer was not complete after {deadline:g} s"
            for exchange in list(self._running):
                exchange.abandon(Abandoned(reason))
            try:
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self._leases.wait_until_idle()
            except TimeoutError:
                log.warning("%d requests did not end", self.in_flight)
        finally:
            self._slots.end()
            await self._upstream.close()
            if self._leaving:
                await asyncio.wait(self._leaving)

    # one request

    def _handler(self, kind: Kind) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            replica = self._replicas.get(request.match_info["id"])
            if replica is None:
                raise ApiError(404, f"no replica {request.match_info['id']!r} on this node", code="no_replica")
            with self._metrics.request(replica.pool) as outcome:
                response = await self._answer(request, replica, kind, outcome)
                outcome.status = response.status
                return response

        return handle

    async def _answer(self, request: web.Request, replica: Replica, kind: Kind, outcome: Outcome) -> web.StreamResponse:
        self._leases.check(replica)  # a full engine refuses before the body is read
        body = await self._body(request)
        model = request.headers.get(MODEL_HEADER, "")
        if not model.isascii():
            model = ""  # the gateway sends no such name; the one in the body holds
        try:
            if kind is Kind.EMBEDDINGS:
                return await self._embed(replica, embeddings(body), model)
            return await self._generate(request, replica, kind, generation(body, kind), model, outcome)
        except BadRequest as error:
            raise ApiError(400, str(error), code="invalid_request", param=error.param) from None

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._body_timeout):
                return await read_body(request, self._max_body)
        except TimeoutError:
            message = f"the request was not there within {self._body_timeout:g} s"
            raise ApiError(408, message, code="request_timeout", headers={"Connection": "close"}) from None

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout):
                await response.write(data)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError(f"the client took nothing for {self._stall_timeout:g} s") from None

    async def _generate(
        self, request: web.Request, replica: Replica, kind: Kind, asked: EngineRequest, model: str, outcome: Outcome
    ) -> web.StreamResponse:
        model = model or asked.model
        hold = self._leases.take(replica, asked.width)
        exchange: Exchange | None = None
        try:
            exchange = await self._ask(replica, kind, asked.payload)
            await self._expect(exchange, streamed=True)
            if asked.stream:
                chunks = Chunks(model, keep_usage=asked.include_usage)
                return await self._stream(request, replica, exchange, chunks, outcome)
            return await self._whole(exchange, WholeAnswer(kind, model))
        except (UpstreamError, BadEvent, EventTooLong) as error:
            raise _engine_failed(replica, error) from error
        finally:
            self._let_go(hold, exchange)

    async def _ask(self, replica: Replica, kind: Kind, payload: bytes) -> Exchange:
        address, prefix = split_url(replica.base_url)
        headers = [("Content-Type", "application/json")]
        exchange = await self._upstream.send(address, "POST", f"{prefix}/v1/{kind}", headers, payload, reuse=False)
        self._running.add(exchange)
        return exchange

    async def _expect(self, exchange: Exchange, *, streamed: bool) -> None:
        """Waits for a good answer to begin. Raises ApiError for an engine that refuses."""
        status = await exchange.head()
        kind = exchange.headers.get(b"content-type", b"")
        if status != 200:
            raise _api_error(engine_error(status, await exchange.read(MAX_ERROR_BODY)))
        if streamed and not kind.startswith(b"text/event-stream"):
            raise BadEvent(f"the engine answered {kind.decode(errors='replace')!r} where a stream was asked for")

    async def _stream(
        self, request: web.Request, replica: Replica, exchange: Exchange, chunks: Chunks, outcome: Outcome
    ) -> web.StreamResponse:
        """Passes events on as they come. The head is sent with the first of them: until then another replica can take over."""
        response: web.StreamResponse | None = None
        splitter, ended = EventSplitter(), False
        problem: ApiError | None = None
        try:
            async for received in exchange:
                out: list[bytes] = []
                for event in splitter.feed(received):
                    data = data_of(event)
                    if data is None:
                        continue
                    if data == DONE:
                        ended = True
                    elif is_error(data):
                        raise _api_error(engine_error(200, data))
                    elif (shown := chunks.pass_on(data)) is not None:
                        out += (b"data: ", shown, b"\n\n")
                if out:
                    if response is None:
                        response = web.StreamResponse(headers=SSE_HEADERS)
                        await response.prepare(request)
                        outcome.first_token()
                    await self._write(request, response, b"".join(out))
            if not ended:
                problem = _engine_failed(replica, BadEvent("the stream ended without [DONE]"))
        except (UpstreamError, EventTooLong) as error:
            problem = _engine_failed(replica, error)
        except ApiError as error:
            problem = error
        if response is None:
            raise problem or _engine_failed(replica, BadEvent("the stream was empty"))
        await self._write(request, response, b"data: [DONE]\n\n" if problem is None else b"data: " + problem.body() + b"\n\n")
        await response.write_eof()
        return response

    async def _whole(self, exchange: Exchange, answer: WholeAnswer) -> web.Response:
        splitter = EventSplitter()
        async for received in exchange:
            for event in splitter.feed(received):
                data = data_of(event)
                if data is None or data == DONE:
                    continue
                if is_error(data):
                    raise _api_error(engine_error(200, data))
                answer.add(data)
        if not answer.complete:
            raise BadEvent("the stream ended before the answer was complete")
        return web.Response(body=answer.answer(), content_type="application/json")

    async def _embed(self, replica: Replica, asked: EmbeddingsRequest, model: str) -> web.Response:
        """As many inputs at a time as there are slots: an engine queues what is more."""
        whole = WholeEmbeddings(model or asked.model)
        hold = self._leases.take_some(replica, asked.width)
        exchange: Exchange | None = None
        try:
            for start in range(0, asked.width, len(hold)):
                exchange = await self._ask(replica, Kind.EMBEDDINGS, asked.batch(start, len(hold)))
                await self._expect(exchange, streamed=False)
                whole.add(await exchange.read(MAX_EMBEDDINGS))
                self._running.discard(exchange)
        except (UpstreamError, BadEvent) as error:
            raise _engine_failed(replica, error) from error
        finally:
            self._let_go(hold, exchange)
        return web.Response(body=whole.answer(), content_type="application/json")

    # the end of a request

    def _let_go(self, hold: Hold, exchange: Exchange | None) -> None:
        """Gives the leases back, now or as soon as the engine has let go of an unfinished request."""
        if exchange is None or exchange.ended:
            if exchange is not None:
                self._running.discard(exchange)
            hold.release()
            return
        task = asyncio.create_task(self._leave(hold, exchange), name="leave engine")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, hold: Hold, exchange: Exchange) -> None:
        try:
            with self._metrics.leaving():
                if not await exchange.leave(self._idle_timeout):
                    log.warning("%s did not end a request that its client left", exchange.address)
        finally:
            self._running.discard(exchange)
            hold.release()


def _api_error(error: EngineError) -> ApiError:
    return ApiError(error.status, error.message, code=error.code, type=error.type, extra=error.extra)


def _engine_failed(replica: Replica, error: Exception) -> ApiError:
    if isinstance(error, Abandoned):
        return ApiError(503, str(error), code="draining", headers={"Retry-After": "1"})
    log.warning("replica %s: %s", replica.id, error, extra={"pool": replica.pool, "replica": replica.id})
    state = "" if replica.state is ReplicaState.READY else f" ({replica.state})"
    return ApiError(502, f"the engine of replica {replica.id}{state} failed: {error}", code="engine_failed")
