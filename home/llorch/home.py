"""`llorch home`: operator, agent and gateway in one process, one server, one SQLite file."""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from llorch_agent.app import Agent
from llorch_agent.settings import AgentSettings
from llorch_gateway.app import Gateway
from llorch_gateway.settings import GatewaySettings
from llorch_operator.app import Operator
from llorch_operator.node_api import is_node_api
from llorch_operator.settings import OperatorSettings
from llorch_store import Store, StoreError
from llorch_store.factory import open_store
from llorch_web import logging as logs
from llorch_web.application import application
from llorch_web.auth import Tokens
from llorch_web.owner import until
from llorch_web.run import run, stop_requested
from llorch_web.server import Server
from llorch_web.settings import StartError, load

from .demo import demo_model, demo_pool
from .progress import Progress
from .settings import HomeSettings

DRAIN_SECONDS = 2.0
"""What a request in flight still gets after Ctrl-C."""
SERVER_STOP_SECONDS = 1.0


def serve(*, demo: bool) -> None:
    """Runs until SIGINT or SIGTERM. A setting or a place that does not do ends it with one line and exit code 2."""
    settings = load(HomeSettings)
    parts = Settings(settings, load(AgentSettings), load(OperatorSettings), load(GatewaySettings))
    logs.configure("home", for_people=True)
    run(lambda: _serve(parts, demo=demo))


class Settings(NamedTuple):
    """Of home and of the three that it is made of."""

    home: HomeSettings
    agent: AgentSettings
    operator: OperatorSettings
    gateway: GatewaySettings


@contextmanager
def _only_home_here(directory: Path) -> Iterator[None]:
    """Two homes on one directory would fight over engines and handoff files."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "home.lock").open("a+")
    except OSError as error:
        text = f"{directory}: {error.strerror}: POOL_MANAGERD_RUNTIME_DIR names another place for what home keeps"
        raise StartError(text) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StartError(f"another llorch home runs on {directory}: stop it, or set POOL_MANAGERD_RUNTIME_DIR") from error
        yield


async def _serve(settings: Settings, *, demo: bool) -> None:
    progress = Progress(time.monotonic)
    stop = stop_requested()
    home = settings.home
    with _only_home_here(home.state_dir):
        try:
            async with open_store(home.store or f"sqlite:{home.state_dir / 'llorch.db'}") as store:
                await _serve_on(store, settings, stop, progress, demo=demo)
        except StoreError as error:
            raise StartError(str(error)) from error
    progress.say("stopped")


async def _serve_on(store: Store, settings: Settings, stop: asyncio.Event, progress: Progress, *, demo: bool) -> None:
    operator = Operator(store, settings.operator)
    gateway = Gateway(store, settings.gateway)
    agent = Agent(settings.agent, store)
    server = Server(
        _application(operator, gateway, agent, settings.agent),
        settings.home.addr,
        variable="ORCHESTRATORD_ADDR",
        tls=settings.agent.server_tls(),
    )
    await server.start()
    try:
        progress.say(f"listening on {server.url}")
        agent.advertise(server.url)
        async with asyncio.TaskGroup() as group:
            reconciling = group.create_task(operator.run(), name="operator")
            serving = group.create_task(_agent_and_gateway(agent, gateway, stop), name="agent and gateway")
            if demo:
                model = await asyncio.to_thread(demo_model, settings.home.model_dir)
                await store.apply(demo_pool(model), field_manager="llorch-home")
                progress.say(f"demo model: {model}")
            following = group.create_task(progress.follow(store, server.url), name="progress")
            await stop.wait()
            progress.say("stopping")
            following.cancel()
            await asyncio.wait({serving})
            reconciling.cancel()
    finally:
        operator.end_requests()
        await server.stop(SERVER_STOP_SECONDS)


def _application(operator: Operator, gateway: Gateway, agent: Agent, settings: AgentSettings) -> web.Application:
    token = settings.api_token.get_secret_value() if settings.api_token else None
    return application(
        [*gateway.routes(), *agent.routes(), *operator.routes()],
        registries=[operator.registry, gateway.registry, agent.registry],
        tokens=Tokens(token, settings.api_token_file),
        protects=lambda path: path.startswith(("/replicas/", "/v2/")) and not is_node_api(path),
        health=lambda: operator.health() or agent.health(),
    )


async def _agent_and_gateway(agent: Agent, gateway: Gateway, stop: asyncio.Event) -> None:
    """Both at work until `stop` is set; then requests in flight get a few seconds, and engines end."""
    await gateway.start()
    try:
        await agent.start()
        try:
            await until(stop, agent.wait())
        finally:
            await agent.stop(DRAIN_SECONDS)
    finally:
        await gateway.stop()
