"""Feeds the fleet from a store's watches, where no kopf does: at home, and for two daemons side by side."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from llorch_api import GPUNode, GPUPool
from llorch_store import EventType, Store

from .core.views import PoolKey
from .fleet import Fleet


async def feed(store: Store, fleet: Fleet) -> None:
    """Watches nodes and pools until it is cancelled."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_feed_nodes(store, fleet), name="feed-nodes")
        group.create_task(_feed_pools(store, fleet), name="feed-pools")


async def _feed_nodes(store: Store, fleet: Fleet) -> None:
    async with aclosing(store.watch(GPUNode)) as events:
        async for event in events:
            if event.object is None:
                continue
            if event.type is EventType.DELETED:
                fleet.forget_node(event.object.metadata.name)
            else:
                fleet.observe_node(event.object)


async def _feed_pools(store: Store, fleet: Fleet) -> None:
    async with aclosing(store.watch(GPUPool)) as events:
        async for event in events:
            if event.object is None:
                continue
            if event.type is EventType.DELETED:
                fleet.forget_pool(PoolKey(event.object.metadata.namespace, event.object.metadata.name))
            else:
                fleet.observe_pool(event.object)
