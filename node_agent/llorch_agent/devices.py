"""The devices of this machine: its GPUs, or its own memory as one `cpu` device."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from llorch_api import DeviceHealth, ReplicaState

from .core.readings import CPU_UUID, DeviceReading
from .core.vram import Attribution, Shares, Tenant
from .measured import Measurements
from .replicas import Replicas
from .system import KERNEL, Roots, process_memory, read_memory

__all__ = ["CpuSource", "DeviceReading", "DeviceSource", "Devices", "FirstOf"]

log = logging.getLogger(__name__)

_MIB = 1 << 20


class DeviceSource(Protocol):
    """Reads devices. Never raises for a device that fails: it says so in the reading."""

    async def read(self) -> list[DeviceReading]:
        """All devices now."""
        ...

    def listen(self, wake: Callable[[], None]) -> None:
        """Calls `wake`, from any thread, when something happened to a device that another reading would show."""
        ...

    async def close(self) -> None:
        """Lets go of what reading took."""
        ...


class CpuSource:
    """The machine's memory as one device, for machines without a GPU driver."""

    def __init__(self, roots: Roots = KERNEL) -> None:
        self._roots = roots

    async def read(self) -> list[DeviceReading]:
        """One device. Its memory ends at the cgroup's limit, where there is one."""
        memory = read_memory(self._roots)
        return [
            DeviceReading(
                uuid=CPU_UUID,
                kind="cpu",
                name=_cpu_name(self._roots),
                total=memory.total // _MIB,
                free=memory.free // _MIB,
                used=(memory.total - memory.free) // _MIB,
                health=DeviceHealth.HEALTHY,
            )
        ]

    def listen(self, wake: Callable[[], None]) -> None:
        """Nothing happens to memory."""

    async def close(self) -> None:
        """Nothing is held."""


class FirstOf:
    """The first source that has any device. A GPU driver that is loaded later takes the CPU's place at the next reading."""

    def __init__(self, *sources: DeviceSource) -> None:
        self._sources = sources

    async def read(self) -> list[DeviceReading]:
        """The devices of the first source that has some."""
        for source in self._sources:
            if found := await source.read():
                return found
        return []

    def listen(self, wake: Callable[[], None]) -> None:
        """Listens to all of them."""
        for source in self._sources:
            source.listen(wake)

    async def close(self) -> None:
        """Closes all of them."""
        for source in self._sources:
            await source.close()


class Devices:
    """The newest readings, shared out between this node's replicas and everybody else."""

    def __init__(
        self, source: DeviceSource, replicas: Replicas, *, changed: Callable[[], None], memory: Measurements | None = None
    ) -> None:
        """`memory` is told what ready engines take."""
        self._memory = memory
        self._source = source
        self._replicas = replicas
        self._changed = changed
        self._attribution = Attribution()
        self._lock = asyncio.Lock()
        self.readings: Sequence[DeviceReading] = ()
        self.shares = Shares({}, {})

    @property
    def measured(self) -> Mapping[str, Mapping[str, int]]:
        """MiB in use by replica and device uuid."""
        return self.shares.used

    async def read(self) -> None:
        """Reads them now, and notes on each replica what it uses."""
        async with self._lock:
            self.readings = await self._source.read()
            self.shares = self._attribution.split(self.readings, [self._tenant(replica_id) for replica_id in self._ids()])
            for replica in self._replicas:
                replica.vram_mib = sum(self.shares.used.get(replica.id, {}).values())
            if self._memory is not None:
                await self._memory.note(self._taken())
        self._changed()

    async def run(self, interval_s: float) -> None:
        """Reads them every `interval_s`, and at once when the source has heard of something, for ever."""
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        self._source.listen(lambda: _from_thread(loop, heard.set))
        while True:
            await self.read()
            try:
                async with asyncio.timeout(interval_s):
                    await heard.wait()
            except TimeoutError:
                continue
            heard.clear()

    async def close(self) -> None:
        """Lets go of the driver."""
        await self._source.close()

    def _taken(self) -> dict[str, int]:
        """MiB by measurement key of the engines that are ready and whose devices all answer."""
        well = {each.uuid for each in self.readings if each.health is not DeviceHealth.UNHEALTHY}
        taken: dict[str, int] = {}
        for replica in self._replicas:
            if replica.memory_key and replica.state is ReplicaState.READY and replica.devices.keys() <= well and replica.vram_mib:
                taken[replica.memory_key] = max(replica.vram_mib, taken.get(replica.memory_key, 0))
        return taken

    def _ids(self) -> list[str]:
        return [replica.id for replica in self._replicas if replica.pid or replica.devices]

    def _tenant(self, replica_id: str) -> Tenant:
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.pid:
            return Tenant(replica_id, {})
        measured: dict[str, int] = {}
        for device in self.readings:
            if device.kind == "cpu":
                mib = process_memory(replica.pid)
            else:
                mib = sum(each.mib for each in device.processes if replica.pid in (each.pid, _group(each.pid)))
            if mib:
                measured[device.uuid] = mib
        return Tenant(replica_id, replica.devices, measured)


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # the loop has closed: nobody is left to hear it
        return


def _group(pid: int) -> int:
    """The process group of `pid`: every engine leads its own. 0 where there is no such process in this PID namespace."""
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return 0


def _cpu_name(roots: Roots) -> str:
    try:
        for line in (roots.proc / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        log.debug("no /proc/cpuinfo")
    return platform.machine() or "cpu"
