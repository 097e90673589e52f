"""Pools that exist only because a handoff file names them: made for the first replica, removed with the last."""

from __future__ import annotations

import logging
import re

from llorch_api import GPUPool, GPUPoolSpec, ModelSpec, ObjectMeta
from llorch_api.gpupool import HANDOFF_LABEL, HANDOFF_SOURCE
from llorch_store import Key, NotFound, Store, StoreError

from .core.nodes import handoff_replicas
from .core.views import PoolKey
from .fleet import Fleet

log = logging.getLogger("llorch.operator.handoff")

FIELD_MANAGER = "llorch-operator"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class HandoffPools:
    """Keeps one GPUPool per pool name that handoff files speak of, in the operator's namespace."""

    def __init__(self, store: Store, fleet: Fleet, namespace: str) -> None:
        self._store = store
        self._fleet = fleet
        self._namespace = namespace
        self._warned: set[str] = set()

    async def reconcile(self, missing: set[str]) -> None:
        """Makes the `missing` pools, and removes those of ours that no file names any more and nobody has edited."""
        for name in sorted(missing):
            if _NAME.fullmatch(name):
                await self._make(name)
            elif name not in self._warned:
                self._warned.add(name)
                log.warning("handoff pool_id %r cannot be a pool's name: use lower-case letters, digits and '-'", name)
        used = {pool for node in self._fleet.nodes.values() for pool in handoff_replicas(node).values()}
        for key, pool in list(self._fleet.pools.items()):
            ours = pool.metadata.labels.get(HANDOFF_LABEL) == "handoff" and pool.metadata.generation <= 1
            if ours and key.namespace == self._namespace and key.name not in used:
                await self._remove(key, pool)

    async def _make(self, name: str) -> None:
        spec = GPUPoolSpec(model=ModelSpec(source=HANDOFF_SOURCE), replicas=0)
        pool = GPUPool(metadata=ObjectMeta(name=name, namespace=self._namespace, labels={HANDOFF_LABEL: "handoff"}), spec=spec)
        try:
            self._fleet.wrote(await self._store.apply(pool, field_manager=FIELD_MANAGER))
            log.info("pool %s made for a handoff file", name)
        except StoreError as error:
            log.warning("could not make pool %s for a handoff file: %s", name, error)

    async def _remove(self, key: PoolKey, pool: GPUPool) -> None:
        try:
            await self._store.delete(GPUPool, Key(*key), uid=pool.metadata.uid)
            log.info("pool %s removed: no handoff file names it any more", key.name)
        except NotFound:
            log.debug("pool %s was gone already", key.name)
        except StoreError as error:
            log.warning("could not remove pool %s: %s", key.name, error)
            return
        self._fleet.forget_pool(key)
