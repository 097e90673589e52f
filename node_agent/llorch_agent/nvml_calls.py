"""Single NVML calls, each of which may be missing or refused on some device, driver or user. Call them on NVML's thread."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import pynvml

from .core.readings import DeviceLoad, ProcessMemory

log = logging.getLogger(__name__)

T = TypeVar("T")

_MIB: Final = 1 << 20

MISSING = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NotFound,
)
"""A call that this device, driver or user does not have: the value stays empty."""


def attempt(call: Callable[[], T], otherwise: T) -> T:
    """What `call` says, or `otherwise`."""
    try:
        return call()
    except pynvml.NVMLError as error:
        if not isinstance(error, MISSING):
            log.debug("NVML: %s", error)
        return otherwise


def memory(handle: Any) -> tuple[int, int, int]:
    """(total, free, used) in MiB. Version 2 tells the driver's own share apart from what programs use."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except MISSING:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return info.total // _MIB, info.free // _MIB, -(-info.used // _MIB)


def processes(handle: Any) -> tuple[ProcessMemory, ...]:
    """Programs that compute on it."""
    listed: list[Any] = attempt(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle), [])
    return tuple(ProcessMemory(each.pid, each.usedGpuMemory // _MIB) for each in listed if each.usedGpuMemory is not None)


def load(handle: Any) -> DeviceLoad:
    """How busy and how hot it is."""
    return DeviceLoad(
        utilization_percent=attempt(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu, None),
        temperature_celsius=attempt(lambda: pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU), None),
        power_milliwatts=attempt(lambda: pynvml.nvmlDeviceGetPowerUsage(handle), None),
    )


def memory_fault(handle: Any) -> str:
    """Why the GPU's memory cannot be trusted; empty where it can, or where the GPU does not say (no ECC).

    Errors are counted since the driver was loaded: a reset clears them. A pending remap means that a bad row is still in use.
    """
    uncorrected = attempt(
        lambda: pynvml.nvmlDeviceGetTotalEccErrors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC),
        0,
    )
    remapped = attempt(lambda: pynvml.nvmlDeviceGetRemappedRows(handle), None)
    faults = []
    if uncorrected:
        faults.append(f"{uncorrected} uncorrectable ECC error{'s' if uncorrected > 1 else ''}")
    if remapped is not None and remapped[3]:
        faults.append("row remapping failed")
    elif remapped is not None and remapped[2]:
        faults.append("a row remap is pending")
    return f"{', '.join(faults)}: the GPU needs a reset" if faults else ""


def instances(handle: Any) -> list[Any] | None:
    """Handles of the GPU's MIG instances; None where it is not divided."""
    mode = attempt(lambda: pynvml.nvmlDeviceGetMigMode(handle), None)
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return None
    most = attempt(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0)
    # Instances keep their number when others are removed: the list has holes, each of which answers NOT_FOUND.
    found = (attempt(partial(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number), None) for number in range(most))
    return [each for each in found if each is not None]


def address(handle: Any) -> int:
    """What tells two handles apart."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def text(value: str | bytes) -> str:
    """Older bindings answer with bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
