"""The agent as a process of its own."""

from __future__ import annotations

import logging
import os

from llorch_store import StoreError
from llorch_store.default import default_store
from llorch_store.factory import open_store
from llorch_web.application import application
from llorch_web.auth import Tokens
from llorch_web.logging import configure
from llorch_web.run import run as run_program
from llorch_web.run import stop_requested
from llorch_web.server import Server
from llorch_web.settings import StartError, load

from .app import Agent
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
    """Opens the store, listens, and works until it is asked to stop."""
    stop = stop_requested()
    token = settings.api_token.get_secret_value() if settings.api_token else None
    try:
        async with open_store(settings.store or default_store(os.environ)) as store:
            agent = Agent(settings, store)
            app = application(
                agent.routes(), registries=[agent.registry], tokens=Tokens(token, settings.api_token_file), health=agent.health
            )
            server = Server(app, settings.addr, variable="POOL_MANAGERD_ADDR")
            await server.start()
            try:
                if settings.port == 0:
                    agent.advertise(server.url)
                await agent.run(stop)
            finally:
                await server.stop(SERVER_STOP_S)
    except StoreError as error:
        raise StartError(str(error)) from error
    except ExceptionGroup as group:
        # Each of them was logged where it happened.
        log.critical("the agent ends: %s", group.message)
        raise SystemExit(1) from group
