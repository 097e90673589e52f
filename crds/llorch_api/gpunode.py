"""GPUNode: a machine with devices and one agent. Cluster-scoped, named as its node."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from .meta import ATOMIC, CONDITION_LIST, ApiModel, Bounded64, Bounded256, Condition, Mebibytes, Name, Resource, Timestamp
from .shape import ModelShape

MAX_DEVICES = 64
"""Eight GPUs of seven MIG instances each, and room."""
MAX_ASSIGNED_DEVICES = 16
MAX_REPLICAS = 64
MAX_MODELS = 32
MAX_MEASURED = 32

Slots = Annotated[int, Field(ge=0, le=4096)]


class Desired(StrEnum):
    """What the operator wants of a replica."""

    RUN = "Run"
    DRAIN = "Drain"
    STOP = "Stop"


class DrainSpec(ApiModel):
    """Set it to empty the node: its replicas are placed elsewhere, then drained here."""

    deadline_seconds: Annotated[
        int, Field(ge=0, le=86_400, description="Seconds a request in flight may still take before its engine is stopped.")
    ] = 120


class AssignedModel(ApiModel):
    """What the agent fetches and loads."""

    source: Annotated[Bounded256, Field(description="Where the GGUF is: file:, https:, hf: or s3:.")]
    sha256: Annotated[str, Field(max_length=64, description="Expected sha256 of the file; empty where nobody stated one.")] = ""
    digest: Annotated[str, Field(max_length=80, description="Identity of the content, as the operator resolved it.")] = ""
    size_mib: Annotated[Mebibytes, Field(description="Size of the file, MiB.")] = 0
    aliases: Annotated[list[Bounded64], Field(max_length=16, description="Other names that the gateway serves it under.")] = []
    shape: Annotated[ModelShape, Field(description="Header facts from which the memory need follows.")] = ModelShape()


class AssignedDevice(ApiModel):
    """One device's share of a replica."""

    vram_mib: Annotated[Mebibytes, Field(description="MiB reserved on this device.")]


class Assignment(ApiModel):
    """The operator's assignment of one replica to this node."""

    desired: Annotated[Desired, Field(description="Run; Drain: no new requests; Stop: end the engine.")] = Desired.RUN
    pool: Annotated[Name, Field(description="Name of the GPUPool.")]
    namespace: Annotated[Name, Field(description="Namespace of the GPUPool.")]
    revision: Annotated[Bounded64, Field(description="Hash of what the replica runs; another hash is another replica.")]
    model: Annotated[AssignedModel, Field(description="The model to load.")]
    devices: Annotated[
        dict[str, AssignedDevice],
        Field(max_length=MAX_ASSIGNED_DEVICES, description="Devices by UUID and what is reserved on each."),
    ]
    slots: Annotated[int, Field(ge=1, le=256, description="Concurrent sequences of the engine.")]
    context_tokens: Annotated[int, Field(ge=1, le=1 << 22, description="Context of each slot, tokens.")]
    engine_args: Annotated[
        list[Bounded256], Field(max_length=80, description="Further llama-server arguments, already allow-listed.")
    ] = []
    drain_deadline_seconds: Annotated[
        int, Field(ge=0, le=86_400, description="Seconds a request in flight may take once the replica drains.")
    ] = 120


class GPUNodeSpec(ApiModel):
    """What users and the operator want of the node."""

    unschedulable: Annotated[bool, Field(description="True keeps new replicas away; running ones stay.")] = False
    drain: Annotated[DrainSpec | None, Field(description="Set to move this node's replicas elsewhere.")] = None
    replicas: Annotated[
        dict[str, Assignment],
        Field(
            max_length=MAX_REPLICAS, description="Assignments by replica id, written by the operator.", json_schema_extra=ATOMIC
        ),
    ] = {}


class AgentState(StrEnum):
    """The agent's own word on itself."""

    RUNNING = "Running"
    DRAINING = "Draining"
    STOPPED = "Stopped"


class AgentStatus(ApiModel):
    """Who reports."""

    version: Annotated[Bounded64, Field(description="Version of the agent.")] = ""
    boot_id: Annotated[Bounded64, Field(description="Changes with every start of the agent.")] = ""
    address: Annotated[
        Bounded256, Field(description="Base URL of the agent. Routing takes its port only; the host comes from the Pod or Node.")
    ] = ""
    machine_id: Annotated[Bounded256, Field(description="The physical machine; several nodes may share one.")] = ""
    state: Annotated[AgentState, Field(description="Running, Draining, or Stopped after a graceful end.")] = AgentState.RUNNING
    started_at: Annotated[Timestamp, Field(description="When this agent started, by its clock.")] = ""


class Heartbeat(ApiModel):
    """The liveness token: any change of it is a beat."""

    sequence: Annotated[int, Field(ge=0, description="Counts the agent's beats since its start.")] = 0
    time: Annotated[Timestamp, Field(description="The agent's clock, for display only.")] = ""
    interval_seconds: Annotated[int, Field(ge=1, le=3600, description="Seconds between beats that the agent aims at.")] = 10
    mode: Annotated[
        Literal["status", "lease"],
        Field(description="status: each beat is a write of this status. lease: each renews a Lease of the node's name instead."),
    ] = "status"


class NodeFacts(ApiModel):
    """Copied from the Kubernetes Node by its agent; at home from the settings."""

    labels: Annotated[
        dict[str, Bounded64], Field(max_length=64, description="Labels that nodeSelector matches.", json_schema_extra=ATOMIC)
    ] = {}
    zone: Annotated[Bounded64, Field(description="topology.kubernetes.io/zone.")] = ""
    unschedulable: Annotated[bool, Field(description="True while the Node is cordoned.")] = False


class DeviceHealth(StrEnum):
    """Unmonitored: the driver reports no events, which is not the same as healthy."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"
    UNMONITORED = "Unmonitored"


class Device(ApiModel):
    """One GPU, one MIG instance of a GPU that is divided, or the machine's CPU and memory where it has none."""

    kind: Annotated[Literal["gpu", "cpu"], Field(description="gpu, or cpu for the machine's own memory.")] = "gpu"
    index: Annotated[int, Field(ge=0, le=255, description="Index in the driver's order.")] = 0
    name: Annotated[Bounded64, Field(description="Product name.")] = ""
    vram_total_mib: Annotated[Mebibytes, Field(description="Memory of the device, MiB.")] = 0
    vram_free_mib: Annotated[Mebibytes, Field(description="Free now, as the driver says, MiB.")] = 0
    foreign_mib: Annotated[Mebibytes, Field(description="Used by what is not llorch's, MiB.")] = 0
    compute_capability: Annotated[str, Field(max_length=16, description="CUDA compute capability, for example 8.9.")] = ""
    pci_bus_id: Annotated[str, Field(max_length=32, description="PCI bus id.")] = ""
    health: Annotated[DeviceHealth, Field(description="Healthy, Unhealthy, or Unmonitored.")] = DeviceHealth.UNMONITORED
    message: Annotated[str, Field(max_length=128, description="Why it is Unhealthy.")] = ""
    held_by: Annotated[
        Bounded256, Field(description="The other pod that holds it, as NAMESPACE/NAME: nothing is placed on it.")
    ] = ""


class NodeSystem(ApiModel):
    """The machine around the devices."""

    cpu_cores: Annotated[int, Field(ge=0, le=65_536, description="Cores the agent may use.")] = 0
    memory_total_mib: Annotated[Mebibytes, Field(description="Host memory, MiB.")] = 0
    memory_free_mib: Annotated[Mebibytes, Field(description="Host memory available, MiB.")] = 0
    disk_free_mib: Annotated[Mebibytes, Field(description="Free where models are kept, MiB.")] = 0


class ReplicaState(StrEnum):
    """Life of an engine, in its usual order. Failed is left only by another replica."""

    PENDING = "Pending"
    FETCHING = "Fetching"
    LOADING = "Loading"
    READY = "Ready"
    DRAINING = "Draining"
    STOPPED = "Stopped"
    FAILED = "Failed"


class ReplicaOrigin(StrEnum):
    """Assigned by the operator, or brought by a handoff file: launched from a model, or adopted while running."""

    ASSIGNED = "assigned"
    LAUNCHED = "launched"
    ADOPTED = "adopted"


class ReplicaStatus(ApiModel):
    """One engine of this node."""

    origin: Annotated[
        ReplicaOrigin, Field(description="assigned by the operator; launched or adopted through a handoff file.")
    ] = ReplicaOrigin.ASSIGNED
    pool: Annotated[Bounded64, Field(description="Its pool.")] = ""
    state: Annotated[ReplicaState, Field(description="Pending, Fetching, Loading, Ready, Draining, Stopped or Failed.")] = (
        ReplicaState.PENDING
    )
    slots_total: Annotated[Slots, Field(description="Concurrent sequences of the engine.")] = 0
    slots_free: Annotated[Slots, Field(description="Slots without a lease at the last beat.")] = 0
    revision: Annotated[Bounded64, Field(description="What it runs.")] = ""
    progress_percent: Annotated[int, Field(ge=0, le=100, description="Of the download while Fetching.")] = 0
    message: Annotated[Bounded256, Field(description="Why it is not Ready, or how it failed.")] = ""
    restarts: Annotated[int, Field(ge=0, description="Times the engine was started again.")] = 0
    vram_mib: Annotated[Mebibytes, Field(description="Memory it uses as measured, MiB.")] = 0
    reserved_mib: Annotated[Mebibytes, Field(description="MiB it was promised and the driver does not show as used yet.")] = 0


class CachedModel(ApiModel):
    """A model file on this node."""

    source: Annotated[Bounded256, Field(description="Where it came from.")] = ""
    size_mib: Annotated[Mebibytes, Field(description="Its size, MiB.")] = 0


class NodeSummary(ApiModel):
    """Strings for `kubectl get`, which has no arithmetic."""

    gpus: Annotated[Bounded64, Field(description="Number of GPUs, or cpu.")] = ""
    vram: Annotated[Bounded64, Field(description="Free/total VRAM of healthy devices, GiB.")] = ""
    slots: Annotated[Bounded64, Field(description="Free/total slots of ready replicas.")] = ""
    pools: Annotated[Bounded256, Field(description="Pools with a replica here.")] = ""


class NodePhase(StrEnum):
    """Derived by the operator; the first that holds, in the order Lost, Offline, Draining, Suspect, Registering, Online."""

    REGISTERING = "Registering"
    ONLINE = "Online"
    SUSPECT = "Suspect"
    DRAINING = "Draining"
    OFFLINE = "Offline"
    LOST = "Lost"


class GPUNodeStatus(ApiModel):
    """The agent writes all but phase, conditions and observedGeneration, which are the operator's."""

    agent: Annotated[AgentStatus, Field(description="The agent that reports.", json_schema_extra=ATOMIC)] = AgentStatus()
    heartbeat: Annotated[Heartbeat, Field(description="The liveness token.", json_schema_extra=ATOMIC)] = Heartbeat()
    node: Annotated[NodeFacts, Field(description="Labels, zone and cordon of the Node.", json_schema_extra=ATOMIC)] = NodeFacts()
    devices: Annotated[
        dict[str, Device], Field(max_length=MAX_DEVICES, description="Devices by UUID.", json_schema_extra=ATOMIC)
    ] = {}
    system: Annotated[NodeSystem, Field(description="Cores, memory and disk.", json_schema_extra=ATOMIC)] = NodeSystem()
    replicas: Annotated[
        dict[str, ReplicaStatus], Field(max_length=MAX_REPLICAS, description="Engines by replica id.", json_schema_extra=ATOMIC)
    ] = {}
    models: Annotated[
        dict[str, CachedModel],
        Field(max_length=MAX_MODELS, description="Model files by digest, newest 32.", json_schema_extra=ATOMIC),
    ] = {}
    measured: Annotated[
        dict[str, Mebibytes],
        Field(
            max_length=MAX_MEASURED,
            description="MiB that engines were seen to take on GPUs, by a hash of model, settings and number of devices.",
            json_schema_extra=ATOMIC,
        ),
    ] = {}
    summary: Annotated[NodeSummary, Field(description="Display strings of the columns.", json_schema_extra=ATOMIC)] = (
        NodeSummary()
    )
    phase: Annotated[
        NodePhase | None, Field(description="Registering, Online, Suspect, Draining, Offline or Lost; derived by the operator.")
    ] = None
    conditions: Annotated[
        list[Condition],
        Field(max_length=8, description="Ready, DevicesHealthy, MemoryExplained, Schedulable.", json_schema_extra=CONDITION_LIST),
    ] = []
    observed_generation: Annotated[int, Field(ge=0, description="Generation of spec that the operator has acted on.")] = 0


AGENT_STATUS_FIELDS: tuple[str, ...] = (
    "agent",
    "heartbeat",
    "node",
    "devices",
    "system",
    "replicas",
    "models",
    "measured",
    "summary",
)
"""JSON names of the status fields that the agent owns."""


class GPUNode(Resource):
    """A machine with devices and one llorch agent on it."""

    KIND: ClassVar[str] = "GPUNode"
    PLURAL: ClassVar[str] = "gpunodes"
    NAMESPACED: ClassVar[bool] = False
    CRD: ClassVar[dict[str, Any]] = {
        "singular": "gpunode",
        "shortNames": ["lgn"],
        "columns": [
            ("Phase", "string", ".status.phase", 0, "Lost, Offline, Draining, Suspect, Registering or Online."),
            ("GPUs", "string", ".status.summary.gpus", 0, "Number of GPUs, or cpu."),
            ("VRAM Free/Total", "string", ".status.summary.vram", 0, "Free and total VRAM."),
            ("Slots Free/Total", "string", ".status.summary.slots", 0, "Free and total slots of ready replicas."),
            ("Pools", "string", ".status.summary.pools", 0, "Pools with a replica here."),
            ("Heartbeat", "date", ".status.heartbeat.time", 0, "Age of the last beat, by the agent's clock."),
            ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason', 1, "Why Ready is what it is."),
            ("Address", "string", ".status.agent.address", 1, "Base URL of the agent."),
            ("Agent", "string", ".status.agent.version", 1, "Version of the agent."),
            ("Machine", "string", ".status.agent.machineId", 1, "The physical machine."),
            ("Age", "date", ".metadata.creationTimestamp", 0, "Age of the object."),
        ],
    }

    kind: str = "GPUNode"
    spec: Annotated[GPUNodeSpec, Field(description="What users and the operator want of the node.")] = GPUNodeSpec()
    status: Annotated[GPUNodeStatus, Field(description="What the agent sees and the operator concludes.")] = GPUNodeStatus()
