"""The agent's part of a GPUNode's status, composed of what it reads. All sizes in MiB."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llorch_api import (
    AgentStatus,
    CachedModel,
    Device,
    DeviceHealth,
    GPUNodeStatus,
    NodeFacts,
    NodeSummary,
    NodeSystem,
    ReplicaOrigin,
    ReplicaState,
    ReplicaStatus,
)
from llorch_api.gpunode import MAX_DEVICES, MAX_MEASURED, MAX_MODELS, MAX_REPLICAS

from .readings import DeviceReading, SystemReading

VRAM_STEP = 64
"""Free memory is told in steps: a beat whose figures did not move is a smaller write, and nothing is placed by less."""
DISK_STEP = 1024
_NO_ENGINE = (ReplicaState.STOPPED, ReplicaState.FAILED)


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """One replica as the agent's table has it."""

    id: str
    pool: str
    origin: ReplicaOrigin
    state: ReplicaState
    slots_total: int = 0
    slots_free: int = 0
    revision: str = ""
    progress_percent: int = 0
    message: str = ""
    restarts: int = 0
    promised: Mapping[str, int] = field(default_factory=dict)
    """MiB by device uuid."""
    measured: Mapping[str, int] = field(default_factory=dict)
    """MiB by device uuid."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file on this node."""

    digest: str
    source: str
    size_mib: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a snapshot is made of, read at one moment."""

    agent: AgentStatus
    node: NodeFacts = field(default_factory=NodeFacts)
    devices: Sequence[DeviceReading] = ()
    foreign: Mapping[str, int] = field(default_factory=dict)
    system: SystemReading = field(default_factory=SystemReading)
    replicas: Sequence[ReplicaFacts] = ()
    models: Sequence[ModelFile] = ()
    """Newest first."""
    measured: Mapping[str, int] = field(default_factory=dict)
    """MiB that engines were seen to take, by measurement key; oldest first."""


def clip(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, with an ellipsis where it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def down(mib: int, step: int = VRAM_STEP) -> int:
    """`mib` rounded down to a step: nothing is promised that is not there."""
    return max(0, mib) // step * step


def compose(facts: Facts) -> dict[str, Any]:
    """The JSON of all fields of `llorch_api.AGENT_STATUS_FIELDS` but the heartbeat, which the write itself adds.

    A replica's `reservedMiB` comes out of the same readings as its devices' `vramFreeMiB`: whoever reads one reads both, and
    memory is neither counted twice nor forgotten while an engine loads.
    """
    devices = sorted(facts.devices, key=lambda device: (device.index, device.uuid))[:MAX_DEVICES]
    replicas = _most_telling(facts.replicas)
    status = GPUNodeStatus(
        agent=facts.agent,
        node=facts.node,
        devices={device.uuid: _device(device, facts.foreign.get(device.uuid, 0)) for device in devices},
        system=NodeSystem(
            cpu_cores=facts.system.cpu_cores,
            memory_total_mib=facts.system.memory_total,
            memory_free_mib=down(facts.system.memory_free),
            disk_free_mib=down(facts.system.disk_free, DISK_STEP),
        ),
        replicas={replica.id: _replica(replica) for replica in replicas},
        models={m.digest: CachedModel(source=clip(m.source, 256), size_mib=m.size_mib) for m in facts.models[:MAX_MODELS]},
        measured=dict(list(facts.measured.items())[-MAX_MEASURED:]),
        summary=_summary(devices, facts.replicas),
    )
    return status.to_json()


def _most_telling(replicas: Sequence[ReplicaFacts]) -> list[ReplicaFacts]:
    """The API takes 64: assigned ones first, for the operator waits for them."""
    ranked = sorted(replicas, key=lambda replica: (replica.origin is not ReplicaOrigin.ASSIGNED, replica.id))
    return sorted(ranked[:MAX_REPLICAS], key=lambda replica: replica.id)


def _device(device: DeviceReading, foreign: int) -> Device:
    fields: dict[str, Any] = {
        "kind": device.kind,
        "index": device.index,
        "name": clip(device.name, 64),
        "vram_total_mib": device.total,
        "vram_free_mib": down(min(device.free, device.total)),
        "foreign_mib": down(foreign),
        "health": device.health,
    }
    if device.compute_capability:
        fields["compute_capability"] = device.compute_capability
    if device.pci_bus_id:
        fields["pci_bus_id"] = device.pci_bus_id
    if device.health is DeviceHealth.UNHEALTHY and device.reason:
        fields["message"] = clip(device.reason, 128)
    if device.held_by:
        fields["held_by"] = clip(device.held_by, 256)
    return Device(**fields)


def _replica(replica: ReplicaFacts) -> ReplicaStatus:
    fields: dict[str, Any] = {
        "origin": replica.origin,
        "pool": clip(replica.pool, 64),
        "state": replica.state,
        "slots_total": replica.slots_total,
        "slots_free": replica.slots_free,
        "vram_mib": sum(down(mib) for mib in replica.measured.values()),
        "reserved_mib": reserved(replica),
    }
    if replica.revision:
        fields["revision"] = replica.revision
    if replica.state is ReplicaState.FETCHING:
        fields["progress_percent"] = replica.progress_percent
    if replica.message:
        fields["message"] = clip(replica.message, 256)
    if replica.restarts:
        fields["restarts"] = replica.restarts
    return ReplicaStatus(**fields)


def reserved(replica: ReplicaFacts) -> int:
    """What was promised to it and is not in use yet, summed over its devices; nothing once there is no engine to come."""
    if replica.state in _NO_ENGINE:
        return 0
    return sum(max(0, mib - down(replica.measured.get(uuid, 0))) for uuid, mib in replica.promised.items())


def _summary(devices: Sequence[DeviceReading], replicas: Iterable[ReplicaFacts]) -> NodeSummary:
    if not devices:
        return NodeSummary(gpus="", vram="", slots=_slots(replicas), pools=_pools(replicas))
    gpus = [device for device in devices if device.kind == "gpu"]
    usable = [device for device in devices if device.health is not DeviceHealth.UNHEALTHY and not device.held_by]
    free, total = sum(down(min(d.free, d.total)) for d in usable), sum(device.total for device in usable)
    vram = f"{free / 1024:.1f}/{total / 1024:.1f}Gi"
    return NodeSummary(gpus=str(len(gpus)) if gpus else "cpu", vram=vram, slots=_slots(replicas), pools=_pools(replicas))


def _slots(replicas: Iterable[ReplicaFacts]) -> str:
    ready = [replica for replica in replicas if replica.state is ReplicaState.READY]
    return f"{sum(replica.slots_free for replica in ready)}/{sum(replica.slots_total for replica in ready)}"


def _pools(replicas: Iterable[ReplicaFacts]) -> str:
    return clip(",".join(sorted({replica.pool for replica in replicas if replica.state not in _NO_ENGINE})), 256)
