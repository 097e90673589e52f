"""What placement sees: nodes, their devices and replicas, and pools, as plain frozen values. All sizes in MiB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llorch_api import Desired, ModelShape, PlacementSpec, ReplicaState

from .liveness import Liveness


class PoolKey(NamedTuple):
    """Names a pool."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device, with what live readings and reservations leave of it."""

    uuid: str
    kind: str
    name: str
    total: int
    free: int
    """As the driver says now."""
    foreign: int
    healthy: bool
    compute_capability: tuple[int, int] = (0, 0)
    held_by: str = ""
    """The other pod that holds it, as NAMESPACE/NAME; nothing is placed on it then."""

    @property
    def usable(self) -> bool:
        """True where a replica may go."""
        return self.healthy and not self.held_by

    @property
    def splits(self) -> bool:
        """False for a MIG instance: CUDA shows a process one of them at most."""
        return not self.uuid.startswith("MIG-")


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica: the operator's assignment joined with the agent's report."""

    id: str
    pool: PoolKey
    node: str
    revision: str
    desired: Desired
    devices: dict[str, int]
    """MiB assigned per device."""
    slots: int
    state: ReplicaState | None = None
    """None until the agent has reported it."""
    reserved: int = 0
    """MiB of the assignment that the driver does not show as used yet; the whole of it until the agent reports."""
    slots_free: int = 0
    message: str = ""
    late: bool = False
    """Past its load deadline without being Ready."""

    @property
    def broken(self) -> bool:
        """To be replaced by another one."""
        return self.late or self.state is ReplicaState.FAILED

    @property
    def ready(self) -> bool:
        """Serving, by its agent's word."""
        return self.state is ReplicaState.READY


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node."""

    name: str
    liveness: Liveness
    placeable: bool
    """Fresh for long enough, not cordoned, not draining."""
    why_not: str = ""
    """Why it is not placeable, for people."""
    leaving: bool = False
    """Being drained: its replicas are wanted elsewhere."""
    labels: dict[str, str] = field(default_factory=dict)
    devices: tuple[DeviceView, ...] = ()
    replicas: tuple[ReplicaView, ...] = ()
    models: frozenset[str] = frozenset()
    """Digests of the model files it holds."""
    disk_free: int = 0

    @property
    def slots_in_use(self) -> int:
        """Requests that its replicas are answering."""
        return sum(max(0, replica.slots - replica.slots_free) for replica in self.replicas if replica.ready)


@dataclass(frozen=True, slots=True)
class PoolView:
    """One pool, its model resolved."""

    key: PoolKey
    order: str
    """Creation time and name: older pools are served first."""
    revision: str
    replicas: int
    slots: int
    context_tokens: int
    kv_cache_type: str
    engine_args: tuple[str, ...]
    placement: PlacementSpec
    shape: ModelShape
    digest: str
    model_size: int
    must_fetch: bool
    """True where the model comes over the network and takes disk; False for file: sources."""
    present_on: frozenset[str] | None = None
    """Nodes that hold a file: source; None where any node can reach the model."""
    missing_because: str = ""
    """What a node outside `present_on` is told."""
    source: str = ""
    """Where its replicas fetch it: at the commit that it was resolved to, where there are commits. Empty: as the user wrote."""
    stated_mib: int = 0
    """The user's own figure for a replica, engine.vramMiB; 0 where there is none."""
    fitted_mib: int = 0
    """What llama-fit-params says of a model whose header does not decide; 0 where nobody asked it."""
    measured: Mapping[str, int] = field(default_factory=dict)
    """MiB that engines were seen to take, by measurement key, over the whole fleet."""
    unfit: frozenset[str] = frozenset()
    """Nodes where this revision failed within the last minutes."""
