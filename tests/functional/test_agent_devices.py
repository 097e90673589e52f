"""A whole agent about its GPUs: those of other pods, those that are divided, and what engines take of them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import aiohttp
import pytest
from agent_node import NODE, assignment
from agent_process import running
from engine_node import processes_named

from fixtures.fake_nvml import FakeGpus
from fixtures.kubelet import kubelet, pod
from fixtures.sparse_gguf import header_of
from llorch_agent.measured import FILE
from llorch_api import AssignedDevice, GPUNode, ReplicaState
from llorch_model.core.measured import measurement_key
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

FIRST, SECOND = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in range(2))


async def test_a_gpu_of_another_pod_is_told_with_its_holder_and_our_own_pods_is_not(tmp_path: Path):
    gpus = FakeGpus(tmp_path, f"gpus 2\n1.proc 4242 {8 << 30}\n")
    async with kubelet(tmp_path / "k.sock") as node:
        node.pods = [pod("agent-x", {"nvidia.com/gpu": [FIRST]}, namespace="llorch"), pod("t-0", {"nvidia.com/gpu": [SECOND]})]
        more = {"LLORCH_POD_RESOURCES": str(tmp_path / "k.sock"), "LLORCH_POD": "llorch/agent-x"}
        async with running(tmp_path, LLORCH_DEVICES="nvml", **gpus.environment, **more) as agent:
            found = await agent.until(lambda node: node.status.devices)
            devices = found.status.devices
            assert (devices[FIRST].held_by, devices[SECOND].held_by) == ("", "ml/t-0")
            async with aiohttp.ClientSession() as client, client.get(f"{agent.url}/metrics") as answer:
                page = await answer.text()
    assert f'llorch_device_held{{device="{SECOND}",node_id="gpu-1"}} 1.0' in page
    assert f'llorch_device_memory_foreign_bytes{{device="{SECOND}",node_id="gpu-1"}} 8.589934592e+09' in page
    assert f'llorch_device_memory_unmanaged_bytes{{device="{SECOND}",node_id="gpu-1"}} 0.0' in page


async def test_instances_and_broken_memory_are_in_the_nodes_status(tmp_path: Path):
    gpus = FakeGpus(tmp_path, "gpus 2\n0.mig 1\n0.mig.0.total 10737418240\n0.mig.0.uuid MIG-a\n1.ecc 2\n")
    async with running(tmp_path, LLORCH_DEVICES="nvml", **gpus.environment) as agent:
        found = await agent.until(lambda node: node.status.devices)
    devices = found.status.devices
    assert sorted(devices) == [SECOND, "MIG-a"]
    assert (devices["MIG-a"].vram_total_mib, devices["MIG-a"].health) == (10_240, "Healthy")
    assert (devices[SECOND].health, devices[SECOND].message) == ("Unhealthy", "2 uncorrectable ECC errors: the GPU needs a reset")


async def test_what_an_engine_takes_of_its_gpu_is_reported_and_outlives_the_agent(tmp_path: Path):
    model = write_tiny(tmp_path / "tiny.gguf")
    gpus = FakeGpus(tmp_path, "gpus 1\n0.total 25757220864\n")
    mine = assignment(model, devices={FIRST: AssignedDevice(vram_mib=3_000)})
    async with running(tmp_path, LLORCH_DEVICES="nvml", **gpus.environment) as agent:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        inspect, question = f"{agent.url}/v2/models/inspect", {"source": f"file:{model}"}
        async with aiohttp.ClientSession() as client, client.post(inspect, json=question) as answer:
            digest = (await answer.json())["digest"]
        wanted = mine.to_json()
        wanted["model"]["digest"] = digest
        for name in ("chat-aaaaa", "chat-bbbbb"):  # a transition is a reason to look at the devices again
            patch = {"spec": {"replicas": {name: wanted}}}
            await agent.store.patch(GPUNode, NODE, patch, field_manager="llorch-operator")
            await agent.until(
                lambda node, name=name: name in node.status.replicas and node.status.replicas[name].state is ReplicaState.READY
            )
            if name == "chat-aaaaa":
                (pid,) = processes_named(str(model))
                gpus.add(f"0.proc {pid} {3_500 << 20}")
        key = measurement_key(digest, slots=2, context_tokens=256, engine_args=[], devices=1)
        before = await agent.until(lambda node: node.status.measured == {key: 3_520})
    assert json.loads((tmp_path / "models" / FILE).read_bytes()) == {"mib": {key: 3_520}}
    async with running(tmp_path, LLORCH_DEVICES="nvml", **gpus.environment) as agent:
        after = await agent.until(lambda node: node.status.agent.boot_id != before.status.agent.boot_id)
        assert after.status.measured == {key: 3_520}


async def test_where_the_header_does_not_decide_llama_fit_params_is_asked_or_its_absence_said(tmp_path: Path):
    header, size = header_of("llama3-8b")
    model = tmp_path / "recurrent.gguf"
    model.write_bytes(header.replace(b"llama.vocab_size", b"llama.ssm.sizeee"))
    with model.open("r+b") as file:
        file.truncate(size)
    tools = tmp_path / "tools"
    tools.mkdir()
    async with running(tmp_path) as agent, aiohttp.ClientSession(agent.url) as client:
        await agent.until(lambda node: node.status.heartbeat.sequence)

        async def inspect(**more: object) -> tuple[int, dict[str, object]]:
            async with client.post("/v2/models/inspect", json={"source": f"file:{model}", **more}) as answer:
                return answer.status, await answer.json()

        _, plain = await inspect()
        assert "vramMiB" not in plain
        assert "vramMessage" not in plain
        status, refused = await inspect(slots=4, contextTokens=4096, engineArgs=["--port", "1"])
        assert (status, refused["error"]["code"]) == (400, "invalid_request")  # type: ignore[index]
        _, without = await inspect(slots=4, contextTokens=4096)
        assert "keeps recurrent state" in str(without["vramMessage"])

    tool = tools / "llama-fit-params"
    tool.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$*" > "$(dirname "$0")/asked"\necho "CUDA0 4403 2048 258"\necho "Host 282 0 40"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    (second := tmp_path / "second").mkdir()
    async with running(second, PATH=f"{tools}:{os.environ['PATH']}") as agent, aiohttp.ClientSession(agent.url) as client:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        question = {"source": f"file:{model}", "slots": 4, "contextTokens": 4096, "engineArgs": ["--cache-type-k", "q8_0"]}
        async with client.post("/v2/models/inspect", json=question) as answer:
            assert (await answer.json())["vramMiB"] == 6_709
    assert f"-m {model} -c 16384 -np 4" in (tools / "asked").read_text()
    assert "--cache-type-k q8_0" in (tools / "asked").read_text()
