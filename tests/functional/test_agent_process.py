"""`llorch agent` as a process: what it listens to, what it says of its GPUs, how it ends and how it refuses to start."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent_node import NODE, assignment
from agent_process import environment, running
from engine_node import processes_named

from fixtures.fake_nvml import FakeGpus
from llorch_api import AgentState, AssignedDevice, DeviceHealth, GPUNode, ReplicaState
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

TOKEN = "t" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


async def refused(root: Path, **more: str) -> tuple[int, str]:
    """Exit code and standard error of an agent that does not start."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch_agent", env=environment(root, **more), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(15):
        _, error = await process.communicate()
    return process.returncode or 0, error.decode()


async def test_health_and_metrics_are_open_and_everything_else_asks_for_the_token(tmp_path: Path, model: Path):
    async with running(tmp_path, LLORCH_API_TOKEN=TOKEN) as agent, aiohttp.ClientSession(agent.url) as client:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        async with client.get("/health") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})
        async with client.get("/metrics") as answer:
            page = await answer.text()
        assert 'llorch_device_memory_total_bytes{device="cpu"' in page
        assert 'pool_registration_attempts_total{node_id="gpu-1",outcome="success"} 1.0' in page
        assert 'pool_heartbeat_sent_total{kind="full",node_id="gpu-1",outcome="success"} 1.0' in page
        asked = {"source": f"file:{model}"}
        async with client.post("/v2/models/inspect", json=asked) as answer:
            assert answer.status == 401
        async with client.post("/v2/models/inspect", json=asked, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
            assert answer.status == 200


async def test_a_model_is_inspected_or_refused_for_a_reason(tmp_path: Path, model: Path):
    bad = model.with_name("bad.gguf")
    bad.write_bytes(b"GGUF nonsense")
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(model.read_bytes())
    (link := model.with_name("link.gguf")).symlink_to(outside)
    async with running(tmp_path, LLORCH_MODEL_ROOTS=str(model.parent)) as agent, aiohttp.ClientSession(agent.url) as client:
        await agent.until(lambda node: node.status.heartbeat.sequence)

        async def inspect(**asked: str) -> tuple[int, Any]:
            async with client.post("/v2/models/inspect", json=asked) as answer:
                return answer.status, await answer.json()

        status, found = await inspect(source=f"file:{model}")
        assert status == 200
        assert (found["resolved"], found["sizeMiB"]) == (f"file:{model}", 1)
        assert found["digest"].startswith("sample:")
        assert found["shape"]["architecture"] == "llama"
        refusals = {
            f"file:{model.parent}/missing.gguf": (404, "MODEL_NOT_AVAILABLE", "no such file"),
            f"file:{bad}": (422, "BAD_MODEL", str(bad)),
            "ftp://x/y": (422, "UNSUPPORTED_SOURCE", "must be file:/path"),
            f"file:{outside}": (422, "UNSUPPORTED_SOURCE", "LLORCH_MODEL_ROOTS"),
            f"file:{link}": (422, "UNSUPPORTED_SOURCE", "LLORCH_MODEL_ROOTS"),
        }
        for source, (code, word, text) in refusals.items():
            status, body = await inspect(source=source)
            assert (status, body["error"]["code"]) == (code, word)
            assert text in body["error"]["message"]
            assert "\n" not in body["error"]["message"]
        status, body = await inspect(source=f"file:{model}", sha256="0" * 64)
        assert (status, body["error"]["code"]) == (409, "DIGEST_MISMATCH")
        status, body = await inspect(nonsense="x")
        assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_gpus_are_published_and_one_that_breaks_is_told_at_once(tmp_path: Path):
    gpus = FakeGpus(tmp_path, "gpus 2\n0.name NVIDIA L4\n0.total 24152899584\n1.used 17179869184\n")
    async with running(tmp_path, LLORCH_DEVICES="auto", **gpus.environment) as agent:
        node = await agent.until(lambda node: node.status.heartbeat.sequence)
        first, second = (f"GPU-00000000-0000-0000-0000-00000000000{n}" for n in range(2))
        devices = node.status.devices
        assert node.status.summary.gpus == "2"
        assert (devices[first].name, devices[first].compute_capability, devices[first].health) == ("NVIDIA L4", "8.9", "Healthy")
        assert devices[first].vram_total_mib == 23_034
        assert devices[second].foreign_mib == 16_384, "nobody here uses it"
        gpus.add("event 1 8 79")
        await agent.until(lambda node: node.status.devices[second].health is DeviceHealth.UNHEALTHY, 1.0)


async def test_what_an_engine_holds_on_its_gpu_is_neither_reserved_nor_foreign(tmp_path: Path, model: Path):
    gpus = FakeGpus(tmp_path, "gpus 1\n0.total 25757220864\n0.used 1073741824\n")
    first = "GPU-00000000-0000-0000-0000-000000000000"
    mine = assignment(model, devices={first: AssignedDevice(vram_mib=3_000)})
    async with running(tmp_path, LLORCH_DEVICES="nvml", **gpus.environment) as agent:
        await agent.until(lambda node: node.status.heartbeat.sequence)

        async def assign(name: str) -> GPUNode:
            patch = {"spec": {"replicas": {name: mine.to_json()}}}
            await agent.store.patch(GPUNode, NODE, patch, field_manager="llorch-operator")
            return await agent.until(lambda node: name in node.status.replicas and node.status.replicas[name].state == "Ready")

        node = await assign("chat-aaaaa")
        report = node.status.replicas["chat-aaaaa"]
        assert (report.vram_mib, report.reserved_mib) == (0, 3_000), "the driver shows nothing of it yet"
        assert node.status.devices[first].foreign_mib == 1_024
        (pid,) = processes_named(str(model))
        gpus.add(f"0.proc {pid} {2_048 << 20}")
        await assign("chat-bbbbb")  # a transition is a reason to look at the devices again
        node = await agent.until(lambda node: node.status.replicas["chat-aaaaa"].vram_mib)
        report = node.status.replicas["chat-aaaaa"]
        assert (report.vram_mib, report.reserved_mib) == (2_048, 952)
        assert node.status.devices[first].foreign_mib == 1_024
        assert node.status.replicas["chat-bbbbb"].reserved_mib == 3_000


async def test_sigterm_ends_an_idle_agent_within_a_second_with_the_last_word_said(tmp_path: Path):
    async with running(tmp_path) as agent:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        code, took = await agent.end()
        assert code == 0
        assert took < 1.0
        assert (await agent.store.get(GPUNode, NODE)).status.agent.state is AgentState.STOPPED


async def test_sigterm_leaves_no_engine_behind(tmp_path: Path, model: Path):
    async with running(tmp_path) as agent:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        patch = {"spec": {"replicas": {"chat-abcde": assignment(model).to_json()}}}
        await agent.store.patch(GPUNode, NODE, patch, field_manager="llorch-operator")
        await agent.until(lambda node: node.status.replicas and node.status.replicas["chat-abcde"].state is ReplicaState.READY)
        assert processes_named(str(model))
        code, took = await agent.end()
        assert code == 0
        assert took < 4
        assert not processes_named(str(model))


async def test_answers_go_through_the_front_door(tmp_path: Path, model: Path):
    async with running(tmp_path) as agent, aiohttp.ClientSession(agent.url) as client:
        await agent.until(lambda node: node.status.heartbeat.sequence)
        patch = {"spec": {"replicas": {"chat-abcde": assignment(model).to_json()}}}
        await agent.store.patch(GPUNode, NODE, patch, field_manager="llorch-operator")
        node = await agent.until(
            lambda node: node.status.replicas and node.status.replicas["chat-abcde"].state is ReplicaState.READY
        )
        assert node.status.agent.address == agent.url
        asked = {"model": "chat", "prompt": "a", "max_tokens": 4}
        async with client.post("/replicas/chat-abcde/v1/completions", json=asked) as answer:
            body = await answer.json()
        assert (body["model"], body["usage"]["completion_tokens"]) == ("chat", 4)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "0", "must be 1 to 60 (seconds)"),
        ("POOL_MANAGERD_WATCH_INTERVAL_MS", "50", "must be 100 to 10000 (ms)"),
        ("POOL_MANAGERD_ADDR", "9200", "must be host:port"),
        ("POOL_MANAGERD_NODE_ID", "No_Such", "must be lower-case letters, digits, '-' and '.'"),
        ("POOL_MANAGERD_ADDRESS", "10.0.0.1:9200", "must be http://host:port at which"),
        ("POOL_MANAGERD_CLOUD_PROFILE", "perhaps", "must be true or false"),
        ("LLORCH_DEVICES", "rocm", "must be auto, nvml or cpu"),
        ("LLORCH_NODE_LABELS", "zone", "must be key=value,…"),
        ("LLORCH_MODEL_ROOTS", "models", "must be absolute directories"),
        ("LLORCH_STORE", "etcd", "must be kubernetes, or sqlite:PATH"),
    ],
)
async def test_a_bad_setting_is_one_line_that_says_what_is_allowed(tmp_path: Path, variable: str, value: str, allowed: str):
    code, error = await refused(tmp_path, **{variable: value})
    assert code == 2
    assert error.startswith(f"llorch: {variable}={value} — {allowed}")
    assert error.count("\n") == 1


async def test_a_taken_port_is_one_line(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, error = await refused(tmp_path, POOL_MANAGERD_ADDR=address)
    assert code == 2
    assert f"llorch: POOL_MANAGERD_ADDR={address} — the port is taken" in error


async def test_the_seeds_variables_are_accepted(tmp_path: Path):
    more = {
        "POOL_MANAGERD_CLOUD_PROFILE": "true",
        "POOL_MANAGERD_MACHINE_ID": "m-7",
        "POOL_MANAGERD_ADDRESS": "http://10.0.0.9:9200",
    }
    async with running(tmp_path, LLORCH_NODE_LABELS="rack=r1,topology.kubernetes.io/zone=eu-1a", **more) as agent:
        status = (await agent.until(lambda node: node.status.heartbeat.sequence)).status
        assert (status.agent.machine_id, status.agent.address) == ("m-7", "http://10.0.0.9:9200")
        assert (status.node.labels["rack"], status.node.zone) == ("r1", "eu-1a")
        assert json.dumps(status.to_json())
