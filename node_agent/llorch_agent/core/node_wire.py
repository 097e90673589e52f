"""The bodies that an agent sends to the control plane's node API, made of its part of the GPUNode's status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llorch_api import AgentState, ReplicaState

MIB = 1 << 20
ENGINE = "llamacpp"

Status = Mapping[str, Any]
"""The agent's fields of GPUNode.status as JSON."""


def registration(node: str, status: Status, pools: Sequence[str]) -> dict[str, Any]:
    """Body of POST /v2/nodes/register. `pools` are those that the node expects handoff files of."""
    agent, system = status.get("agent", {}), status.get("system", {})
    gpus = [device for _, device in sorted(status.get("devices", {}).items()) if device.get("kind", "gpu") == "gpu"]
    return {
        "node_id": node,
        "machine_id": agent.get("machineId", node),
        "address": agent.get("address", ""),
        "pools": list(pools),
        "capabilities": {
            "gpus": [
                {
                    "device_id": device.get("index", 0),
                    "name": device.get("name", ""),
                    "vram_total_bytes": device.get("vramTotalMiB", 0) * MIB,
                    "compute_capability": device.get("computeCapability", ""),
                }
                for device in sorted(gpus, key=lambda device: int(device.get("index", 0)))
            ],
            "cpu_cores": system.get("cpuCores"),
            "ram_total_bytes": system["memoryTotalMiB"] * MIB if "memoryTotalMiB" in system else None,
        },
        "version": agent.get("version"),
    }


def heartbeat(node: str, status: Status, pools: Sequence[str]) -> dict[str, Any]:
    """Body of POST /v2/nodes/{id}/heartbeat: every pool with its replicas summed, expected ones without a replica as not ready,
    and the whole status."""
    free = sum(device.get("vramFreeMiB", 0) for device in status.get("devices", {}).values()) * MIB
    ending = status.get("agent", {}).get("state", AgentState.RUNNING) != AgentState.RUNNING
    reports: dict[str, list[Mapping[str, Any]]] = {pool: [] for pool in pools}
    for report in status.get("replicas", {}).values():
        reports.setdefault(report.get("pool", ""), []).append(report)
    return {
        "timestamp": status.get("heartbeat", {}).get("time", ""),
        "node_id": node,
        "pools": [_pool(pool, found, ending, free) for pool, found in sorted(reports.items()) if pool],
        "status": dict(status),
    }


def _pool(pool: str, reports: Sequence[Mapping[str, Any]], ending: bool, free: int) -> dict[str, Any]:
    ready = [report for report in reports if report.get("state") == ReplicaState.READY]
    draining = bool(reports) and all(report.get("state") == ReplicaState.DRAINING for report in reports)
    return {
        "pool_id": pool,
        "ready": bool(ready),
        "draining": ending or draining,
        "slots_free": sum(report.get("slotsFree", 0) for report in ready),
        "slots_total": sum(report.get("slotsTotal", 0) for report in ready),
        "vram_free_bytes": free,
        "engine": ENGINE if reports else None,
    }
