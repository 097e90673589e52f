"""The agent as a whole: from the operator's assignment to an engine that serves, and back, with the status telling the truth."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agent_node import NODE, Node, assignment, running, settings
from engine_node import alive, gone, tokens
from faulty_store import FaultyStore

from llorch_agent.app import Agent
from llorch_api import AgentState, Desired, GPUNode, GPUPool, GPUPoolSpec, ModelSpec, ObjectMeta, ReplicaOrigin, ReplicaState
from llorch_model.tiny import write_tiny
from llorch_store import Key, Store
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(f"sqlite:{tmp_path}/llorch.db") as opened:
        yield opened


@pytest.fixture
async def node(tmp_path: Path, store: Store) -> AsyncIterator[Node]:
    async with running(tmp_path / "home", store) as started:
        yield started


async def test_a_fresh_agent_registers_within_a_second_and_shows_its_machine(node: Node):
    began = time.monotonic()
    found = await node.until(lambda each: each.status.heartbeat.sequence)
    assert time.monotonic() - began < 1.0
    status = found.status
    assert (status.summary.gpus, status.summary.slots) == ("cpu", "0/0")
    assert status.devices["cpu"].vram_total_mib == status.system.memory_total_mib > 0
    assert status.system.disk_free_mib > 0
    assert (status.agent.state, status.agent.machine_id, status.agent.address) == (
        AgentState.RUNNING,
        "gpu-1",
        "http://127.0.0.1:9200",
    )
    assert len(status.agent.boot_id) == 16


async def test_an_assignment_becomes_an_engine_that_serves_and_ends_with_it(node: Node, model: Path):
    pool = GPUPool(
        metadata=ObjectMeta(name="chat", namespace="default"), spec=GPUPoolSpec(model=ModelSpec(source=f"file:{model}"))
    )
    await node.store.apply(pool, field_manager="user")
    await node.assign({"chat-abcde": assignment(model)})
    found = await node.until_state("chat-abcde", ReplicaState.READY)
    report = found.status.replicas["chat-abcde"]
    assert (report.pool, report.origin, report.revision) == ("chat", ReplicaOrigin.ASSIGNED, "rev-1")
    assert (report.slots_total, report.slots_free) == (2, 2)
    assert report.vram_mib + report.reserved_mib >= 128
    assert found.status.summary.slots == "2/2"
    assert found.status.summary.pools == "chat"
    assert node.files == ["chat_chat-abcde.json"]
    replica = node.agent.replicas.get("chat-abcde")
    assert replica is not None
    assert await tokens(replica.base_url) == 4
    told = await node.store.get(GPUPool, Key("default", "chat"))
    async with asyncio.timeout(3):
        while "chat-abcde" not in told.status.replicas or told.status.replicas["chat-abcde"].state is not ReplicaState.READY:
            await asyncio.sleep(0.05)
            told = await node.store.get(GPUPool, Key("default", "chat"))
    assert told.status.replicas["chat-abcde"].node == "gpu-1"

    pid = replica.pid
    await node.assign({"chat-abcde": None})
    await node.until_gone("chat-abcde")
    assert await gone(pid)
    assert node.files == []


async def test_the_models_of_file_sources_are_reported(node: Node, model: Path):
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    found = await node.until(lambda each: each.status.models)
    ((digest, cached),) = found.status.models.items()
    assert digest.startswith("sample:")
    assert cached.source == f"file:{model}"


async def test_a_missing_file_is_a_failed_replica_that_says_which(node: Node, tmp_path: Path):
    await node.assign({"chat-abcde": assignment(tmp_path / "missing.gguf")})
    found = await node.until_state("chat-abcde", ReplicaState.FAILED)
    report = found.status.replicas["chat-abcde"]
    assert report.message == f"{tmp_path}/missing.gguf: no such file"
    assert report.reserved_mib == 0
    assert node.files == []


async def test_a_wrong_sha256_is_a_failed_replica_that_says_both(node: Node, model: Path):
    actual = hashlib.sha256(model.read_bytes()).hexdigest()
    await node.assign({"chat-good": assignment(model, sha256=actual), "chat-bad": assignment(model, sha256="0" * 64)})
    found = await node.until_state("chat-bad", ReplicaState.FAILED)
    assert found.status.replicas["chat-bad"].message == f"{model}: sha256 is {actual}, expected {'0' * 64}"
    await node.until_state("chat-good", ReplicaState.READY)


async def test_a_file_that_is_no_model_is_a_failed_replica(node: Node, tmp_path: Path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nonsense")
    await node.assign({"chat-abcde": assignment(bad)})
    found = await node.until_state("chat-abcde", ReplicaState.FAILED)
    assert str(bad) in found.status.replicas["chat-abcde"].message


async def test_a_failed_replica_is_forgotten_with_its_key_and_another_takes_its_place(node: Node, model: Path, tmp_path: Path):
    await node.assign({"chat-aaaaa": assignment(tmp_path / "missing.gguf")})
    await node.until_state("chat-aaaaa", ReplicaState.FAILED)
    await node.assign({"chat-aaaaa": None, "chat-bbbbb": assignment(model)})
    await node.until_gone("chat-aaaaa")
    await node.until_state("chat-bbbbb", ReplicaState.READY)


async def test_a_drained_replica_waits_for_its_requests_and_then_is_stopped(node: Node, model: Path):
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    replica = node.agent.replicas.get("chat-abcde")
    assert replica is not None
    lease = node.agent.replicas.lease(replica)
    assert lease is not None
    await node.assign({"chat-abcde": assignment(model, Desired.DRAIN)})
    await node.until_state("chat-abcde", ReplicaState.DRAINING)
    assert node.agent.replicas.lease(replica) is None
    await asyncio.sleep(0.3)
    assert alive(replica.pid), "its request is still being answered"
    pid = replica.pid
    node.agent.replicas.release(replica, lease)
    found = await node.until_state("chat-abcde", ReplicaState.STOPPED)
    assert await gone(pid)
    assert found.status.replicas["chat-abcde"].reserved_mib == 0
    assert node.files == []
    await node.assign({"chat-abcde": None})
    await node.until_gone("chat-abcde")


async def test_stop_ends_an_engine_at_once_and_says_so(node: Node, model: Path):
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    await node.assign({"chat-abcde": assignment(model, Desired.STOP)})
    await node.until_state("chat-abcde", ReplicaState.STOPPED)
    assert node.files == []


async def test_the_file_of_an_assigned_replica_comes_back_when_it_is_deleted_by_hand(node: Node, model: Path):
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    (node.root / "engines" / "chat_chat-abcde.json").unlink()
    await node.until(lambda _: node.files, 5)
    await node.until_state("chat-abcde", ReplicaState.READY)


async def test_a_file_deleted_by_hand_together_with_its_model_is_a_failed_replica(node: Node, model: Path, tmp_path: Path):
    own = tmp_path / "own.gguf"
    own.write_bytes(model.read_bytes())
    await node.assign({"chat-abcde": assignment(own)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    own.unlink()
    (node.root / "engines" / "chat_chat-abcde.json").unlink()
    await node.until_state("chat-abcde", ReplicaState.FAILED)
    assert node.files == []


async def test_an_agent_that_comes_back_finds_its_engines_and_does_what_changed_meanwhile(
    tmp_path: Path, store: Store, model: Path
):
    async with running(tmp_path / "home", store) as node:
        await node.assign({"chat-aaaaa": assignment(model), "chat-bbbbb": assignment(model)})
        for name in ("chat-aaaaa", "chat-bbbbb"):
            await node.until_state(name, ReplicaState.READY)
        boot = (await store.get(GPUNode, NODE)).status.agent.boot_id
    stopped = await store.get(GPUNode, NODE)
    assert stopped.status.agent.state is AgentState.STOPPED
    assert stopped.status.replicas == {}
    assert node.files == ["chat_chat-aaaaa.json", "chat_chat-bbbbb.json"], "assignments outlive the agent"
    await store.patch(GPUNode, NODE, {"spec": {"replicas": {"chat-bbbbb": None}}}, field_manager="llorch-operator")
    async with running(tmp_path / "home", store) as node:
        found = await node.until_state("chat-aaaaa", ReplicaState.READY)
        await node.until_gone("chat-bbbbb")
        assert found.status.agent.boot_id != boot
        assert node.files == ["chat_chat-aaaaa.json"]


async def test_an_empty_spec_of_a_new_object_stops_no_engine_and_the_operator_takes_it_over(node: Node, model: Path):
    await node.assign({"chat-abcde": assignment(model)})
    first = await node.until_state("chat-abcde", ReplicaState.READY)
    replica = node.agent.replicas.get("chat-abcde")
    assert replica is not None
    pid = replica.pid
    await node.store.delete(GPUNode, NODE)
    again = await node.until_state("chat-abcde", ReplicaState.READY)
    assert again.metadata.uid != first.metadata.uid
    assert again.spec.replicas == {}
    await asyncio.sleep(1.2)
    assert alive(pid)
    await node.assign({"chat-abcde": assignment(model)})
    await asyncio.sleep(0.5)
    assert alive(pid), "taken over as it is"
    await node.assign({"chat-abcde": None})
    await node.until_gone("chat-abcde")
    assert await gone(pid)


async def test_a_handoff_file_of_a_user_is_reported_and_left_alone(node: Node, model: Path):
    path = node.root / "engines" / "pool-0_r0.json"
    await node.until(lambda _: True)
    path.write_text(f'{{"pool_id": "pool-0", "replica_id": "r0", "model": "{model}", "slots": 4}}')
    found = await node.until_state("pool-0_r0", ReplicaState.READY)
    report = found.status.replicas["pool-0_r0"]
    assert (report.origin, report.pool, report.slots_total) == (ReplicaOrigin.LAUNCHED, "pool-0", 4)
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    await node.assign({"chat-abcde": None})
    await node.until_gone("chat-abcde")
    assert path.exists()
    path.unlink()
    await node.until_gone("pool-0_r0")


async def test_an_idle_agent_ends_within_a_second_and_says_that_it_did(tmp_path: Path, store: Store):
    async with running(tmp_path / "home", store) as node:
        await node.until(lambda each: each.status.heartbeat.sequence)
        began = time.monotonic()
        await node.agent.stop()
        assert time.monotonic() - began < 1.0
        assert (await store.get(GPUNode, NODE)).status.agent.state is AgentState.STOPPED


async def test_requests_in_flight_are_waited_for_when_the_agent_ends(tmp_path: Path, store: Store, model: Path):
    async with running(tmp_path / "home", store) as node:
        await node.assign({"chat-abcde": assignment(model)})
        await node.until_state("chat-abcde", ReplicaState.READY)
        replica = node.agent.replicas.get("chat-abcde")
        assert replica is not None
        pid = replica.pid
        lease = node.agent.replicas.lease(replica)
        assert lease is not None
        ending = asyncio.create_task(node.agent.stop())
        await node.until(lambda each: each.status.agent.state is AgentState.DRAINING)
        assert node.agent.replicas.lease(replica) is None
        await asyncio.sleep(0.3)
        assert alive(pid)
        node.agent.replicas.release(replica, lease)
        await ending
        assert not alive(pid)


async def test_a_drain_deadline_ends_the_waiting(tmp_path: Path, store: Store, model: Path):
    async with running(tmp_path / "home", store) as node:
        await node.assign({"chat-abcde": assignment(model)})
        await node.until_state("chat-abcde", ReplicaState.READY)
        replica = node.agent.replicas.get("chat-abcde")
        assert replica is not None
        assert node.agent.replicas.lease(replica) is not None
        began = time.monotonic()
        await node.agent.stop(drain_s=0.3)
        assert time.monotonic() - began < 4
        assert not alive(replica.pid) if replica.pid else True


async def test_an_agent_that_is_stopped_before_it_has_begun_ends_at_once(tmp_path: Path, store: Store):
    agent = Agent(settings(tmp_path / "home"), store)
    await agent.start()
    began = time.monotonic()
    await agent.stop()
    assert time.monotonic() - began < 1.0


async def test_a_part_that_dies_ends_the_agent_and_its_engines(tmp_path: Path, store: Store, model: Path):
    class Broken(FaultyStore):
        fuse = asyncio.Event()

        async def watch(self, *arguments: Any, **more: Any) -> AsyncGenerator[Any, None]:
            async for event in super().watch(*arguments, **more):
                yield event
                if self.fuse.is_set():
                    raise RuntimeError("a bug")

    broken = Broken(store)
    agent = Agent(settings(tmp_path / "home"), broken)
    node = Node(agent, store, tmp_path / "home")
    running_ = asyncio.create_task(agent.run(asyncio.Event()))
    await node.assign({"chat-abcde": assignment(model)})
    await node.until_state("chat-abcde", ReplicaState.READY)
    replica = agent.replicas.get("chat-abcde")
    assert replica is not None
    pid = replica.pid
    broken.fuse.set()
    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(running_, 10)
    assert not alive(pid)
