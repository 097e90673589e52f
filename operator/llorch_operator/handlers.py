"""kopf's part: watch events in. Every handler is a sentence into modules that know no kopf.

Only `on.event` is used, and it returns None: no finalizer, no annotation, no extra PATCH per heartbeat.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import kopf
from pydantic import ValidationError

from llorch_api import GROUP, VERSION, GPUNode, GPUPool

from .core.views import PoolKey
from .fleet import Fleet

log = logging.getLogger("llorch.operator.watch")


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's settings for thousands of small objects that change every ten seconds."""
    settings.scanning.disabled = True
    settings.queueing.idle_timeout = 15  # longer than a heartbeat, so that an object's worker is not made anew for each
    settings.watching.inactivity_timeout = 12  # far below the node time-out; a quiet stream reconnects cheaply
    settings.watching.chunk_size = 500
    settings.watching.connect_timeout = 5
    settings.networking.request_timeout = 10
    settings.networking.error_backoffs = (0.5, 1, 2, 4, 8)
    settings.networking.enforce_retry_after = True
    settings.posting.enabled = False  # llorch posts its own, from outside of handlers
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # at info it tells of every event that a handler took
    settings.process.ultimate_exiting_timeout = 20
    settings.peering.standalone = True
    settings.persistence.finalizer = f"{GROUP}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP, key="last", v1=False)


def _is_gone(event: kopf.RawEvent) -> bool:
    return event.get("type") == "DELETED"


def node_event(fleet: Fleet, event: kopf.RawEvent) -> None:
    """Takes in one event about a GPUNode."""
    raw: Any = event["object"]
    if _is_gone(event):
        fleet.forget_node(raw["metadata"]["name"])
        return
    try:
        fleet.observe_node(GPUNode.model_validate(raw))
    except ValidationError as error:
        log.warning("GPUNode %s is not readable: %s", raw["metadata"]["name"], error.errors()[0]["msg"])


def pool_event(fleet: Fleet, event: kopf.RawEvent) -> None:
    """Takes in one event about a GPUPool."""
    raw: Any = event["object"]
    key = PoolKey(raw["metadata"]["namespace"], raw["metadata"]["name"])
    if _is_gone(event) or raw["metadata"].get("deletionTimestamp"):
        fleet.forget_pool(key)
        return
    try:
        fleet.observe_pool(GPUPool.model_validate(raw))
    except ValidationError as error:
        log.warning("GPUPool %s is not readable: %s", key, error.errors()[0]["msg"])


def build_registry(fleet: Fleet, start: Callable[[], None], end: Callable[[], Awaitable[None]]) -> kopf.OperatorRegistry:
    """Every handler of the operator. `start` and `end` begin and end the reconciler with kopf."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def started(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        start()

    @kopf.on.cleanup(registry=registry)
    async def stopped(**_: Any) -> None:
        await end()

    @kopf.on.login(registry=registry)
    async def logged_in(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, "gpunodes", registry=registry)
    async def node_seen(event: kopf.RawEvent, **_: Any) -> None:
        node_event(fleet, event)

    @kopf.on.event(GROUP, VERSION, "gpupools", registry=registry)
    async def pool_seen(event: kopf.RawEvent, **_: Any) -> None:
        pool_event(fleet, event)

    return registry
