"""The control plane's node API as one agent's store: what publisher and assignments ask of a store, over HTTP.

Merge patches are put together here again, because the wire has the whole status in every heartbeat. The spec comes by a long
poll, and with every heartbeat's answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar, cast

import aiohttp
import msgspec
from pydantic import ValidationError

from llorch_api import AgentState, GPUNode, GPUNodeSpec, GPUNodeStatus, ObjectMeta, Resource
from llorch_store import (
    Conflict,
    Event,
    EventType,
    Forbidden,
    Invalid,
    JsonObject,
    Key,
    Listing,
    NotFound,
    StoreError,
    Unavailable,
)
from llorch_store.core.merge import merge_patch
from llorch_web.auth import Tokens

from .core.node_wire import heartbeat, registration

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Resource)

REQUEST_S: Final = 5.0
"""For one answer, a deregistration too: an agent that is asked to end waits no longer for it."""
POLL_S: Final = 25.0
"""How long the control plane holds a long poll without news."""
RETRY_S: Final = (1.0, 30.0)
"""Least and most seconds before the long poll is tried again."""
NOT_HERE: Final = "the node API holds nothing but this node"


class NodeApiStore:
    """The GPUNode `node` and no other object. Use as an async context manager; `speaks_for` comes before the first request."""

    def __init__(
        self,
        url: str,
        tokens: Tokens,
        node: str,
        *,
        pools: tuple[str, ...] = (),
        register: bool = True,
        tls: ssl.SSLContext | None = None,
        draw: random.Random,
    ) -> None:
        """`url` is the operator's base URL. Without `register` the node is not registered here: it waits until it was.
        `tls` verifies the operator, by default with the system's authorities."""
        self._url = url.rstrip("/")
        self._tokens = tokens
        self._name = node
        self._pools = pools
        self._register_it = register
        self._tls = tls
        self._draw = draw
        self._snapshot: Callable[[], Mapping[str, Any]] = dict
        self._told_interval: Callable[[float], None] = lambda _: None
        self._status: dict[str, Any] = {}
        self._uid = ""
        self._node: GPUNode | None = None
        """With its spec; None until one was told, which is not the same as an empty one."""
        self._changed = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None

    def speaks_for(self, snapshot: Callable[[], Mapping[str, Any]], told_interval: Callable[[float], None]) -> None:
        """`snapshot` is the agent's part of the status, of which a registration is made. `told_interval` hears the seconds
        that the control plane wants between beats."""
        self._snapshot, self._told_interval = snapshot, told_interval

    async def __aenter__(self) -> NodeApiStore:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls or True), timeout=aiohttp.ClientTimeout(total=REQUEST_S)
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    # ---- what the publisher asks for

    async def apply(self, obj: R, *, field_manager: str) -> R:  # noqa: ARG002 - the control plane has a manager of its own
        """Registers the node. Its status is empty as far as is known here, so that all of it is told next."""
        self._mine(type(obj), Key("", obj.metadata.name))
        self._status = {}
        if self._register_it:
            answer = await self._ask("POST", "/register", registration(self._name, self._snapshot(), self._pools))
        else:
            answer = await self._ask("GET", f"/{self._name}/spec", query={"wait": "0"})
        self._take(answer)
        return cast(R, self._object())

    async def patch_status(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:  # fmt: skip
        """A heartbeat with the whole status; once the agent has stopped, the deregistration."""
        del field_manager, resource_version
        self._mine(kind, key)
        if not self._uid or (uid and uid != self._uid):
            raise NotFound(f"GPUNode {self._name} is another one now")
        wanted = merge_patch(self._status, patch)
        if wanted.get("agent", {}).get("state") == AgentState.STOPPED:
            await self._deregister()
        else:
            body = heartbeat(self._name, wanted, self._pools)
            answer = await self._ask("POST", f"/{self._name}/heartbeat", body)
            self._take(answer)
            if isinstance(told := answer.get("next_heartbeat_ms"), int | float) and told > 0:
                self._told_interval(told / 1000)
        self._status = wanted
        return cast(R, self._object())

    async def _deregister(self) -> None:
        try:
            await self._ask("DELETE", f"/{self._name}")
        except NotFound:
            log.debug("node %s was not registered any more", self._name)

    # ---- what assignments ask for

    async def watch(
        self, kind: type[R], *, namespace: str | None = None, name: str | None = None
    ) -> AsyncGenerator[Event[R], None]:
        """This node whenever its spec is another one. Never raises for a control plane that is away."""
        del namespace
        self._mine(kind, Key("", name or ""))
        told: tuple[str, int] | None = None
        poll = asyncio.create_task(self._poll(), name="node spec")
        try:
            while True:
                self._changed.clear()
                node = self._node
                if node is not None and (node.metadata.uid, node.metadata.generation) != told:
                    yield Event(EventType.MODIFIED if told else EventType.ADDED, cast(R, node))
                    if told is None:
                        yield Event(EventType.SYNCED)
                    told = (node.metadata.uid, node.metadata.generation)
                    continue
                change = asyncio.create_task(self._changed.wait())
                try:
                    await asyncio.wait({change, poll}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
                if poll.done():
                    poll.result()
        finally:
            poll.cancel()
            await asyncio.wait({poll})

    async def _poll(self) -> None:
        failures = 0
        while True:
            if not self._uid:
                await asyncio.sleep(RETRY_S[0] * self._draw.uniform(0.1, 1.0))
                continue
            query = {"wait": f"{POLL_S:.0f}"}
            if self._node is not None and self._node.metadata.uid == self._uid:
                query |= {"uid": self._uid, "generation": str(self._node.metadata.generation)}
            began = time.monotonic()
            try:
                answer = await self._ask("GET", f"/{self._name}/spec", query=query, within_s=POLL_S + REQUEST_S)
                if answer:
                    self._take(answer)
            except StoreError as error:
                failures += 1
                log.debug("no spec of node %s: %s", self._name, error)
                most = min(RETRY_S[1], 2.0**failures)
                await asyncio.sleep(RETRY_S[0] + self._draw.random() * (most - RETRY_S[0]))
            else:
                failures = 0
                if not answer and time.monotonic() - began < RETRY_S[0]:
                    await asyncio.sleep(RETRY_S[0])  # it holds no polls: not to be asked without a pause

    def _take(self, answer: Mapping[str, Any]) -> None:
        """Learns uid and spec. A control plane that tells neither gives no assignments. Raises Unavailable."""
        self._uid = str(answer.get("uid") or self._name)
        if "uid" not in answer or "spec" not in answer:
            return
        known, generation = self._node, int(answer.get("generation", 0))
        if known is not None and known.metadata.uid == self._uid and known.metadata.generation >= generation:
            return
        try:
            spec = GPUNodeSpec.model_validate(answer["spec"])
        except ValidationError as error:
            raise Unavailable(f"its spec cannot be read: {error.errors()[0]['msg']}") from error
        self._node = GPUNode(metadata=ObjectMeta(name=self._name, uid=self._uid, generation=generation), spec=spec)
        self._changed.set()

    def _object(self) -> GPUNode:
        return GPUNode(metadata=ObjectMeta(name=self._name, uid=self._uid), status=GPUNodeStatus.model_validate(self._status))

    # ---- what nobody asks for here

    async def get(self, kind: type[R], key: Key) -> R:
        """This node. Pools are not told about their replicas from here: their status is the operator's. Raises NotFound."""
        if kind is not GPUNode or key.name != self._name or not self._uid:
            raise NotFound(f"{kind.KIND} {key}: {NOT_HERE}")
        return cast(R, self._object())

    async def list(self, kind: type[R], *, namespace: str | None = None) -> Listing[R]:
        """Raises Forbidden."""
        raise Forbidden(f"{kind.PLURAL} of {namespace or 'all namespaces'}: {NOT_HERE}")

    async def patch(
        self, kind: type[R], key: Key, patch: JsonObject, *, field_manager: str, uid: str = "", resource_version: str = ""
    ) -> R:
        """Raises Forbidden."""
        del patch, field_manager, uid, resource_version
        raise Forbidden(f"{kind.KIND} {key}: {NOT_HERE}")

    async def delete(self, kind: type[R], key: Key, *, uid: str = "") -> None:
        """Raises Forbidden."""
        del uid
        raise Forbidden(f"{kind.KIND} {key}: {NOT_HERE}")

    def _mine(self, kind: type[Resource], key: Key) -> None:
        if kind is not GPUNode:
            raise NotFound(f"{kind.KIND} {key}: {NOT_HERE}")
        if key.name != self._name:
            raise Forbidden(f"{kind.KIND} {key}: {NOT_HERE}")

    # ---- the wire

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, query: Mapping[str, str] | None = None,
        within_s: float = REQUEST_S,
    ) -> dict[str, Any]:  # fmt: skip
        """The answer's JSON; empty for 204. Raises StoreError."""
        assert self._session is not None, "used outside of its context"
        headers = {**dict(self._tokens.headers()), **({"Content-Type": "application/json"} if body is not None else {})}
        try:
            async with self._session.request(
                method,
                f"{self._url}/v2/nodes{path}",
                data=msgspec.json.encode(body) if body is not None else None,
                params=query,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=within_s),
            ) as answer:
                content = await answer.read()
        except TimeoutError as error:
            raise Unavailable(f"{self._url} did not answer within {within_s:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{self._url}: {error}") from error
        found = _json(content)
        if answer.status < 300:
            return found
        raise _error(answer.status, str(found.get("message") or f"{self._url} answered {answer.status}"), answer.headers)


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(content) if content else {}
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _error(status: int, message: str, headers: Mapping[str, str]) -> StoreError:
    match status:
        case 404:
            return NotFound(message)
        case 409:
            return Conflict(message)
        case 401 | 403:
            return Forbidden(message)
        case 400 | 413 | 422:
            return Invalid(message)
    wish = headers.get("Retry-After", "")
    return Unavailable(message, retry_after=float(wish) if wish.isdigit() else None)
