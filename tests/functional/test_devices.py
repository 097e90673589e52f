"""GPUs through nvidia-ml-py and a library that behaves as the driver's does, in a child process that loads it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fixtures.fake_nvml import FakeGpus

pytestmark = pytest.mark.functional

TWO = """\
gpus 2
0.name NVIDIA A100-SXM4-80GB
0.uuid GPU-5c89852c-0000-4000-8000-000000000000
0.total 85899345920
0.cc 80
1.name NVIDIA L4
1.uuid GPU-5c89852c-0000-4000-8000-000000000001
1.total 24152899584
"""
A100, L4 = (f"GPU-5c89852c-0000-4000-8000-00000000000{n}" for n in range(2))

CHILD = """
import asyncio, dataclasses, json, sys, time
from llorch_agent.devices import CpuSource, FirstOf
from llorch_agent.nvml import NvmlSource

async def main():
    source = FirstOf(NvmlSource(timeout_s=float(sys.argv[1])), CpuSource())
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        began = time.monotonic()
        if line.strip() == "close":
            await source.close()
            found = []
        else:
            found = await source.read()
        print(json.dumps({"devices": [dataclasses.asdict(each) for each in found], "took": time.monotonic() - began}), flush=True)

asyncio.run(main())
"""


class Reader:
    """A process that reads its devices when it is asked to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.took = 0.0

    async def ask(self, word: str = "read") -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n".encode())
        await self._process.stdin.drain()
        async with asyncio.timeout(15):
            answer = json.loads(await self._process.stdout.readline())
        self.took = answer["took"]
        return list(answer["devices"])

    async def until(self, key: str, value: object, uuid: str) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while True:
                found = {device["uuid"]: device for device in await self.ask()}
                if found.get(uuid, {}).get(key) == value:
                    return found[uuid]
                await asyncio.sleep(0.02)


@asynccontextmanager
async def reader(gpus: FakeGpus | None, timeout_s: float = 5.0) -> AsyncIterator[Reader]:
    environment = {**os.environ, **(gpus.environment if gpus else {})}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        str(timeout_s),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        yield Reader(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(5):
            assert await process.wait() == 0


@pytest.fixture
def gpus(tmp_path: Path) -> FakeGpus:
    return FakeGpus(tmp_path, TWO)


async def test_every_gpu_is_read_with_its_identity_and_free_memory(gpus: FakeGpus):
    gpus.put("0.used", 16 << 30)
    async with reader(gpus) as machine:
        a100, l4 = await machine.ask()
    assert (a100["uuid"], a100["name"], a100["compute_capability"]) == (A100, "NVIDIA A100-SXM4-80GB", "8.0")
    assert (a100["total"], a100["used"], a100["free"]) == (81_920, 16_384, 81_920 - 16_384 - 400)
    assert a100["pci_bus_id"] == "00000000:10:00.0"
    assert (l4["uuid"], l4["compute_capability"], l4["health"], l4["kind"]) == (L4, "8.9", "Healthy", "gpu")


async def test_a_machine_without_a_driver_has_one_cpu_device():
    async with reader(None) as machine:
        (device,) = await machine.ask()
    assert (device["uuid"], device["kind"], device["health"]) == ("cpu", "cpu", "Healthy")
    assert 0 < device["free"] <= device["total"]


async def test_a_driver_that_comes_later_is_found_and_one_that_goes_is_waited_for(gpus: FakeGpus):
    gpus.put("fail_init", 9)
    async with reader(gpus) as machine:
        assert [device["uuid"] for device in await machine.ask()] == ["cpu"]
        gpus.drop("fail_init")
        assert [device["uuid"] for device in await machine.ask()] == [A100, L4]
        gpus.add("fail nvmlDeviceGetCount_v2 9", "fail_init 9")
        gone = await machine.ask()
        assert [(device["uuid"], device["health"], device["free"]) for device in gone] == [
            (A100, "Unhealthy", 0),
            (L4, "Unhealthy", 0),
        ]
        gpus.set(TWO)
        assert [device["health"] for device in await machine.ask()] == ["Healthy", "Healthy"]


async def test_a_lost_gpu_is_unhealthy_and_the_others_go_on(gpus: FakeGpus):
    async with reader(gpus) as machine:
        await machine.ask()
        gpus.put("1.lost", 1)
        a100, l4 = await machine.ask()
        assert (a100["health"], l4["uuid"], l4["health"], l4["free"]) == ("Healthy", L4, "Unhealthy", 0)
        assert l4["total"] == 23_034, "it is the same device, and still counts as one"
        assert "lost" in l4["reason"]


async def test_a_gpu_that_is_not_listed_any_more_is_unhealthy(gpus: FakeGpus):
    async with reader(gpus) as machine:
        await machine.ask()
        gpus.put("gpus", 1)
        assert [(device["uuid"], device["health"]) for device in await machine.ask()] == [(A100, "Healthy"), (L4, "Unhealthy")]


async def test_a_critical_xid_makes_the_gpu_unhealthy_within_a_second(gpus: FakeGpus):
    async with reader(gpus) as machine:
        await machine.ask()
        gpus.add("event 1 8 79")
        async with asyncio.timeout(1):
            found = await machine.until("health", "Unhealthy", L4)
        assert found["reason"] == "XID 79"
        assert (await machine.ask())[0]["health"] == "Healthy"


async def test_an_applications_xid_changes_nothing(gpus: FakeGpus):
    async with reader(gpus) as machine:
        await machine.ask()
        gpus.add(*(f"event 0 8 {xid}" for xid in (13, 31, 43, 45, 68, 109)), "event 1 8 48")
        await machine.until("health", "Unhealthy", L4)
        assert (await machine.ask())[0]["health"] == "Healthy"


async def test_a_gpu_without_events_is_unmonitored(gpus: FakeGpus):
    gpus.add("fail nvmlDeviceRegisterEvents 3")
    async with reader(gpus) as machine:
        assert [device["health"] for device in await machine.ask()] == ["Unmonitored", "Unmonitored"]


@pytest.mark.parametrize("function", ["GetName", "GetCudaComputeCapability", "GetPciInfo_v3", "GetComputeRunningProcesses_v3"])
@pytest.mark.parametrize("error", [3, 4])
async def test_a_call_that_this_driver_refuses_costs_one_value_only(gpus: FakeGpus, function: str, error: int):
    gpus.add(f"fail nvmlDevice{function} {error}")
    async with reader(gpus) as machine:
        found = await machine.ask()
    assert [device["uuid"] for device in found] == [A100, L4]
    assert all(device["free"] > 0 and device["health"] == "Healthy" for device in found)


async def test_an_old_driver_without_memory_version_2_still_tells_free_memory(gpus: FakeGpus):
    gpus.add("fail nvmlDeviceGetMemoryInfo_v2 3")
    async with reader(gpus) as machine:
        assert (await machine.ask())[1]["free"] == 23_034 - 400


async def test_processes_are_told_with_their_memory(gpus: FakeGpus):
    gpus.add("1.proc 4242 1073741824", "1.proc 4243 2147483648")
    async with reader(gpus) as machine:
        assert (await machine.ask())[1]["processes"] == [[4242, 1024], [4243, 2048]]


async def test_a_driver_that_hangs_costs_the_timeout_and_not_the_agent(gpus: FakeGpus):
    async with reader(gpus, timeout_s=0.3) as machine:
        await machine.ask()
        gpus.put("hang_ms", 1500)
        found = await machine.ask()
        assert machine.took < 1
        assert [(device["health"], device["reason"]) for device in found] == [("Unhealthy", "the driver does not answer")] * 2
        gpus.drop("hang_ms")
        await machine.until("health", "Healthy", A100)


async def test_closing_lets_go_of_the_driver_at_once(gpus: FakeGpus):
    async with reader(gpus) as machine:
        await machine.ask()
        await machine.ask("close")
        assert machine.took < 0.6


DIVIDED = f"{TWO}0.mig 1\n0.mig.0.total 10737418240\n0.mig.0.uuid MIG-a\n0.mig.3.total 21474836480\n0.mig.3.uuid MIG-b\n"


async def test_a_divided_gpu_is_its_instances_and_no_device_itself(gpus: FakeGpus):
    gpus.set(DIVIDED)
    gpus.add("0.mig.3.name NVIDIA A100-SXM4-80GB MIG 2g.20gb", "0.mig.3.proc 4242 1073741824")
    async with reader(gpus) as machine:
        small, large, l4 = await machine.ask()
    assert (small["uuid"], large["uuid"], l4["uuid"]) == ("MIG-a", "MIG-b", L4)
    assert (large["name"], large["total"], large["used"]) == ("NVIDIA A100-SXM4-80GB MIG 2g.20gb", 20_480, 1_024)
    assert (large["parent"], large["compute_capability"], large["health"]) == (A100, "8.0", "Healthy")
    assert large["processes"] == [[4242, 1024]]
    assert small["processes"] == []


async def test_what_hits_a_gpu_hits_all_its_instances(gpus: FakeGpus):
    gpus.set(DIVIDED)
    async with reader(gpus) as machine:
        await machine.ask()
        gpus.add("event 0 8 79")
        await machine.until("health", "Unhealthy", "MIG-b")
        assert [device["health"] for device in await machine.ask()] == ["Unhealthy", "Unhealthy", "Healthy"]
    gpus.set(DIVIDED)
    async with reader(gpus) as machine:
        await machine.ask()
        gpus.put("0.lost", 1)
        assert {device["uuid"]: device["health"] for device in await machine.ask()} == {
            "MIG-a": "Unhealthy",
            "MIG-b": "Unhealthy",
            L4: "Healthy",
        }


async def test_a_gpu_may_be_divided_and_made_whole_under_a_running_agent(gpus: FakeGpus):
    async with reader(gpus) as machine:
        assert [device["uuid"] for device in await machine.ask()] == [A100, L4]
        gpus.set(DIVIDED)
        assert [device["uuid"] for device in await machine.ask()] == ["MIG-a", "MIG-b", L4]
        gpus.drop("0.mig.0.total")
        assert [device["uuid"] for device in await machine.ask()] == ["MIG-b", L4]
        gpus.set(TWO)
        assert [(device["uuid"], device["health"]) for device in await machine.ask()] == [(A100, "Healthy"), (L4, "Healthy")]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["0.ecc 3"], "3 uncorrectable ECC errors: the GPU needs a reset"),
        (["0.ecc 0", "0.remap 1"], "a row remap is pending: the GPU needs a reset"),
        (["0.ecc 1", "0.remap 2"], "1 uncorrectable ECC error, row remapping failed: the GPU needs a reset"),
    ],
)
async def test_memory_that_cannot_be_trusted_makes_the_gpu_unhealthy_until_it_is_reset(
    gpus: FakeGpus, lines: list[str], reason: str
):
    gpus.add("1.ecc 0", "1.remap 0", *lines)
    async with reader(gpus) as machine:
        a100, l4 = await machine.ask()
        assert (a100["health"], a100["reason"], l4["health"]) == ("Unhealthy", reason, "Healthy")
        gpus.set(TWO)
        assert [device["health"] for device in await machine.ask()] == ["Healthy", "Healthy"]
