"""Which pod holds which device, as the kubelet says (PodResources API v1, List). Pure: bytes in, holders out.

The answer is a protobuf message of a few nested lists; the fields that matter are read straight from the wire, and fields that
are not known are skipped, as protobuf demands. https://github.com/kubernetes/kubelet/blob/master/pkg/apis/podresources/v1/api.proto
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from .readings import DeviceReading

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEVICE_PLUGIN: Final = re.compile(r"^nvidia\.com/(gpu|mig-.+|.+\.shared)$")
_DRA_DRIVER: Final = "gpu.nvidia.com"
_DRA_DEVICE: Final = re.compile(r"^gpu-(\d+)(?:-mig-.+)?$")


@dataclass(frozen=True, slots=True)
class PodDevices:
    """The GPUs of one pod."""

    pod: str
    """NAMESPACE/NAME."""
    uuids: frozenset[str] = frozenset()
    """As the device plugin names them: GPU-… or MIG-…"""
    minors: frozenset[int] = frozenset()
    """Whole GPUs, or instances of them, that a resource claim names by the N of /dev/nvidiaN."""


def parse(data: bytes) -> list[PodDevices]:
    """The pods of a ListPodResourcesResponse that hold GPUs. Raises ValueError where it is none."""
    pods = []
    for pod in _messages(data, 1):
        name, namespace = _string(pod, 1), _string(pod, 2)
        uuids: set[str] = set()
        minors: set[int] = set()
        for container in _messages(pod, 3):
            for devices in _messages(container, 2):
                if _DEVICE_PLUGIN.match(_string(devices, 1)):
                    # A GPU that is shared by time or by MPS has its copies numbered: GPU-…::3
                    uuids.update(_decoded(device).partition("::")[0] for device in _messages(devices, 2))
            for claim in (each for dynamic in _messages(container, 5) for each in _messages(dynamic, 4)):
                found = _DRA_DEVICE.match(_string(claim, 4))
                if _string(claim, 2) == _DRA_DRIVER and found:
                    minors.add(int(found[1]))
        if uuids or minors:
            pods.append(PodDevices(f"{namespace}/{name}", frozenset(uuids), frozenset(minors)))
    return pods


def held(readings: Iterable[DeviceReading], pods: Sequence[PodDevices], own: str) -> list[DeviceReading]:
    """`readings` with the pod that holds each device, but for `own`, the pod that this agent runs in (NAMESPACE/NAME).

    A claim names the GPU of an instance and not the instance itself: then all instances of that GPU count as held, which may
    leave memory idle and never shares it. What another pod holds is its own even where this pod holds it too.
    """
    others = sorted((pod for pod in pods if pod.pod != own), key=lambda pod: pod.pod)
    return [replace(each, held_by=next((pod.pod for pod in others if _holds(pod, each)), "")) for each in readings]


def _holds(pod: PodDevices, device: DeviceReading) -> bool:
    if device.kind != "gpu":
        return False
    return device.uuid in pod.uuids or (bool(device.parent) and device.parent in pod.uuids) or device.minor in pod.minors


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    return (value for field, value in _fields(data) if field == number)


def _string(data: bytes, number: int) -> str:
    """The last one counts, as protobuf says; empty where there is none."""
    found = ""
    for value in _messages(data, number):
        found = _decoded(value)
    return found


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every length-delimited field."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {kind}")
        end = position + size
        if end > len(data):
            raise ValueError("a protobuf message that is cut off")
        if kind == _BYTES:
            yield key >> 3, data[position:end]
        position = end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a protobuf number that is cut off")
