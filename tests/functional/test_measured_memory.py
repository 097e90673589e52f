"""What engines were seen to take outlives the agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llorch_agent.core.readings import DeviceReading, ProcessMemory
from llorch_agent.devices import Devices
from llorch_agent.measured import FILE, Measurements
from llorch_agent.replicas import Replica, Replicas
from llorch_api import DeviceHealth, ReplicaOrigin, ReplicaState

pytestmark = pytest.mark.functional

PID = 4_194_304
"""Of no process: one more than Linux gives."""


class OneGpu:
    """A GPU whose only process is the engine."""

    def __init__(self) -> None:
        self.used = 0
        self.health = DeviceHealth.HEALTHY

    async def read(self) -> list[DeviceReading]:
        processes = (ProcessMemory(PID, self.used),) if self.used else ()
        free = 24_000 - self.used
        reading = DeviceReading(uuid="GPU-0", total=24_000, free=free, used=self.used, health=self.health, processes=processes)
        return [reading]

    def listen(self, wake: Callable[[], None]) -> None:
        assert wake

    async def close(self) -> None:
        return


def an_engine(replicas: Replicas) -> Replica:
    replica = Replica("chat-a", "chat", ReplicaOrigin.ASSIGNED, devices={"GPU-0": 6_000}, pid=PID, memory_key="k1")
    replicas.put(replica)
    return replica


async def test_the_most_that_a_ready_engine_took_is_kept_and_read_again(tmp_path: Path):
    memory, replicas, gpu = Measurements(tmp_path), Replicas(), OneGpu()
    replica = an_engine(replicas)
    devices = Devices(gpu, replicas, changed=lambda: None, memory=memory)

    gpu.used = 9_000
    replicas.move(replica, ReplicaState.LOADING, 0.0)
    await devices.read()
    assert memory.known == {}, "an engine that still loads may take more than it keeps"

    replicas.move(replica, ReplicaState.READY, 0.0)
    gpu.used = 6_401
    await devices.read()
    assert memory.known == {"k1": 6_464}
    gpu.used = 6_300
    await devices.read()
    assert memory.known == {"k1": 6_464}
    gpu.used = 7_000
    await devices.read()
    assert Measurements(tmp_path).known == {"k1": 7_040}


async def test_a_gpu_that_does_not_answer_measures_nothing(tmp_path: Path):
    memory, replicas, gpu = Measurements(tmp_path), Replicas(), OneGpu()
    replicas.move(an_engine(replicas), ReplicaState.READY, 0.0)
    gpu.used, gpu.health = 7_000, DeviceHealth.UNHEALTHY
    await Devices(gpu, replicas, changed=lambda: None, memory=memory).read()
    assert memory.known == {}
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"mib": 3}', b'{"mib": {"a": "x"}}', b"\xff"])
async def test_a_broken_file_costs_what_it_remembered_and_nothing_else(tmp_path: Path, content: bytes):
    (tmp_path / FILE).write_bytes(content)
    memory = Measurements(tmp_path)
    assert memory.known == {}
    assert await memory.note({"k": 100})
    assert Measurements(tmp_path).known == {"k": 128}


async def test_a_directory_that_cannot_be_written_is_no_failure(tmp_path: Path):
    (tmp_path / "file").write_text("")
    memory = Measurements(tmp_path / "file")
    assert await memory.note({"k": 100})
    assert memory.known == {"k": 128}
