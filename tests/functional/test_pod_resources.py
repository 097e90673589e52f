"""GPUs of other pods, told by a kubelet that speaks gRPC over its socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.kubelet import kubelet, pod
from llorch_agent.core.readings import DeviceReading
from llorch_agent.pod_resources import PodResources, WithHolders
from llorch_agent.pod_resources_relay import serve

pytestmark = pytest.mark.functional


class TwoGpus:
    """A machine's GPUs without a machine."""

    async def read(self) -> list[DeviceReading]:
        return [DeviceReading(uuid="GPU-0", minor=0), DeviceReading(uuid="GPU-1", index=1, minor=1)]

    def listen(self, wake: Callable[[], None]) -> None:
        assert wake

    async def close(self) -> None:
        return


def source(socket: Path, *, expected: bool = True) -> WithHolders:
    return WithHolders(TwoGpus(), PodResources(socket, expected=expected), "llorch/agent-x")


async def holders(devices: WithHolders) -> list[str]:
    return [each.held_by for each in await devices.read()]


async def test_a_gpu_is_held_from_the_pods_start_to_its_end(tmp_path: Path):
    async with kubelet(tmp_path / "k.sock") as node:
        devices = source(tmp_path / "k.sock")
        node.pods = [pod("agent-x", {"nvidia.com/gpu": ["GPU-0", "GPU-1"]}, namespace="llorch")]
        assert await holders(devices) == ["", ""]
        node.pods.append(pod("trainer-0", claims=[("gpu.nvidia.com", "gpu-1")]))
        assert await holders(devices) == ["", "ml/trainer-0"]
        node.pods.pop()
        assert await holders(devices) == ["", ""]
        await devices.close()


async def test_a_kubelet_that_refuses_or_is_away_changes_nothing_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    socket = tmp_path / "k.sock"
    async with kubelet(socket) as node:
        devices = source(socket)
        node.pods = [pod("trainer-0", {"nvidia.com/gpu": ["GPU-1"]})]
        assert await holders(devices) == ["", "ml/trainer-0"]
        node.refuses = True
        for _ in range(3):
            assert await holders(devices) == ["", "ml/trainer-0"]
    assert await holders(devices) == ["", "ml/trainer-0"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "RESOURCE_EXHAUSTED: rejected by rate limit" in warnings[0]
    await devices.close()


async def test_a_kubelet_that_starts_again_is_found_again(tmp_path: Path):
    socket = tmp_path / "k.sock"
    devices = source(socket)
    async with kubelet(socket) as node:
        node.pods = [pod("a", {"nvidia.com/gpu": ["GPU-0"]})]
        assert await holders(devices) == ["ml/a", ""]
    await holders(devices)
    async with kubelet(socket) as node:
        node.pods = [pod("b", {"nvidia.com/gpu": ["GPU-1"]})]
        async with asyncio.timeout(8):
            while True:
                if await holders(devices) == ["", "ml/b"]:
                    break
                await asyncio.sleep(0.1)
    await devices.close()


async def test_without_a_kubelet_home_is_silent_and_the_cluster_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for expected, told in ((False, 0), (True, 1)):
        caplog.clear()
        devices = source(tmp_path / "none.sock", expected=expected)
        assert [await holders(devices) for _ in range(3)] == [["", ""]] * 3
        assert len(caplog.records) == told
        await devices.close()


async def test_the_relay_passes_the_kubelets_answers_on_and_outlives_the_kubelet(tmp_path: Path):
    relayed, stop = tmp_path / "relayed.sock", asyncio.Event()
    relaying = asyncio.create_task(serve(tmp_path / "k.sock", relayed, stop))
    devices = source(relayed)
    async with kubelet(tmp_path / "k.sock") as node, asyncio.timeout(10):
        node.pods = [pod(f"p{number}", {"nvidia.com/gpu": [f"GPU-{number % 2}"]}) for number in range(2_000)]
        while True:
            if relayed.exists():
                break
            await asyncio.sleep(0.01)
        assert await holders(devices) == ["ml/p0", "ml/p1"]
    async with kubelet(tmp_path / "k.sock") as node, asyncio.timeout(10):
        node.pods = [pod("b", {"nvidia.com/gpu": ["GPU-1"]})]
        while True:
            if await holders(devices) == ["", "ml/b"]:
                break
            await asyncio.sleep(0.1)
    await devices.close()
    stop.set()
    async with asyncio.timeout(5):
        await relaying
    assert not relayed.exists()
