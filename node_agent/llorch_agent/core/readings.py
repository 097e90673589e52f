"""What the agent reads of its machine, as plain values. All sizes in MiB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llorch_api import DeviceHealth

CPU_UUID = "cpu"
"""The uuid of the one device that a machine without a GPU driver has: its own memory."""


class ProcessMemory(NamedTuple):
    """Device memory of one process, as the driver says. Without the host's PID namespace the pids match nothing here."""

    pid: int
    mib: int


class DeviceLoad(NamedTuple):
    """What changes all the time: for metrics, never for the resource. None where the device does not say."""

    utilization_percent: int | None
    temperature_celsius: int | None
    power_milliwatts: int | None


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device at one moment."""

    uuid: str
    kind: Literal["gpu", "cpu"] = "gpu"
    index: int = 0
    """In the driver's order."""
    name: str = ""
    total: int = 0
    free: int = 0
    used: int = 0
    """By processes; what the driver keeps for itself is neither used nor free."""
    compute_capability: str = ""
    pci_bus_id: str = ""
    health: DeviceHealth = DeviceHealth.UNMONITORED
    reason: str = ""
    """Why it is Unhealthy."""
    parent: str = ""
    """UUID of the GPU that a MIG instance is a part of; empty for a whole one."""
    minor: int = -1
    """The N of /dev/nvidiaN, by which dynamic resource allocation names GPUs; a MIG instance has its GPU's. -1: not known."""
    held_by: str = ""
    """The other pod that holds it, as NAMESPACE/NAME."""
    processes: tuple[ProcessMemory, ...] = ()
    load: DeviceLoad | None = None


@dataclass(frozen=True, slots=True)
class SystemReading:
    """The machine around the devices, as far as the agent may use it."""

    cpu_cores: int = 0
    memory_total: int = 0
    memory_free: int = 0
    disk_free: int = 0
    """Where models are kept."""
