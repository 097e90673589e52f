"""The node API's wire formats, and how they map to a GPUNode and back. Sizes are bytes on the wire and MiB in the resource."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llorch_api import AgentState, GPUNode, GPUNodeStatus, ReplicaOrigin, ReplicaState
from llorch_api.gpunode import AGENT_STATUS_FIELDS, MAX_DEVICES, MAX_MODELS, MAX_REPLICAS

TRANSPORT_LABEL = "llorch.dev/transport"
"""`http` on GPUNodes that came through the node API. Agents in the cluster may not set it: what such a node claims counts."""
POOLS_ANNOTATION = "llorch.dev/pools"
"""The pools that the agent registered with, separated by commas."""
MIB = 1 << 20
_NODE_ID = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._]{0,252})|[0-9A-Fa-f:.]{2,45}")

Id = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.]*$")]
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Count = Annotated[int, Field(ge=0, le=4096)]


class Wire(BaseModel):
    """A body. Unknown fields are ignored: newer agents say more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Gpu(Wire):
    """One GPU as an agent registers it."""

    device_id: int = Field(ge=0, le=255)
    name: str = Field(max_length=256)
    vram_total_bytes: Bytes
    compute_capability: str = Field("", max_length=16)


class Capabilities(Wire):
    """What the machine has."""

    gpus: list[Gpu] = Field(max_length=MAX_DEVICES)
    cpu_cores: int | None = Field(None, ge=0, le=65_536)
    ram_total_bytes: Bytes | None = None


class Registration(Wire):
    """Body of POST /v2/nodes/register."""

    node_id: str
    machine_id: str = Field("", max_length=256)
    address: str = Field(max_length=256)
    """http://host:port; without a scheme http is meant."""
    pools: list[Id] = Field(max_length=MAX_REPLICAS)
    capabilities: Capabilities
    version: str | None = Field(None, max_length=64)

    @field_validator("node_id")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not is_node_id(value):
            raise ValueError("must be lower-case letters, digits, '-' and '.', at most 253")
        return value

    @field_validator("address")
    @classmethod
    def _a_base_url(cls, value: str) -> str:
        url = value if "://" in value else f"http://{value}"
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            raise ValueError("must be http://host:port") from None
        plain = not (parts.username or parts.password or parts.query or parts.fragment) and parts.path in ("", "/")
        if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or not plain:
            raise ValueError("must be http://host:port")
        return url.rstrip("/")


class PoolBeat(Wire):
    """One pool of a heartbeat."""

    pool_id: Id
    ready: bool
    draining: bool = False
    slots_free: Count = 0
    slots_total: Count = 0
    vram_free_bytes: Bytes = 0
    engine: str | None = Field(None, max_length=64)
    models_available: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=MAX_MODELS)


class Beat(Wire):
    """Body of POST /v2/nodes/{id}/heartbeat. `status`, where an agent sends it, is the agent's whole part of GPUNode.status."""

    timestamp: str = Field("", max_length=64)
    """The agent's clock, which nothing is decided by."""
    pools: list[PoolBeat] = Field(max_length=MAX_REPLICAS)
    node_id: str | None = None
    status: dict[str, Any] | None = None


def is_node_id(text: str) -> bool:
    """Whether a GPUNode can have this name."""
    return _NODE_ID.fullmatch(text) is not None


def came_by_http(node: GPUNode) -> bool:
    """Whether the node registered through the node API. One that has an owner belongs to a Kubernetes Node in any case."""
    return node.metadata.labels.get(TRANSPORT_LABEL) == "http" and not node.metadata.owner_references


def declared_pools(node: GPUNode) -> list[str]:
    """The pools that the node registered with."""
    return [pool for pool in node.metadata.annotations.get(POOLS_ANNOTATION, "").split(",") if pool]


def agent_part(status: GPUNodeStatus) -> dict[str, Any]:
    """The JSON of the agent's fields of `status`."""
    return {name: value for name, value in status.to_json().items() if name in AGENT_STATUS_FIELDS}


def registered(known: GPUNodeStatus, registration: Registration) -> dict[str, Any]:
    """The agent's fields after a registration. What a known node reported stays, its liveness token too: a registration is
    no heartbeat, and one that comes again takes nothing out of routing."""
    status = agent_part(known)
    agent = {"address": registration.address, "machineId": registration.machine_id or registration.node_id}
    status["agent"] = {**status.get("agent", {}), **agent, "version": registration.version or ""}
    reported = any(not uuid.startswith("gpu-") for uuid in known.devices)
    if not reported:
        free = {uuid: device.vram_free_mib for uuid, device in known.devices.items()}
        status["devices"] = {
            f"gpu-{gpu.device_id}": {
                "kind": "gpu",
                "index": gpu.device_id,
                "name": gpu.name[:64],
                "vramTotalMiB": gpu.vram_total_bytes // MIB,
                "vramFreeMiB": free.get(f"gpu-{gpu.device_id}", 0),
                "computeCapability": gpu.compute_capability,
            }
            for gpu in registration.capabilities.gpus
        }
    system = dict(status.get("system", {}))
    if registration.capabilities.cpu_cores is not None:
        system["cpuCores"] = registration.capabilities.cpu_cores
    if registration.capabilities.ram_total_bytes is not None:
        system["memoryTotalMiB"] = registration.capabilities.ram_total_bytes // MIB
    return {**status, "system": system}


def beaten(known: GPUNodeStatus, beat: Beat, *, now: str, interval: int, new_boot_id: str) -> dict[str, Any]:
    """The agent's fields after a heartbeat. `now` is the time of its receipt, `interval` (seconds) and `new_boot_id` stand in
    for an agent that says neither. Raises ValueError (pydantic's too) for a status that cannot be read or holds no beat."""
    if beat.status is not None:
        return _from_status(known, beat.status)
    agent = known.agent
    draining = bool(beat.pools) and all(pool.draining for pool in beat.pools)
    status = {
        "agent": {
            **agent.to_json(),
            "bootId": agent.boot_id or new_boot_id,
            "state": (AgentState.DRAINING if draining else AgentState.RUNNING).value,
        },
        "heartbeat": {"sequence": known.heartbeat.sequence + 1, "time": now, "intervalSeconds": interval},
        # Such an agent reads no spec: it is given no replicas.
        "node": {"unschedulable": True},
        "devices": _devices(known, beat),
        "system": known.system.to_json(),
        "replicas": {pool.pool_id: _replica(pool) for pool in beat.pools},
        "models": _models(beat),
    }
    free = sum(pool.slots_free for pool in beat.pools if pool.ready)
    total = sum(max(pool.slots_total, pool.slots_free) for pool in beat.pools if pool.ready)
    names = ",".join(sorted({pool.pool_id for pool in beat.pools}))
    return {**status, "summary": {"gpus": str(len(known.devices)), "slots": f"{free}/{total}", "pools": names[:256]}}


def _from_status(known: GPUNodeStatus, sent: Mapping[str, Any]) -> dict[str, Any]:
    told = GPUNodeStatus.model_validate({name: sent[name] for name in AGENT_STATUS_FIELDS if name in sent})
    if not told.agent.boot_id or not told.heartbeat.sequence:
        raise ValueError("status needs agent.bootId and heartbeat.sequence")
    status = told.to_json()
    if known.agent.address:  # where it is reached is settled by its registration
        status["agent"]["address"] = known.agent.address
    return status


def _devices(known: GPUNodeStatus, beat: Beat) -> dict[str, Any]:
    """The registered devices. The wire has free memory per pool and not per device, so it counts where there is one device."""
    devices = {uuid: device.to_json() for uuid, device in known.devices.items()}
    free = max((pool.vram_free_bytes for pool in beat.pools), default=0) // MIB
    if len(devices) == 1:
        for device in devices.values():
            device["vramFreeMiB"] = min(free, device.get("vramTotalMiB", 0))
    return devices


def _replica(pool: PoolBeat) -> dict[str, Any]:
    state = ReplicaState.DRAINING if pool.draining else ReplicaState.READY if pool.ready else ReplicaState.PENDING
    return {
        "origin": ReplicaOrigin.ADOPTED.value,
        "pool": pool.pool_id,
        "state": state.value,
        "slotsTotal": max(pool.slots_total, pool.slots_free),
        "slotsFree": pool.slots_free,
        **({} if pool.ready or pool.draining else {"message": "its agent says that it is not ready"}),
    }


def _models(beat: Beat) -> dict[str, Any]:
    names = sorted({name for pool in beat.pools for name in pool.models_available})[:MAX_MODELS]
    return {f"name:{hashlib.sha256(name.encode()).hexdigest()[:32]}": {"source": name} for name in names}


def milliseconds(timestamp: str) -> int:
    """Milliseconds since the epoch of an RFC 3339 time; 0 where there is none."""
    try:
        return round(datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp() * 1000)
    except ValueError:
        return 0
