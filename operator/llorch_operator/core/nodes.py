"""From a GPUNode to what placement sees of it, and to the operator's part of its status."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llorch_api import (
    AgentState,
    Condition,
    ConditionStatus,
    Desired,
    DeviceHealth,
    GPUNode,
    NodePhase,
    ReplicaOrigin,
    ReplicaState,
)

from .conditions import condition
from .liveness import Liveness
from .views import DeviceView, NodeView, PoolKey, ReplicaView

_PHASE = {Liveness.LOST: NodePhase.LOST, Liveness.OFFLINE: NodePhase.OFFLINE, Liveness.SUSPECT: NodePhase.SUSPECT}


UNMANAGED_MIB = 512
"""Memory in use on a GPU that nobody accounts for is told of from here on; drivers and displays take less."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the liveness tracker says of a node."""

    liveness: Liveness
    placeable: bool
    silent_for: float


def token_of(node: GPUNode, renewed: str = "") -> str:
    """The liveness token; empty until the agent has beaten once.

    `renewed` is the time of its Lease as the API server holds it. It counts in lease mode only, and beside the status: either is
    a sign of life, so a change of mode loses none.
    """
    beat, agent = node.status.heartbeat, node.status.agent
    if not agent.boot_id:
        return ""
    return f"{agent.boot_id}:{beat.sequence}:{renewed}" if beat.mode == "lease" else f"{agent.boot_id}:{beat.sequence}"


def recorded(node: GPUNode) -> Liveness:
    """The liveness that the node's status names."""
    return {NodePhase.OFFLINE: Liveness.OFFLINE, NodePhase.LOST: Liveness.LOST}.get(
        node.status.phase or NodePhase.ONLINE, Liveness.FRESH
    )


def phase_of(node: GPUNode, pulse: Pulse) -> NodePhase:
    """The first that holds of Lost, Offline, Draining, Suspect, Registering, Online."""
    if pulse.liveness >= Liveness.OFFLINE:
        return _PHASE[pulse.liveness]
    if node.spec.drain is not None or node.status.agent.state is AgentState.DRAINING:
        return NodePhase.DRAINING
    if pulse.liveness is Liveness.SUSPECT:
        return NodePhase.SUSPECT
    return NodePhase.ONLINE if token_of(node) else NodePhase.REGISTERING


def _why_not(node: GPUNode, phase: NodePhase) -> str:
    if phase is not NodePhase.ONLINE:
        return f"{phase.value}"
    if node.spec.unschedulable:
        return "cordoned (spec.unschedulable)"
    if node.status.node.unschedulable:
        return "cordoned by its node (status.node.unschedulable)"
    return ""


def view_of(node: GPUNode, pulse: Pulse, *, late: Collection[str]) -> NodeView:
    """The node as placement sees it. `late` names replicas past their load deadline."""
    phase = phase_of(node, pulse)
    why_not = _why_not(node, phase) or ("" if pulse.placeable else "back from Lost, waiting for its second heartbeat")
    return NodeView(
        name=node.metadata.name,
        liveness=pulse.liveness,
        placeable=not why_not,
        why_not=why_not,
        leaving=node.spec.drain is not None,
        labels=node.status.node.labels,
        devices=tuple(_device(uuid, node) for uuid in sorted(node.status.devices)),
        replicas=tuple(_replica(replica_id, node, late) for replica_id in sorted(node.spec.replicas)),
        models=frozenset(node.status.models),
        disk_free=node.status.system.disk_free_mib,
    )


def _device(uuid: str, node: GPUNode) -> DeviceView:
    device = node.status.devices[uuid]
    major, _, minor = device.compute_capability.partition(".")
    capability = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    return DeviceView(
        uuid=uuid,
        kind=device.kind,
        name=device.name,
        total=device.vram_total_mib,
        free=device.vram_free_mib,
        foreign=device.foreign_mib,
        held_by=device.held_by,
        healthy=device.health is not DeviceHealth.UNHEALTHY,
        compute_capability=capability,
    )


def _replica(replica_id: str, node: GPUNode, late: Collection[str]) -> ReplicaView:
    wanted = node.spec.replicas[replica_id]
    devices = {uuid: device.vram_mib for uuid, device in wanted.devices.items()}
    report = node.status.replicas.get(replica_id)
    return ReplicaView(
        id=replica_id,
        pool=PoolKey(wanted.namespace, wanted.pool),
        node=node.metadata.name,
        revision=wanted.revision,
        desired=wanted.desired,
        devices=devices,
        slots=wanted.slots,
        state=report.state if report else None,
        reserved=report.reserved_mib if report else sum(devices.values()),
        slots_free=report.slots_free if report else wanted.slots,
        message=report.message if report else "",
        late=replica_id in late,
    )


def handoff_replicas(node: GPUNode) -> dict[str, str]:
    """Ids of the replicas that handoff files brought to the node, with the pool each names."""
    return {
        replica_id: report.pool
        for replica_id, report in sorted(node.status.replicas.items())
        if replica_id not in node.spec.replicas and report.origin is not ReplicaOrigin.ASSIGNED and report.pool
    }


def conditions_of(node: GPUNode, pulse: Pulse) -> list[Condition]:
    """Ready, DevicesHealthy, MemoryExplained and Schedulable; times are merged in by the caller."""
    generation, phase = node.metadata.generation, phase_of(node, pulse)
    if phase in (NodePhase.OFFLINE, NodePhase.LOST):
        if node.status.agent.state is AgentState.STOPPED:
            ready = condition("Ready", False, "AgentStopped", "the agent ended on request", generation)
        else:
            text = "no heartbeat within the time-out; its replicas " + (
                "are placed elsewhere" if phase is NodePhase.LOST else "get no requests"
            )
            ready = condition("Ready", None, "HeartbeatMissed", text, generation)
    elif phase is NodePhase.REGISTERING:
        ready = condition("Ready", False, "Registering", "no heartbeat yet", generation)
    else:
        ready = condition("Ready", True, "HeartbeatFresh", "the agent reports", generation)
    sick = [
        f"{uuid}: {device.message}" if device.message else uuid
        for uuid, device in sorted(node.status.devices.items())
        if device.health is DeviceHealth.UNHEALTHY
    ]
    if not node.status.devices:
        healthy = condition("DevicesHealthy", None, "NoDevices", "the agent has reported no device yet", generation)
    elif sick:
        healthy = condition("DevicesHealthy", False, "DeviceUnhealthy", "; ".join(sick), generation)
    else:
        healthy = condition("DevicesHealthy", True, "AllHealthy", f"{len(node.status.devices)} devices", generation)
    why_not = _why_not(node, phase)
    schedulable = condition("Schedulable", not why_not, "Schedulable" if not why_not else "NotSchedulable", why_not, generation)
    return [ready, healthy, _explained(node), schedulable]


def unmanaged(node: GPUNode) -> dict[str, int]:
    """MiB by device that neither llorch nor a known pod accounts for, where it is enough to matter."""
    return {
        uuid: device.foreign_mib
        for uuid, device in sorted(node.status.devices.items())
        if device.kind == "gpu" and not device.held_by and device.foreign_mib >= UNMANAGED_MIB
    }


def said_unmanaged(node: GPUNode) -> bool:
    """True when its conditions name unmanaged memory already."""
    return any(each.type == "MemoryExplained" and each.status is ConditionStatus.FALSE for each in node.status.conditions)


def _explained(node: GPUNode) -> Condition:
    """Names devices and no figures: those move with every beat."""
    generation, strangers = node.metadata.generation, unmanaged(node)
    if not strangers:
        return condition("MemoryExplained", True, "AllExplained", "", generation)
    text = f"no pod explains {UNMANAGED_MIB} MiB or more in use on {', '.join(strangers)}"
    return condition("MemoryExplained", False, "UnmanagedMemory", text, generation)


def is_serving(node: GPUNode, pulse: Pulse) -> bool:
    """True while the node's replicas may be in routing."""
    return pulse.liveness < Liveness.OFFLINE and node.status.agent.state is AgentState.RUNNING


def desired_of(node: GPUNode, replica_id: str) -> Desired:
    """What the operator wants of a replica; Run for those that handoff files brought."""
    wanted = node.spec.replicas.get(replica_id)
    return wanted.desired if wanted else Desired.RUN


def is_ready(node: GPUNode, replica_id: str) -> bool:
    """Ready, by its agent's word."""
    report = node.status.replicas.get(replica_id)
    return report is not None and report.state is ReplicaState.READY
