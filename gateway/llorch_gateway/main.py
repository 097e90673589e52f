"""The gateway as a process of its own."""

from __future__ import annotations

import asyncio
import os

from llorch_store import StoreError
from llorch_store.default import default_store
from llorch_store.factory import open_store
from llorch_web.application import application
from llorch_web.logging import configure
from llorch_web.owner import until
from llorch_web.run import run as run_program
from llorch_web.run import stop_requested
from llorch_web.server import Server
from llorch_web.settings import StartError, load

from .app import Gateway
from .settings import GatewaySettings


def main() -> None:
    """`llorch gateway`: runs until SIGTERM or SIGINT. Exit code 1 when a part of it dies, 2 when it cannot start."""
    settings = load(GatewaySettings)
    configure("gateway")
    run_program(lambda: run(settings))


async def run(settings: GatewaySettings, stop: asyncio.Event | None = None) -> None:
    """Opens the store, listens, and serves until `stop` is set, by default by a signal."""
    stop = stop or stop_requested()
    try:
        async with open_store(settings.store or default_store(os.environ)) as store:
            gateway = Gateway(store, settings)
            app = application(gateway.routes(), registries=[gateway.registry], health=gateway.health)
            server = Server(app, settings.addr, variable="LLORCH_GATEWAY_ADDR", tls=settings.server_tls())
            await server.start()
            try:
                await gateway.start()
                await until(stop, gateway.wait())
            finally:
                await server.stop(float(settings.drain_secs))
                await gateway.stop()
    except StoreError as error:
        raise StartError(str(error)) from error
