"""What the node API says of nodes: GET /v2/nodes and GET /v2/catalog/availability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from llorch_api import AgentState, GPUNode, GPUPool, NodePhase, ReplicaState
from llorch_api.gpupool import HANDOFF_SOURCE

from .node_wire import MIB, declared_pools, milliseconds
from .nodes import Pulse, phase_of
from .pools import Seen
from .views import PoolKey

_STATUS = {NodePhase.SUSPECT: "Online", NodePhase.LOST: "Offline"}
"""Phases that the wire has no word for."""


def wire_status(node: GPUNode, pulse: Pulse) -> str:
    """Registering, Online, Draining or Offline."""
    phase = phase_of(node, pulse)
    return _STATUS.get(phase, phase.value)


def node_info(seen: Seen, now_ms: int) -> dict[str, Any]:
    """One node. `pool_status` and `online` are llorch's own additions."""
    node, status = seen.node, seen.node.status
    registered = milliseconds(node.metadata.creation_timestamp)
    state = wire_status(node, seen.pulse)
    pools = pool_snapshots(node)
    return {
        "node_id": node.metadata.name,
        "machine_id": status.agent.machine_id or node.metadata.name,
        "address": seen.base_url or status.agent.address,
        "pools": [pool["pool_id"] for pool in pools],
        "capabilities": {
            "gpus": [
                {
                    "device_id": device.index,
                    "name": device.name,
                    "vram_total_bytes": device.vram_total_mib * MIB,
                    "compute_capability": device.compute_capability,
                }
                for _, device in sorted(status.devices.items(), key=lambda item: (item[1].index, item[0]))
                if device.kind == "gpu"
            ],
            "cpu_cores": status.system.cpu_cores or None,
            "ram_total_bytes": status.system.memory_total_mib * MIB or None,
        },
        "status": state,
        "registered_at_ms": registered,
        "last_heartbeat_ms": registered if state == "Registering" else now_ms - round(seen.pulse.silent_for * 1000),
        "version": status.agent.version or None,
        "online": state == "Online",
        "pool_status": pools,
    }


def pool_snapshots(node: GPUNode) -> list[dict[str, Any]]:
    """The node's pools, its replicas of each summed. A pool that it registered with and has no replica of is not ready."""
    found = {pool: _unready(pool, node.metadata.name) for pool in declared_pools(node)}
    leaving: dict[str, list[bool]] = defaultdict(list)
    for report in node.status.replicas.values():
        pool = found.setdefault(report.pool, _unready(report.pool, node.metadata.name))
        leaving[report.pool].append(report.state is ReplicaState.DRAINING)
        if report.state is ReplicaState.READY:
            pool["ready"] = True
            pool["slots_free"] += report.slots_free
            pool["slots_total"] += report.slots_total
    free = sum(device.vram_free_mib for device in node.status.devices.values()) * MIB
    ending = node.spec.drain is not None or node.status.agent.state is not AgentState.RUNNING
    for name, pool in found.items():
        pool["draining"] = ending or (bool(leaving[name]) and all(leaving[name]))
        pool["vram_free_bytes"] = free
    return [found[name] for name in sorted(found)]


def _unready(pool: str, node: str) -> dict[str, Any]:
    return {"pool_id": pool, "node_id": node, "ready": False, "draining": False, "slots_free": 0, "slots_total": 0}


def availability(nodes: Iterable[Seen], pools: Mapping[PoolKey, GPUPool]) -> dict[str, Any]:
    """Which node holds which model, and what of it serves. A model's id is its source, without it its pool's name."""
    sources = {key.name: pool.spec.model.source for key, pool in pools.items() if pool.spec.model.source != HANDOFF_SOURCE}
    listed: dict[str, dict[str, Any]] = {}
    holders: dict[str, set[str]] = defaultdict(set)
    capacity: dict[str, int] = defaultdict(int)
    for seen in nodes:
        node = seen.node
        online = wire_status(node, seen.pulse) == "Online"
        own = {model.source for model in node.status.models.values() if model.source}
        served = []
        for pool in pool_snapshots(node):
            name = pool["pool_id"]
            running = any(report.pool == name for report in node.status.replicas.values())
            models = [sources.get(name, name)] if running else []
            served.append({"pool_id": name, "ready": pool["ready"], "models": models})
            own.update(models)
            if online and pool["ready"]:
                capacity[sources.get(name, name)] += pool["slots_total"]
        listed[node.metadata.name] = {
            "node_id": node.metadata.name,
            "address": seen.base_url or node.status.agent.address,
            "online": online,
            "models": sorted(own),
            "pools": served,
        }
        if online:
            for model in own:
                holders[model].add(node.metadata.name)
    online_nodes = sum(entry["online"] for entry in listed.values())
    return {
        "nodes": listed,
        "total_models": len(holders),
        "replicated_models": sorted(model for model, held in holders.items() if len(held) == online_nodes > 1),
        "single_node_models": sorted(model for model, held in holders.items() if len(held) == 1),
        "models": [
            {"model_id": model, "nodes": sorted(held), "total_nodes": len(held), "total_capacity": capacity[model]}
            for model, held in sorted(holders.items())
        ],
    }
