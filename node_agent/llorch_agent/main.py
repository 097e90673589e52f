"""The agent as a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from urllib.parse import urlsplit

from llorch_store import StoreError
from llorch_store.default import default_store
from llorch_store.factory import open_store
from llorch_web.application import application
from llorch_web.auth import Tokens, is_loopback
from llorch_web.logging import configure
from llorch_web.run import run as run_program
from llorch_web.run import stop_requested
from llorch_web.server import Server
from llorch_web.settings import StartError, load

from .app import Agent
from .node_api_store import NodeApiStore
from .settings import AgentSettings

log = logging.getLogger(__name__)

SERVER_STOP_S = 1.0
"""For answers that are still being written when the engines are gone already."""


def main() -> None:
    """`llorch agent`: runs until SIGTERM or SIGINT. Exit code 1 when a part of it dies, 2 when it cannot start."""
    settings = load(AgentSettings)
    configure("agent", node_id=settings.node_id, machine_id=settings.machine)
    run_program(lambda: run(settings))


async def run(settings: AgentSettings) -> None:
    """Opens the store, or what stands for it, listens, and works until it is asked to stop."""
    stop = stop_requested()
    token = settings.api_token.get_secret_value() if settings.api_token else None
    tokens = Tokens(token, settings.api_token_file)
    try:
        if settings.over_http:
            assert settings.orchestrator_url is not None
            url = settings.orchestrator_url
            if _is_here(settings.advertised) and not _is_here(url):
                log.warning(
                    "%s is this machine alone: POOL_MANAGERD_ADDRESS says where the gateway reaches it", settings.advertised
                )
            api = NodeApiStore(
                url,
                tokens,
                settings.node_id,
                pools=settings.pools,
                register=settings.register_on_startup,
                tls=settings.client_tls(),
                draw=random.Random(),
            )
            async with api:
                # Also inside a cluster: this node is not the Node that its pod runs on.
                agent = Agent(settings.model_copy(update={"store": url}), api)
                api.speaks_for(agent.snapshot, agent.beat_every)
                await _serve(agent, settings, tokens, stop)
        else:
            spec = settings.store or default_store(os.environ)
            if settings.cloud_profile and settings.orchestrator_url is None and settings.store is None and spec != "kubernetes":
                text = "is not set — POOL_MANAGERD_CLOUD_PROFILE=true needs it, for example http://192.168.1.1:8080"
                raise StartError(f"ORCHESTRATORD_URL {text}")
            async with open_store(spec) as store:
                await _serve(Agent(settings, store), settings, tokens, stop)
    except StoreError as error:
        raise StartError(str(error)) from error
    except ExceptionGroup as group:
        # Each of them was logged where it happened.
        log.critical("the agent ends: %s", group.message)
        raise SystemExit(1) from group


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname
    return host == "localhost" or is_loopback(host)


async def _serve(agent: Agent, settings: AgentSettings, tokens: Tokens, stop: asyncio.Event) -> None:
    app = application(agent.routes(), registries=[agent.registry], tokens=tokens, health=agent.health)
    server = Server(app, settings.addr, variable="POOL_MANAGERD_ADDR", tls=settings.server_tls())
    await server.start()
    try:
        if settings.port == 0:
            agent.advertise(server.url)
        await agent.run(stop)
    finally:
        await server.stop(SERVER_STOP_S)
