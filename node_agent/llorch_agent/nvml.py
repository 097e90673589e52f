"""GPUs through NVML, NVIDIA's management library. Read only: nothing is ever set on a device.

Every NVML call may block for as long as the driver likes, and most may be missing or refused on some machine. So all of them
run on one thread with a time-out, each is allowed to fail alone, and a GPU that stops answering is Unhealthy, not a crash.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import pynvml

from llorch_api import DeviceHealth

from . import nvml_calls as calls
from .core.readings import DeviceReading
from .core.xid import is_failure
from .one_thread import OneThread

log = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 5.0
"""For one reading of all devices; a sane driver needs milliseconds, a GPU on its way to being lost may take seconds."""
EVENT_WAIT_MS: Final = 250
_LOST = "the GPU is lost: it fell off the bus or needs a reset"
_SILENT = "the driver does not answer"
_GONE = "the driver does not list it any more"


@dataclass(frozen=True, slots=True)
class _Identity:
    """What does not change while the driver runs, so that a lost GPU keeps its name."""

    uuid: str
    index: int
    name: str
    compute_capability: str
    pci_bus_id: str
    minor: int


class NvmlSource:
    """The GPUs of this machine. No driver, or no GPU: an empty list, and the driver is looked for again at every reading."""

    def __init__(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._thread = OneThread("nvml")
        self._timeout_s = timeout_s
        self._initialised = False
        self._known: dict[str, DeviceReading] = {}
        self._by_index: dict[int, _Identity] = {}
        self._failed: dict[str, str] = {}
        self._readable: dict[str, bool] = {}
        """GPUs that answered this time; True where they are divided."""
        self._events: _XidWatch | None = None
        self._said = ""
        self._wake: Callable[[], None] = _nothing

    def listen(self, wake: Callable[[], None]) -> None:
        """Calls `wake` from the event thread when an XID condemns a GPU."""
        self._wake = wake

    async def read(self) -> list[DeviceReading]:
        """All GPUs, those that were seen before and do not answer now as Unhealthy."""
        try:
            return await self._thread.call(self._read, self._timeout_s)
        except TimeoutError:
            self._say(f"NVML: {_SILENT} within {self._timeout_s:g} s")
            return self._all_unhealthy(_SILENT)

    async def close(self) -> None:
        """Lets go of the driver. A call that hangs is left behind on its daemon thread."""
        try:
            await self._thread.call(self._shut_down, 2.0)
        except TimeoutError:
            log.warning("NVML: %s; leaving it", _SILENT)
        self._thread.close()

    def _all_unhealthy(self, reason: str) -> list[DeviceReading]:
        return [_unhealthy(reading, reason) for reading in self._known.values()]

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            if text:
                log.warning("%s", text)

    def _read(self) -> list[DeviceReading]:
        try:
            self._initialise()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            # No library and no driver is a machine without GPUs; anything else is worth a line.
            absent = isinstance(error, (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded))
            if not absent or self._known:
                self._say(f"NVML: {error}")
            self._shut_down()
            return self._all_unhealthy(str(error))
        self._readable.clear()
        readings = [reading for index in range(count) for reading in self._read_gpu(index)]
        self._say("")
        found = {reading.uuid for reading in readings}
        readings += [
            _unhealthy(known, _GONE) for known in self._known.values() if known.uuid not in found and self._missed(known)
        ]
        readings = [self._judge(reading) for reading in readings]
        self._known = {reading.uuid: reading for reading in readings}
        return readings

    def _initialise(self) -> None:
        if self._initialised:
            return
        pynvml.nvmlInit()
        self._initialised = True
        self._by_index.clear()
        self._failed.clear()  # a driver that was loaded anew has reset its devices
        self._events = _XidWatch(self._failed, lambda: self._wake())
        driver = calls.attempt(pynvml.nvmlSystemGetDriverVersion, "unknown")
        log.info("NVML: driver %s, %d devices", driver, calls.attempt(pynvml.nvmlDeviceGetCount, 0))

    def _shut_down(self) -> None:
        if self._events is not None:
            self._events.stop()
            self._events = None
        if self._initialised:
            self._initialised = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.debug("NVML: shutdown: %s", error)

    def _read_gpu(self, index: int) -> list[DeviceReading]:
        """The GPU, or its MIG instances in its place where it is divided: then nothing runs on the whole of it."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            identity = self._identify(index, handle)
            instances = calls.instances(handle)
            watched = self._events is not None and self._events.watch(identity.uuid, handle)
            fault = calls.memory_fault(handle)
            if instances is None:
                readings = [self._read_device(identity, handle)]
            else:
                readings = [self._read_instance(identity, each) for each in instances]
        except pynvml.NVMLError as error:
            return self._unreadable(index, error)
        self._readable[identity.uuid] = instances is not None
        health = DeviceHealth.HEALTHY if watched else DeviceHealth.UNMONITORED
        if fault:
            health = DeviceHealth.UNHEALTHY
        return [replace(reading, health=health, reason=fault) for reading in readings]

    def _read_device(self, identity: _Identity, handle: Any) -> DeviceReading:
        total, free, used = calls.memory(handle)
        return replace(
            _nameplate(identity),
            total=total,
            free=free,
            used=used,
            processes=calls.processes(handle),
            load=calls.load(handle),
        )

    def _read_instance(self, identity: _Identity, handle: Any) -> DeviceReading:
        name = calls.text(calls.attempt(lambda: pynvml.nvmlDeviceGetName(handle), f"{identity.name} MIG"))
        uuid = calls.text(pynvml.nvmlDeviceGetUUID(handle))
        return replace(self._read_device(identity, handle), uuid=uuid, name=name, parent=identity.uuid)

    def _missed(self, known: DeviceReading) -> bool:
        """True for a device that should be there. Whoever divides a GPU, or takes an instance away, means it."""
        if known.parent:
            return known.parent not in self._readable
        return not self._readable.get(known.uuid, False)

    def _identify(self, index: int, handle: Any) -> _Identity:
        uuid = calls.text(pynvml.nvmlDeviceGetUUID(handle))
        known = self._by_index.get(index)
        if known is None or known.uuid != uuid:
            capability = calls.attempt(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle), None)
            known = self._by_index[index] = _Identity(
                uuid=uuid,
                index=index,
                name=calls.text(calls.attempt(lambda: pynvml.nvmlDeviceGetName(handle), "NVIDIA GPU")),
                compute_capability=f"{capability[0]}.{capability[1]}" if capability else "",
                pci_bus_id=calls.text(calls.attempt(lambda: pynvml.nvmlDeviceGetPciInfo(handle).busId, "")),
                minor=calls.attempt(lambda: pynvml.nvmlDeviceGetMinorNumber(handle), -1),
            )
        return known

    def _unreadable(self, index: int, error: pynvml.NVMLError) -> list[DeviceReading]:
        identity = self._by_index.get(index)
        reason = _LOST if isinstance(error, pynvml.NVMLError_GpuIsLost) else str(error)
        if identity is None:
            # Lost before it was ever seen: it has no UUID that anybody could use.
            self._say(f"NVML: GPU {index}: {reason}")
            return []
        known = [each for each in self._known.values() if identity.uuid in (each.uuid, each.parent)]
        return [_unhealthy(each, reason) for each in known or [_nameplate(identity)]]

    def _judge(self, reading: DeviceReading) -> DeviceReading:
        reason = self._failed.get(reading.parent or reading.uuid, "")
        before = self._known.get(reading.uuid)
        if reason and reading.health is not DeviceHealth.UNHEALTHY:
            reading = replace(reading, health=DeviceHealth.UNHEALTHY, reason=reason)
        if before is not None and before.health is not reading.health:
            level = logging.ERROR if reading.health is DeviceHealth.UNHEALTHY else logging.INFO
            log.log(level, "GPU %s (%s) is %s %s", reading.uuid, reading.name, reading.health.value, reading.reason)
        return reading


class _XidWatch:
    """Waits for the driver's XID events on a thread of its own, and notes the GPUs that they condemn.

    A condemned GPU stays so until the driver is loaded anew: these errors need a reset, and nothing announces one.
    """

    def __init__(self, failed: dict[str, str], condemned: Callable[[], None]) -> None:
        self._failed = failed
        self._condemned = condemned
        self._set: Any = None
        self._watched: dict[str, bool] = {}
        self._names: dict[int, str] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._set = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError as error:
            log.info("NVML: no events (%s); devices are Unmonitored", error)

    def watch(self, uuid: str, handle: Any) -> bool:
        """True when XIDs of this device are watched. Tried once per device."""
        if uuid not in self._watched:
            self._watched[uuid] = self._set is not None and self._register(uuid, handle)
        return self._watched[uuid]

    def _register(self, uuid: str, handle: Any) -> bool:
        wanted = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError
        try:
            mask = pynvml.nvmlDeviceGetSupportedEventTypes(handle) & wanted
            if not mask & pynvml.nvmlEventTypeXidCriticalError:
                return False
            pynvml.nvmlDeviceRegisterEvents(handle, mask, self._set)
        except pynvml.NVMLError as error:
            log.info("NVML: no XID events of %s (%s)", uuid, error)
            return False
        self._names[calls.address(handle)] = uuid
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nvml-xid", daemon=True)
            self._thread.start()
        return True

    def _run(self) -> None:
        said = ""
        while not self._stopping.is_set():
            try:
                self._note(pynvml.nvmlEventSetWait(self._set, EVENT_WAIT_MS))
            except pynvml.NVMLError_Timeout:
                continue
            except pynvml.NVMLError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("NVML: waiting for XID events: %s", said)
                # GPU_IS_LOST comes back at once for as long as it is lost; the next reading tells which one it is.
                self._stopping.wait(5.0)
        try:
            pynvml.nvmlEventSetFree(self._set)
        except pynvml.NVMLError as error:
            log.debug("NVML: freeing the event set: %s", error)

    def _note(self, event: Any) -> None:
        uuid = self._names.get(calls.address(event.device), "")
        if event.eventType == pynvml.nvmlEventTypeDoubleBitEccError:
            reason = "uncorrectable ECC error"
        else:
            reason = f"XID {event.eventData}"
            if not is_failure(event.eventData):
                log.info("GPU %s: %s, an application's error", uuid or "unknown", reason)
                return
        # An event without a device concerns them all.
        for each in [uuid] if uuid else list(self._watched):
            self._failed.setdefault(each, reason)
        self._condemned()

    def stop(self) -> None:
        """Ends the thread within `EVENT_WAIT_MS`; it frees the event set itself."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * EVENT_WAIT_MS / 1000)


def _nothing() -> None:
    """Nobody listens."""


def _nameplate(identity: _Identity) -> DeviceReading:
    return DeviceReading(
        uuid=identity.uuid,
        index=identity.index,
        name=identity.name,
        compute_capability=identity.compute_capability,
        pci_bus_id=identity.pci_bus_id,
        minor=identity.minor,
    )


def _unhealthy(reading: DeviceReading, reason: str) -> DeviceReading:
    return replace(reading, free=0, used=0, health=DeviceHealth.UNHEALTHY, reason=reason, processes=(), load=None)
