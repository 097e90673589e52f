"""Writes GPUPool status: endpoints for the gateways, counts and conditions; at most once a second per pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from llorch_api import Condition, ConditionStatus, GPUPool, GPUPoolStatus
from llorch_store import Key, NotFound, Store, StoreError

from .core.placement import Plan
from .core.pools import Resolution, Seen, status_of
from .core.views import PoolKey
from .events import Events
from .fleet import Fleet
from .status_patch import pool_patch

log = logging.getLogger("llorch.operator.pools")

FIELD_MANAGER = "llorch-operator"
MIN_INTERVAL = 1.0
"""Seconds between two writes to one pool, unless an endpoint must leave the routing."""
REFUSAL_INTERVAL = 60.0
"""Seconds between two rewrites of a message whose figures changed but whose reason did not."""


class PoolStatusWriter:
    """Composes and writes the operator's part of every pool's status."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        events: Events,
        clock: Callable[[], float],
        wall_clock: Callable[[], str],
        namespace: str,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._events = events
        self._clock = clock
        self._wall_clock = wall_clock
        self._namespace = namespace
        self._written: dict[PoolKey, float] = {}
        self._refused: dict[PoolKey, float] = {}

    async def write(self, resolutions: Mapping[PoolKey, Resolution], plan: Plan) -> float | None:
        """Writes what changed. Returns when a deferred write is due, None where nothing waits."""
        seen = self._fleet.seen().values()
        due: list[float] = []
        for key, pool in list(self._fleet.pools.items()):
            status = self._status(key, pool, list(seen), resolutions.get(key, Resolution(None)), plan)
            patch = pool_patch(pool, status)
            if not patch:
                continue
            now = self._clock()
            wait = self._written.get(key, 0.0) + MIN_INTERVAL - now if key in self._written else 0.0
            if wait > 0 and not pool.status.endpoints.keys() - status.endpoints.keys():
                due.append(now + wait)
                continue
            await self._patch(key, pool, status, patch)
        self._written = {key: at for key, at in self._written.items() if key in self._fleet.pools}
        return min(due, default=None)

    def _status(self, key: PoolKey, pool: GPUPool, seen: list[Seen], resolution: Resolution, plan: Plan) -> GPUPoolStatus:
        outcome = plan.pools.get(key)
        status = status_of(pool, seen, resolution, outcome, now=self._wall_clock(), handoff_namespace=self._namespace)
        return status.model_copy(update={"conditions": self._steady(key, pool.status.conditions, status.conditions)})

    def _steady(self, key: PoolKey, old: list[Condition], new: list[Condition]) -> list[Condition]:
        """A refusal whose reason is the same keeps its old figures for a minute: live free memory moves all the time."""
        known = {item.type: item for item in old}
        kept = []
        for item in new:
            before = known.get(item.type)
            same = before is not None and (before.status, before.reason, before.observed_generation) == (
                item.status, item.reason, item.observed_generation,
            )  # fmt: skip
            recent = self._clock() - self._refused.get(key, float("-inf")) < REFUSAL_INTERVAL
            keep = item.type == "Placed" and before is not None and same and recent and item.status is not ConditionStatus.TRUE
            kept.append(before if keep and before is not None else item)
        return kept

    async def _patch(self, key: PoolKey, pool: GPUPool, status: GPUPoolStatus, patch: dict[str, object]) -> None:
        try:
            written = await self._store.patch_status(
                GPUPool, Key(*key), patch, field_manager=FIELD_MANAGER, uid=pool.metadata.uid
            )
        except NotFound:
            self._fleet.forget_pool(key)
            return
        except StoreError as error:
            log.warning("could not write the status of pool %s: %s", key, error)
            self._fleet.look_again()
            return
        self._written[key] = self._clock()
        self._fleet.wrote(written)
        self._tell(key, pool, status)

    def _tell(self, key: PoolKey, pool: GPUPool, status: GPUPoolStatus) -> None:
        known = {item.type: item for item in pool.status.conditions}
        for item in status.conditions:
            before = known.get(item.type)
            if (
                item.type == "Placed"
                and item.status is ConditionStatus.FALSE
                and (before is None or before.message != item.message)
            ):
                self._refused[key] = self._clock()
                self._events.emit(pool, warning=True, reason=item.reason, message=item.message)
            elif item.type == "Available" and item.status is not (before.status if before else ConditionStatus.FALSE):
                self._events.emit(pool, warning=item.status is not ConditionStatus.TRUE, reason=item.reason, message=item.message)
