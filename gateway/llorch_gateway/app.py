"""The gateway, composed: for a process of its own, or as a part of another."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CollectorRegistry

from llorch_store import Store
from llorch_web.application import application
from llorch_web.auth import Tokens
from llorch_web.body import MIB
from llorch_web.upstream import Upstream

from .agents import CONNECT_SECONDS, Agents
from .core.pools import PoolTable
from .metrics import GatewayMetrics
from .proxy import Proxy
from .server import OpenAIRoutes
from .settings import GatewaySettings
from .view import PoolsView

MAX_IDLE_CONNECTIONS = 256
"""Kept per agent."""


class Gateway:
    """Serves the pools of a store. `start` and `stop` belong to one owner, who may `wait` for its death."""

    def __init__(self, store: Store, settings: GatewaySettings, *, rng: random.Random | None = None) -> None:
        """`rng` breaks ties between equal replicas."""
        draw = (rng or random.Random()).random
        token = settings.api_token.get_secret_value() if settings.api_token else None
        self.registry = CollectorRegistry()
        metrics = GatewayMetrics(self.registry)
        self._upstream = Upstream(
            connect_timeout=CONNECT_SECONDS,
            idle_timeout=float(settings.answer_timeout_secs),
            max_idle=MAX_IDLE_CONNECTIONS,
            tls=settings.client_tls(),
        )
        self._agents = Agents(self._upstream, Tokens(token, settings.api_token_file), metrics, clock=time.monotonic, draw=draw)
        self._view = PoolsView(store, settings.namespaces, qualified=settings.qualified, changed=self._agents.want)
        proxy = Proxy(self._upstream, self._agents, self._known, metrics, draw=draw)
        self._api = OpenAIRoutes(self._view, proxy, metrics, max_body=settings.max_body_mib * MIB)
        self._owner: asyncio.Task[None] | None = None

    def _known(self) -> PoolTable:
        return self._view.table

    def routes(self) -> list[web.AbstractRouteDef]:
        """The OpenAI API; /health and /metrics are the application's own."""
        return self._api.routes()

    def health(self) -> str:
        """Why the gateway is not healthy; empty when it is. A store that is away later is no reason: the last pools hold."""
        if self._owner is None or self._owner.done():
            return "the gateway does not run"
        return "" if self._view.synced else "the pools are not read yet"

    async def start(self) -> None:
        """Begins to watch pools and agents, and returns at once."""
        self._owner = asyncio.create_task(self._work(), name="gateway")

    async def wait(self) -> None:
        """Returns when the gateway was stopped, and raises what ended it otherwise."""
        if self._owner is not None:
            await asyncio.wait({self._owner})
            if not self._owner.cancelled():
                self._owner.result()

    async def stop(self) -> None:
        """Ends the watches and every connection. Requests in flight are let end by the server before."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.cancel()
            await asyncio.wait({owner})
        await self._upstream.close()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._view.run(), name="pools")
            group.create_task(self._agents.run(), name="agents")


def create_app(store: Store, settings: GatewaySettings) -> web.Application:
    """An application that is the gateway and nothing else, started and stopped with it."""
    gateway = Gateway(store, settings)
    app = application(gateway.routes(), registries=[gateway.registry], health=gateway.health)

    async def life(_: web.Application) -> AsyncIterator[None]:
        await gateway.start()
        yield
        await gateway.stop()

    app.cleanup_ctx.append(life)
    return app
