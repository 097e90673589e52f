"""`llorch home`: operator, agent and gateway in one process, one server, one SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from llorch_agent.app import Agent
from llorch_gateway.app import Gateway
from llorch_gateway.settings import GatewaySettings

from llorch_agent.settings import AgentSettings
from llorch_operator.app import Operator, node_api_off
from llorch_operator.settings import OperatorSettings
from llorch_store import StoreError
from llorch_store.factory import open_store
from llorch_web.logging import configure_logging
from llorch_web.metrics import metrics_handler
from llorch_web.server import serving
from llorch_web.settings import load

from .demo import demo_model, demo_pool
from .progress import Progress
from .settings import HomeSettings

log = logging.getLogger("llorch.home")

STOP_SECONDS = 5.0
"""Within which everything is gone after Ctrl-C, streams included."""


class HomeError(Exception):
    """Home cannot start. One line."""


def serve(*, demo: bool) -> int:
    """Runs until SIGINT or SIGTERM. Returns the exit code."""
    settings = load(HomeSettings)
    components = (load(AgentSettings), load(OperatorSettings), load(GatewaySettings))
    configure_logging("home")
    try:
        asyncio.run(_serve(settings, *components, demo=demo))
    except (HomeError, StoreError) as error:
        print(f"llorch: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _only_home_here(directory: Path) -> Iterator[None]:
    """Two homes on one directory would fight over engines and handoff files."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "home.lock").open("a+")
    except OSError as error:
        text = f"{directory}: {error.strerror}: POOL_MANAGERD_RUNTIME_DIR names another place for what home keeps"
        raise HomeError(text) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise HomeError(f"another llorch home runs on {directory}: stop it, or set POOL_MANAGERD_RUNTIME_DIR") from error
        yield


async def _serve(
    settings: HomeSettings,
    agent_settings: AgentSettings,
    operator_settings: OperatorSettings,
    gateway_settings: GatewaySettings,
    *,
    demo: bool,
) -> None:
    progress = Progress(time.monotonic)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        stack.enter_context(_only_home_here(settings.state_dir))
        store = await stack.enter_async_context(open_store(settings.store or f"sqlite:{settings.state_dir / 'llorch.db'}"))
        operator = Operator(store, operator_settings)
        gateway = Gateway(store, gateway_settings)
        agent = Agent(agent_settings, store)
        server = await stack.enter_async_context(
            serving(_application(operator, gateway, agent), settings.addr, variable="ORCHESTRATORD_ADDR")
        )
        agent.advertise(server.url)
        progress.say(f"listening on {server.url}")
        await stack.enter_async_context(_running(operator, gateway, agent, stop))
        if demo:
            model = await asyncio.to_thread(demo_model, settings.model_dir)
            await store.apply(demo_pool(model), field_manager="llorch-home")
            progress.say(f"demo model at {model}")
        watching = asyncio.create_task(progress.follow(store, server.url))
        await stop.wait()
        progress.say("stopping")
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    progress.say("stopped")


def _application(operator: Operator, gateway: Gateway, agent: Agent) -> web.Application:
    app = web.Application(client_max_size=32 * 1024 * 1024)
    app.router.add_get("/health", operator.health)
    app.router.add_get("/metrics", metrics_handler(operator.registry, gateway.registry, agent.registry))
    app.router.add_routes(gateway.routes())
    app.router.add_routes(agent.routes())
    app.router.add_routes(node_api_off())
    return app


@asynccontextmanager
async def _running(operator: Operator, gateway: Gateway, agent: Agent, stop: asyncio.Event) -> AsyncIterator[None]:
    """The three at work. Requests end first, then engines, then the store is closed; a part that dies stops home."""
    await agent.start()
    await gateway.start()
    reconciling = asyncio.create_task(_or_stop(operator.run(), stop), name="operator")
    try:
        yield
    finally:
        async with asyncio.timeout(STOP_SECONDS):
            await gateway.stop()
            await agent.stop()
            reconciling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reconciling


async def _or_stop(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    try:
        await work
    finally:
        stop.set()
