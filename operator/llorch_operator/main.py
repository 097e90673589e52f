"""The operator as a process: on Kubernetes inside kopf, elsewhere over the store's own watches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from llorch_store import Store, StoreError
from llorch_store.default import default_store
from llorch_store.factory import open_store
from llorch_web import logging as logs
from llorch_web.application import application
from llorch_web.owner import Companion, until
from llorch_web.run import run, stop_requested
from llorch_web.server import Server
from llorch_web.settings import StartError, load

from .app import Operator
from .settings import OperatorSettings


def main() -> None:
    """`llorch operator`: runs until SIGTERM or SIGINT; a part of it that dies ends it with exit code 1."""
    settings = load(OperatorSettings)
    logs.configure("operator")
    run(lambda: operate(settings))


async def operate(settings: OperatorSettings) -> None:
    """Opens the store and runs the operator on it."""
    spec = settings.store or default_store(os.environ)
    stop = stop_requested()
    try:
        async with open_store(spec) as store:
            if spec == "kubernetes":
                await _in_kopf(store, settings, stop)
            else:
                operator = Operator(store, settings)
                await _serve(operator, settings, lambda: until(stop, operator.run()))
    except StoreError as error:
        raise StartError(str(error)) from error


async def _serve(operator: Operator, settings: OperatorSettings, work: Callable[[], Awaitable[None]]) -> None:
    app = application(operator.routes(), registries=[operator.registry], health=operator.health)
    server = Server(app, settings.addr, variable="ORCHESTRATORD_ADDR", tls=settings.server_tls())
    await server.start()
    try:
        await work()
    finally:
        operator.end_requests()
        await server.stop()


async def _in_kopf(store: Store, settings: OperatorSettings, stop: asyncio.Event) -> None:
    import kopf

    from .addresses import AgentPods
    from .handlers import build_registry
    from .kube_events import KubernetesEvents
    from .leases import NodeLeases
    from .preflight import require_crds

    await require_crds(store)
    events = KubernetesEvents()
    operator = Operator(store, settings, events=events, claimed_hosts=False)
    pods = AgentPods(operator.fleet, settings.namespace, settings.agent_selector)
    leases = operator.reconciler.renewals = NodeLeases(operator.fleet, settings.namespace)
    reconciler = Companion(lambda: _together(operator.reconciler.run(), pods.run(), events.run(), leases.run()), stop)
    registry = build_registry(operator.fleet, reconciler.start, reconciler.end)
    # kopf installs no signal handlers outside its own command line; `stop` ends it.
    await _serve(operator, settings, lambda: kopf.operator(registry=registry, clusterwide=True, standalone=True, stop_flag=stop))
    reconciler.raise_what_killed_it()


async def _together(*parts: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(part)
