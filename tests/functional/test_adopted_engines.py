"""Engines that somebody else started, and a handoff file tells of."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engine_node import Node, alive, foreign_engine, launch, running

from llorch_agent import engine_probe, keeper
from llorch_agent.engine import free_port
from llorch_api import ReplicaOrigin, ReplicaState
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with running(tmp_path / "runtime") as started:
        yield started


def adopt(url: str, **more: Any) -> dict[str, Any]:
    return {"pool_id": "pool-0", "replica_id": "r0", "engine": "llamacpp", "engine_version": "b1", "url": url} | more


async def test_a_running_engine_is_ready_half_a_second_after_its_file_appears(node: Node, model: Path) -> None:
    async with foreign_engine(model, slots=2) as (_, url):
        await asyncio.sleep(0.3)
        written = time.monotonic()
        node.write("pool-0_r0.json", adopt(url, slots=4))

        replica = await node.until_state("pool-0_r0", ReplicaState.READY)

        assert time.monotonic() - written < 0.5
        assert (replica.pool, replica.origin, replica.base_url) == ("pool-0", ReplicaOrigin.ADOPTED, url)
        assert replica.slots.total == 2, "it has two, whatever the file says"


async def test_its_file_s_end_is_the_end_of_the_replica_and_not_of_the_engine(node: Node, model: Path) -> None:
    async with foreign_engine(model) as (pid, url):
        node.write("a.json", adopt(url))
        await node.until_state("pool-0_r0", ReplicaState.READY)

        (node.directory / "a.json").unlink()

        await node.until_gone("pool-0_r0", 1)
        assert alive(pid)


async def test_closing_leaves_it_alone(node: Node, model: Path) -> None:
    async with foreign_engine(model) as (pid, url):
        node.write("a.json", adopt(url))
        await node.until_state("pool-0_r0", ReplicaState.READY)

        await node.engines.close()

        assert alive(pid)
        assert len(node.replicas) == 0


async def test_an_engine_that_dies_takes_no_more_requests_and_is_back_when_it_is_back(node: Node, model: Path) -> None:
    port = free_port()
    async with foreign_engine(model, port) as (pid, url):
        node.write("a.json", adopt(url))
        replica = await node.until_state("pool-0_r0", ReplicaState.READY)
        os.kill(pid, signal.SIGKILL)

        await node.until_state("pool-0_r0", ReplicaState.PENDING, 3)
        assert replica.message == f"{url} does not answer: connection refused"
        assert node.replicas.lease(replica) is None

    async with foreign_engine(model, port):
        assert await node.until_state("pool-0_r0", ReplicaState.READY) is replica


async def test_an_engine_that_hangs_is_noticed(node: Node, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_probe, "PROBE_S", 0.5)
    monkeypatch.setattr(keeper, "PROBE_INTERVAL_S", 0.5)
    async with foreign_engine(model) as (pid, url):
        node.write("a.json", adopt(url))
        await node.until_state("pool-0_r0", ReplicaState.READY)
        os.kill(pid, signal.SIGSTOP)
        try:
            replica = await node.until_state("pool-0_r0", ReplicaState.PENDING)
        finally:
            os.kill(pid, signal.SIGCONT)

        assert replica.message == f"{url} does not answer: nothing within 0.5 s"
        await node.until_state("pool-0_r0", ReplicaState.READY)


async def test_a_rewritten_file_moves_the_replica_to_the_new_engine_and_old_leases_do_not_count_there(
    node: Node, model: Path
) -> None:
    async with foreign_engine(model, slots=1) as (_, old), foreign_engine(model, slots=3) as (_, new):
        node.write("engine.json", adopt(old))
        first = await node.until_state("pool-0_r0", ReplicaState.READY)
        lease = node.replicas.lease(first)
        assert lease is not None

        node.write("engine.json", adopt(new))
        await node.until(lambda: (found := node.replicas.get("pool-0_r0")) and found.base_url == new and found.serving, 1)

        second = node.replicas.get("pool-0_r0")
        assert second is not None
        assert (second.slots.total, second.slots.free) == (3, 3)
        node.replicas.release(first, lease)
        assert second.slots.free == 3


async def test_one_file_may_turn_to_another_pool(node: Node, model: Path) -> None:
    async with foreign_engine(model) as (_, url):
        node.write("engine.json", adopt(url))
        await node.until_state("pool-0_r0", ReplicaState.READY)

        node.write("engine.json", adopt(url) | {"pool_id": "pool-1"})

        await node.until_state("pool-1_r0", ReplicaState.READY)
        await node.until_gone("pool-0_r0", 1)


async def test_an_agent_that_starts_again_finds_everything_as_its_directory_says(tmp_path: Path, model: Path) -> None:
    async with foreign_engine(model) as (_, url):
        async with running(tmp_path / "runtime") as before:
            before.write("a.json", adopt(url))
            before.write("b.json", launch(model))
            await before.until_state("pool-0_r0", ReplicaState.READY)
            await before.until_state("chat_r0", ReplicaState.READY)

        async with running(tmp_path / "runtime") as after:
            await after.until_state("pool-0_r0", ReplicaState.READY)
            await after.until_state("chat_r0", ReplicaState.READY)


async def test_an_engine_elsewhere_is_refused_and_said_so_once(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        node.write("a.json", adopt("http://192.0.2.7:8080"))
        await asyncio.sleep(1.2)

    assert len(node.replicas) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "a.json: url 'http://192.0.2.7:8080': not loopback and not an address of this node"
    ]


async def test_an_engine_the_agent_launched_is_not_adopted_on_top(node: Node, model: Path) -> None:
    node.write("a.json", launch(model))
    launched = await node.until_state("chat_r0", ReplicaState.READY)

    node.write("b.json", adopt(launched.base_url))

    await node.until(lambda: (found := node.replicas.get("pool-0_r0")) and "is now the engine of chat_r0" in found.message)
