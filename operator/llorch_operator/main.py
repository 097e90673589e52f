"""The operator as a process: on Kubernetes inside kopf, elsewhere over the store's own watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from aiohttp import web
from llorch_web.logging import configure_logging
from llorch_web.metrics import metrics_handler
from llorch_web.server import serving
from llorch_web.settings import load

from llorch_store import Store, StoreError
from llorch_store.default import default_store
from llorch_store.factory import open_store

from .app import Operator, node_api_off
from .settings import OperatorSettings

log = logging.getLogger("llorch.operator")


def main() -> None:
    """`llorch operator`: runs until SIGTERM or SIGINT; exits 1 when a part of it dies."""
    settings = load(OperatorSettings)
    configure_logging("operator")
    try:
        asyncio.run(run(settings))
    except StoreError as error:
        print(f"llorch: {error}", file=sys.stderr)
        raise SystemExit(1) from error


async def run(settings: OperatorSettings) -> None:
    """Opens the store and runs the operator on it."""
    spec = settings.store or default_store(os.environ)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_store(spec) as store:
        if spec == "kubernetes":
            await _run_in_kopf(store, settings, stop)
        else:
            await _run_alone(store, settings, stop)


def _application(operator: Operator) -> web.Application:
    app = web.Application()
    app.router.add_get("/health", operator.health)
    app.router.add_get("/metrics", metrics_handler(operator.registry))
    app.router.add_routes(node_api_off())
    return app


async def _run_alone(store: Store, settings: OperatorSettings, stop: asyncio.Event) -> None:
    operator = Operator(store, settings)
    async with serving(_application(operator), settings.addr, variable="ORCHESTRATORD_ADDR"):
        await _until(stop, operator.run())


async def _run_in_kopf(store: Store, settings: OperatorSettings, stop: asyncio.Event) -> None:
    import kopf

    from .addresses import AgentPods
    from .handlers import KubernetesEvents, build_registry
    from .preflight import require_crds

    await require_crds(store)
    operator = Operator(store, settings, events=KubernetesEvents(), claimed_hosts=False)
    pods = AgentPods(operator.fleet, settings.namespace, settings.agent_selector)
    registry = build_registry(operator.fleet, _both(operator.reconciler.run(), pods.run()), stop)
    async with serving(_application(operator), settings.addr, variable="ORCHESTRATORD_ADDR"):
        # kopf installs no signal handlers outside its own command line; `stop` ends it.
        await kopf.operator(registry=registry, clusterwide=True, standalone=True, stop_flag=stop)


async def _both(*parts: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(part)


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until `stop` is set. When the work ends first, its error is ours."""
    task, waiter = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for pending in (task, waiter):
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pending
