"""Asks the kubelet which pods hold which GPUs, over its PodResources socket."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from .core.pod_devices import PodDevices, held, parse
from .core.readings import DeviceReading
from .devices import DeviceSource

log = logging.getLogger(__name__)

KUBELET_SOCKET: Final = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
METHOD: Final = "/v1.PodResourcesLister/List"
TIMEOUT_S: Final = 3.0
MAX_ANSWER_BYTES: Final = 16 << 20
"""The kubelet's own clients take as much."""


class PodResources:
    """The kubelet's list of pods and their GPUs. Never raises: what it said last counts until it says something else."""

    def __init__(self, socket: Path, *, expected: bool) -> None:
        """`expected`: the socket should be there, and one warning says when it is not."""
        self._socket = socket
        self._expected = expected
        self._channel: Any = None
        self._known: Sequence[PodDevices] = ()
        self._said = ""

    async def read(self) -> Sequence[PodDevices]:
        """The pods that hold GPUs now; none where there is no kubelet."""
        if not os.path.exists(self._socket):  # also False where its directory may not be looked into: Path.exists() raises then
            if self._expected:
                self._say(f"{self._socket} is not there, or not for this user: GPUs of other pods are told by their memory alone")
            return self._known
        import grpc  # 15 MiB that a machine without a kubelet does not need

        try:
            if self._channel is None:
                options = [("grpc.max_receive_message_length", MAX_ANSWER_BYTES), ("grpc.enable_http_proxy", 0)]
                self._channel = grpc.aio.insecure_channel(f"unix://{self._socket.absolute()}", options=options)
            answer: bytes = await self._channel.unary_unary(METHOD)(b"", timeout=TIMEOUT_S)
            self._known = parse(answer)
        except grpc.aio.AioRpcError as error:
            self._say(f"{self._socket}: {error.code().name}: {error.details()}")
        except ValueError as error:
            self._say(f"{self._socket}: {error}")
        else:
            self._said = ""
        return self._known

    async def close(self) -> None:
        """Closes the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.warning("PodResources: %s", text)


class WithHolders:
    """A source of devices, each with the other pod that holds it."""

    def __init__(self, source: DeviceSource, pods: PodResources, own_pod: str) -> None:
        """`own_pod` is NAMESPACE/NAME of the pod that this agent runs in; empty outside a cluster."""
        self._source = source
        self._pods = pods
        self._own = own_pod
        self._before: dict[str, str] = {}

    async def read(self) -> list[DeviceReading]:
        """All devices now."""
        readings = await self._source.read()
        if any(reading.kind == "gpu" for reading in readings):
            readings = held(readings, await self._pods.read(), self._own)
        holders = {reading.uuid: reading.held_by for reading in readings if reading.held_by}
        if holders != self._before:
            self._before = holders
            text = ", ".join(f"{uuid} by {pod}" for uuid, pod in sorted(holders.items()))
            log.info("devices held by other pods: %s", text or "none any more")
        return readings

    def listen(self, wake: Callable[[], None]) -> None:
        """Listens to the source."""
        self._source.listen(wake)

    async def close(self) -> None:
        """Closes both."""
        await self._pods.close()
        await self._source.close()
