"""Assigned models that come over https, as the node's status tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from agent_node import NODE, Node, assignment, running

from fixtures import model_server
from fixtures.model_server import ModelServer
from llorch_api import GPUNode, GPUPool, GPUPoolSpec, ModelSpec, ObjectMeta, PoolReplica, ReplicaState
from llorch_model.tiny import write_tiny
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelServer]:
    authority = model_server.make_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    content = write_tiny(tmp_path / "tiny.gguf").read_bytes().ljust(16 << 20, b"\0")  # long enough to be half here
    async with model_server.running(authority, content) as started:
        yield started


@pytest.fixture
async def node(tmp_path: Path, server: ModelServer) -> AsyncIterator[Node]:
    async with open_store("memory:") as store, running(tmp_path / "home", store) as started:
        yield started


async def test_a_model_is_fetched_with_progress_and_served_and_the_second_replica_needs_no_network(
    node: Node, server: ModelServer
):
    server.pause = 0.01
    await node.assign({"chat-aaaaa": assignment(server.url, sha256=server.sha256)})
    fetching = await node.until_state("chat-aaaaa", ReplicaState.FETCHING)
    assert fetching.status.replicas["chat-aaaaa"].reserved_mib == 128, "its memory is taken before its model is here"
    await node.until(lambda each: 0 < each.status.replicas["chat-aaaaa"].progress_percent < 100)
    await node.until_state("chat-aaaaa", ReplicaState.READY)
    found = await node.until(lambda each: each.status.models, 3)
    ((digest, cached),) = found.status.models.items()
    assert (digest, cached.source) == (f"sha256:{server.sha256}", server.url)
    sent = server.bytes_sent
    await node.assign({"chat-bbbbb": assignment(server.url, sha256=server.sha256)})
    await node.until_state("chat-bbbbb", ReplicaState.READY)
    assert server.bytes_sent == sent


async def test_the_pool_is_told_how_far_the_download_is_in_steps_and_forgets_it_after(node: Node, server: ModelServer):
    server.pause = 0.01
    pool = GPUPool(
        metadata=ObjectMeta(namespace="default", name="chat"), spec=GPUPoolSpec(model=ModelSpec(source=server.url), replicas=1)
    )
    await node.store.apply(pool, field_manager="test")
    told: list[PoolReplica] = []

    async def follow() -> None:
        async with aclosing(node.store.watch(GPUPool, namespace="default")) as events:
            async for event in events:
                if event.object is not None and (entry := event.object.status.replicas.get("chat-aaaaa")):
                    told.append(entry)
                    if entry.state is ReplicaState.READY:
                        return

    await node.assign({"chat-aaaaa": assignment(server.url, sha256=server.sha256)})
    async with asyncio.timeout(20):
        await follow()

    percents = [entry.progress_percent for entry in told if entry.state is ReplicaState.FETCHING]
    assert percents == sorted(percents)
    assert set(percents) > {0}
    assert set(percents) <= set(range(0, 101, 10))
    assert told[-1].progress_percent == 0


async def test_another_content_than_the_stated_one_is_a_failed_replica(node: Node, server: ModelServer):
    await node.assign({"chat-abcde": assignment(server.url, sha256="0" * 64)})
    found = await node.until_state("chat-abcde", ReplicaState.FAILED)
    assert "sha256" in found.status.replicas["chat-abcde"].message
    assert node.files == []


async def test_an_assignment_that_goes_ends_its_fetch(node: Node, server: ModelServer):
    server.stalled = True
    await node.assign({"chat-abcde": assignment(server.url, sha256=server.sha256)})
    await node.until_state("chat-abcde", ReplicaState.FETCHING)
    await node.assign({"chat-abcde": None})
    await node.until_gone("chat-abcde")
    assert (await node.store.get(GPUNode, NODE)).status.replicas == {}


async def test_an_agent_ends_in_the_middle_of_a_fetch_within_a_second(node: Node, server: ModelServer):
    server.stalled = True
    await node.assign({"chat-abcde": assignment(server.url, sha256=server.sha256)})
    await node.until_state("chat-abcde", ReplicaState.FETCHING)
    async with asyncio.timeout(1):
        await node.agent.stop()
    assert (await node.store.get(GPUNode, NODE)).status.replicas == {}
