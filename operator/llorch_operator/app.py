"""The operator's parts put together: over a store's watches (home), or inside kopf (Kubernetes)."""

from __future__ import annotations

import asyncio
import logging
import time

from aiohttp import web
from prometheus_client import CollectorRegistry

from llorch_model.access import SourceAccess
from llorch_store import Store
from llorch_web.auth import Tokens

from .core.liveness import LivenessTracker, Timing
from .events import Events, LoggedEvents
from .feed import feed
from .fleet import Fleet
from .metrics import OperatorMetrics
from .node_api import NodeApi
from .node_registry import NodeRegistry
from .reconciler import Reconciler, wall_clock
from .settings import OperatorSettings

log = logging.getLogger("llorch.operator")

STUCK_SECONDS = 30.0
"""Seconds after which a loop that does not come round fails the liveness probe."""


class Operator:
    """The reconciler and what it works on."""

    def __init__(
        self, store: Store, settings: OperatorSettings, *, events: Events | None = None, claimed_hosts: bool = True
    ) -> None:
        self._store = store
        timing = Timing(node_timeout=settings.node_timeout_ms / 1000, grace=float(settings.replace_grace_secs))
        self.fleet = Fleet(LivenessTracker(timing), time.monotonic, claimed_hosts=claimed_hosts)
        tokens = Tokens(settings.api_token, settings.api_token_file)
        self.reconciler = Reconciler(
            store,
            self.fleet,
            events or LoggedEvents(),
            namespace=settings.namespace,
            load_deadline=float(settings.load_deadline_secs),
            tokens=tokens,
            tls=settings.client_tls(),
            access=SourceAccess(settings.allow_private_sources, settings.hf_token_file),
        )
        self.registry = CollectorRegistry()
        self.registry.register(OperatorMetrics(self.fleet))
        self._node_api: NodeApi | None = None
        if settings.cloud_profile:
            interval = settings.heartbeat_interval_secs
            nodes = NodeRegistry(store, self.fleet, interval=interval, wall_clock=wall_clock)
            self._node_api = NodeApi(nodes, self.fleet, tokens, self.registry, interval=interval)
            if not tokens.configured:
                log.warning("the node API has no LLORCH_API_TOKEN: it answers peers on loopback and no others")

    def routes(self) -> list[web.RouteDef]:
        """The node API, or where the cloud profile is off the word that it is. It asks for tokens itself."""
        return node_api_off() if self._node_api is None else self._node_api.routes()

    def end_requests(self) -> None:
        """Ends what waits for a change; to be called before the server is stopped."""
        self.fleet.spec_bell.close()

    async def run(self) -> None:
        """Watches the store and reconciles until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(feed(self._store, self.fleet), name="feed")
            group.create_task(self.reconciler.run(), name="reconciler")

    def health(self) -> str:
        """Why the operator is not healthy; empty when it is."""
        idle = time.monotonic() - self.reconciler.last_tick
        return f"the reconciler has not come round for {idle:.0f} s" if idle > STUCK_SECONDS else ""


async def cloud_profile_is_off(_: web.Request) -> web.Response:
    """The node API where ORCHESTRATORD_CLOUD_PROFILE is not true."""
    text = "the cloud profile is off: set ORCHESTRATORD_CLOUD_PROFILE=true on the operator"
    return web.json_response({"success": False, "message": text, "node_id": ""}, status=503)


def node_api_off() -> list[web.RouteDef]:
    """Routes of the node API as they answer while the cloud profile is off."""
    return [
        web.route("*", "/v2/nodes", cloud_profile_is_off),
        web.route("*", "/v2/nodes/{tail:.*}", cloud_profile_is_off),
        web.route("*", "/v2/catalog/availability", cloud_profile_is_off),
    ]
