"""The node API: /v2/nodes for agents outside the cluster, and what people ask about nodes."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel, ValidationError

from llorch_api import GPUNode
from llorch_store import Invalid, NotFound, StoreError
from llorch_web.auth import Tokens, refusal
from llorch_web.body import MIB, read_body

from .core.node_list import availability, node_info
from .core.node_wire import Beat, Registration
from .fleet import Fleet
from .node_registry import NodeRegistry, Taken

log = logging.getLogger("llorch.operator.nodes")

LARGEST_BODY = MIB // 4
WAIT_SECONDS = 25.0
"""How long GET /v2/nodes/{id}/spec waits for a change, where nobody says; below what proxies cut off."""
LONGEST_WAIT = 60.0
_CODES = {"missing_token": (40101, "MISSING_TOKEN"), "bad_token": (40102, "BAD_TOKEN")}
_NO_TOKEN_HERE = (40301, "NON_LOOPBACK_WITHOUT_TOKEN")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
B = TypeVar("B", bound=BaseModel)


def is_node_api(path: str) -> bool:
    """Paths whose handlers ask for the token themselves: their refusals have bodies of their own."""
    return path in ("/v2/nodes", "/v2/catalog/availability") or path.startswith("/v2/nodes/")


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, outcome: str = "error", **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.outcome = outcome
        self.more = more
        self.headers: dict[str, str] = {}


class NodeApi:
    """Routes of the node API. Every one asks for the bearer token."""

    def __init__(
        self, registry: NodeRegistry, fleet: Fleet, tokens: Tokens, metrics: CollectorRegistry, *, interval: int
    ) -> None:
        """`interval`: seconds until the next heartbeat that agents are told."""
        self._registry = registry
        self._fleet = fleet
        self._bell = fleet.spec_bell
        self._tokens = tokens
        self._interval = interval
        name = "orchd_node_registrations"
        self._registrations = Counter(name, "Registrations through the node API", ["outcome"], registry=metrics)
        name = "orchd_node_heartbeats"
        self._heartbeats = Counter(name, "Heartbeats through the node API", ["node_id", "outcome"], registry=metrics)
        name = "orchd_node_deregistrations"
        self._deregistrations = Counter(name, "Deregistrations through the node API", ["outcome"], registry=metrics)

    def routes(self) -> list[web.RouteDef]:
        """For the operator's application."""
        return [
            web.post("/v2/nodes/register", self._register),
            web.post("/v2/nodes/{id}/heartbeat", self._heartbeat),
            web.get("/v2/nodes/{id}/spec", self._spec),
            web.delete("/v2/nodes/{id}", self._deregister),
            web.get("/v2/nodes", self._list),
            web.get("/v2/catalog/availability", self._availability),
        ]

    # ---- for agents

    async def _register(self, request: web.Request) -> web.Response:
        try:
            self._check(request)
            registration = await _body(request, Registration)
            node = await self._asked(registration.node_id, self._registry.register(registration))
        except _Refused as refused:
            self._registrations.labels(refused.outcome).inc()
            return _answer(refused, node_id="")
        self._registrations.labels("success").inc()
        log.info("node %s registered from %s", registration.node_id, request.remote, extra={"node_id": registration.node_id})
        body = {"success": True, "message": "Registered successfully", "node_id": registration.node_id}
        return web.json_response({**body, **_identity(node)})

    async def _heartbeat(self, request: web.Request) -> web.Response:
        name, known = request.match_info["id"], False
        try:
            self._check(request)
            beat = await _body(request, Beat)
            if beat.node_id not in (None, name):
                raise _Refused(400, f"node_id is {beat.node_id!r} in the body and {name!r} in the path")
            # Only an id that somebody registered becomes a label.
            known = name in self._fleet.nodes
            node = await self._asked(name, self._registry.beat(name, beat))
        except _Refused as refused:
            self._heartbeats.labels(name if known else "", refused.outcome).inc()
            return _answer(refused, next_heartbeat_ms=self._interval * 1000)
        self._heartbeats.labels(name, "success").inc()
        body: dict[str, Any] = {"success": True, "next_heartbeat_ms": self._interval * 1000}
        if beat.status is not None:
            body |= {**_identity(node), "spec": node.spec.to_json()}
        return web.json_response(body)

    async def _spec(self, request: web.Request) -> web.Response:
        """200 with the spec once it is another than `uid` and `generation` name; 204 when it is not within `wait` seconds."""
        name = request.match_info["id"]
        try:
            self._check(request)
            generation, wait = _number(request, "generation", 0.0), _number(request, "wait", WAIT_SECONDS)
            seen = (request.query.get("uid", ""), int(generation))
            end = time.monotonic() + min(LONGEST_WAIT, wait)
            while True:
                node = await self._asked(name, self._registry.known(name))
                if (node.metadata.uid, node.metadata.generation) != seen:
                    return web.json_response({"node_id": name, **_identity(node), "spec": node.spec.to_json()})
                left = end - time.monotonic()
                if left <= 0 or self._bell.closed:
                    return web.Response(status=204)
                await self._bell.wait(name, left)
        except _Refused as refused:
            return _answer(refused, node_id="")

    async def _deregister(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        try:
            self._check(request)
            await self._asked(name, self._registry.remove(name))
        except _Refused as refused:
            self._deregistrations.labels(refused.outcome).inc()
            return _answer(refused, node_id="")
        self._forget_label(name)
        self._deregistrations.labels("success").inc()
        log.info("node %s deregistered", name, extra={"node_id": name})
        return web.Response(status=204)

    def _forget_label(self, name: str) -> None:
        for outcome in ("success", "error"):
            try:
                self._heartbeats.remove(name, outcome)
            except KeyError:
                continue

    # ---- for people

    async def _list(self, request: web.Request) -> web.Response:
        try:
            self._check(request)
        except _Refused as refused:
            return _answer(refused)
        now = round(time.time() * 1000)
        nodes = [node_info(seen, now) for _, seen in sorted(self._fleet.seen().items())]
        return web.json_response({"nodes": nodes, "count": len(nodes)})

    async def _availability(self, request: web.Request) -> web.Response:
        try:
            self._check(request)
        except _Refused as refused:
            return _answer(refused)
        seen = self._fleet.seen()
        return web.json_response(availability((seen[name] for name in sorted(seen)), self._fleet.pools))

    # ---- what they share

    def _check(self, request: web.Request) -> None:
        refused = refusal(request, self._tokens)
        if refused is None:
            return
        code, word = _CODES.get(refused.code or "", _NO_TOKEN_HERE)
        log.warning("refused %s from %s: %s", request.method, request.remote, word)
        raised = _Refused(refused.status, refused.message, "unauthorized", code=code, error=word)
        raised.headers = refused.headers
        raise raised

    async def _asked(self, name: str, work: Awaitable[Any]) -> Any:
        """The result of `work`; what the store refuses, as an answer."""
        try:
            return await work
        except Taken:
            raise _Refused(409, f"node {name} is written by an agent of its own; take another POOL_MANAGERD_NODE_ID") from None
        except NotFound:
            raise _Refused(404, f"node {name} is not registered") from None
        except (Invalid, ValidationError) as error:
            raise _Refused(400, _first(error) if isinstance(error, ValidationError) else str(error)) from error
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        except StoreError as error:
            log.warning("node %s could not be written: %s", name, error)
            raise _Refused(500, f"the store did not take it: {error}") from error


def _identity(node: GPUNode) -> dict[str, Any]:
    return {"uid": node.metadata.uid, "generation": node.metadata.generation}


def _answer(refused: _Refused, **more: Any) -> web.Response:
    body = {"success": False, "message": str(refused), **more, **refused.more}
    return web.json_response(body, status=refused.status, headers=refused.headers)


async def _body(request: web.Request, kind: type[B]) -> B:
    try:
        return kind.model_validate_json(await read_body(request, LARGEST_BODY))
    except ValidationError as error:
        raise _Refused(400, _first(error)) from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _number(request: web.Request, name: str, default: float) -> float:
    try:
        value = float(request.query.get(name, default))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 53:
        raise _Refused(400, f"{name} must be a number from 0 on")
    return value
