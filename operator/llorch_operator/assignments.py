"""Carries a plan out: assignments are keys of GPUNode.spec.replicas, and the operator is their only writer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llorch_api import AssignedDevice, AssignedModel, Assignment, Desired, GPUNode
from llorch_store import Key, NotFound, Store, StoreError

from .core.placement import Assign, Drain, Plan, Remove
from .core.revision import engine_arguments
from .core.strays import Stray
from .core.views import PoolKey, PoolView
from .events import Events
from .fleet import Fleet

log = logging.getLogger("llorch.operator.assignments")

FIELD_MANAGER = "llorch-operator"


class AssignmentWriter:
    """Writes one patch per node. Replica ids are `<pool>-<5 characters>` and never used again."""

    def __init__(self, store: Store, fleet: Fleet, events: Events, new_suffix: Callable[[], str]) -> None:
        self._store = store
        self._fleet = fleet
        self._events = events
        self._new_suffix = new_suffix

    async def write(self, plan: Plan, pools: Mapping[PoolKey, PoolView]) -> None:
        """Writes every change of `plan`. What could not be written is read again and comes up in the next plan."""
        patches: dict[str, dict[str, Any]] = defaultdict(dict)
        told: list[tuple[str, PoolKey, str, str]] = []
        for change in plan.changes:
            match change:
                case Assign(pool=key, node=node):
                    replica_id = f"{key.name[:50]}-{self._new_suffix()}"
                    compact = self._assignment(change, pools[key]).to_compact_json()
                    patches[node][replica_id] = {"desired": Desired.RUN.value, **compact}
                    mib = ", ".join(f"{share:,} MiB on {uuid}" for uuid, share in sorted(change.devices.items()))
                    told.append((node, key, "ReplicaPlaced", f"{replica_id} on {node}: {mib}"))
                case Drain(node=node, replica=replica_id, why=why):
                    patches[node][replica_id] = {"desired": Desired.DRAIN.value}
                    told.append((node, self._pool_of(node, replica_id), "ReplicaDrained", f"{replica_id} on {node}: {why}"))
                case Remove(node=node, replica=replica_id, why=why):
                    patches[node][replica_id] = None
                    told.append((node, self._pool_of(node, replica_id), "ReplicaRemoved", f"{replica_id} on {node}: {why}"))
        written = {node for node, patch in patches.items() if await self._patch(node, patch)}
        for node, key, reason, message in told:
            if node in written and key in self._fleet.pools:
                self._events.emit(self._fleet.pools[key], warning=False, reason=reason, message=message)
            elif node in written:
                log.info("%s: %s", reason, message, extra={"pool": str(key), "node_id": node})

    async def stop(self, strays: Iterable[Stray], namespace: str) -> None:
        """Names each in its node's spec to be stopped; once the agent says so, the key goes as any other does."""
        patches: dict[str, dict[str, Any]] = defaultdict(dict)
        for stray in strays:
            patches[stray.node][stray.replica] = Assignment(
                desired=Desired.STOP,
                pool=stray.pool or "unknown",
                namespace=namespace,
                revision=stray.revision,
                model=AssignedModel(source="unknown"),
                devices={},
                slots=1,
                context_tokens=1,
            ).to_json()
        for node, patch in patches.items():
            if await self._patch(node, patch):
                log.info("%s is ended: it was assigned through an earlier GPUNode", ", ".join(patch), extra={"node_id": node})

    async def _patch(self, node: str, replicas: dict[str, Any]) -> bool:
        known = self._fleet.nodes.get(node)
        if known is None:
            return False
        try:
            patch = {"spec": {"replicas": replicas}}
            changed = await self._store.patch(GPUNode, Key("", node), patch, field_manager=FIELD_MANAGER, uid=known.metadata.uid)
        except NotFound:
            self._fleet.forget_node(node)
            return False
        except StoreError as error:
            log.warning("could not write the assignments of node %s: %s", node, error)
            await self._read_again(node)
            return False
        self._fleet.wrote(changed)
        return True

    async def _read_again(self, node: str) -> None:
        """Whether the write happened is unknown: the next plan starts from what is there."""
        try:
            self._fleet.observe_node(await self._store.get(GPUNode, Key("", node)))
        except StoreError as error:
            log.warning("could not read node %s again: %s", node, error)
        self._fleet.look_again()

    def _assignment(self, change: Assign, view: PoolView) -> Assignment:
        pool = self._fleet.pools[change.pool]
        spec = pool.spec
        return Assignment(
            desired=Desired.RUN,
            pool=change.pool.name,
            namespace=change.pool.namespace,
            revision=view.revision,
            model=AssignedModel(
                source=view.source or spec.model.source,
                sha256=spec.model.sha256 or "",
                digest=view.digest,
                size_mib=view.model_size,
                aliases=list(spec.model.aliases),
                shape=view.shape,
            ),
            devices={uuid: AssignedDevice(vram_mib=share) for uuid, share in change.devices.items()},
            slots=spec.slots,
            context_tokens=spec.context_tokens,
            engine_args=engine_arguments(spec.engine.kv_cache_type, spec.engine.args),
            drain_deadline_seconds=spec.drain_deadline_seconds,
        )

    def _pool_of(self, node: str, replica_id: str) -> PoolKey:
        known = self._fleet.nodes.get(node)
        wanted = known.spec.replicas.get(replica_id) if known else None
        return PoolKey(wanted.namespace, wanted.pool) if wanted else PoolKey("", "")
