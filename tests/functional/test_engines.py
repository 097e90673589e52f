"""From handoff files that ask for an engine to real engines, and back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from engine_node import SOON_S, Node, alive, gone, launch, running, script, tokens

from llorch_agent import engine, engine_probe, engine_start, keeper
from llorch_agent.core.handoff import launch_document
from llorch_agent.handoff import write_atomically
from llorch_api import AssignedDevice, AssignedModel, Assignment, ReplicaOrigin, ReplicaState
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with running(tmp_path / "runtime") as started:
        yield started


def serves(node: Node, revision: str) -> bool:
    replica = node.replicas.get("chat_r0")
    return replica is not None and replica.serving and replica.revision == revision


# ---- launched


async def test_a_file_that_asks_for_an_engine_gets_one_within_a_second(node: Node, model: Path) -> None:
    for number in range(5):  # on a machine that has other things to do, one of five
        written = time.monotonic()
        revision = str(number)
        node.write("chat_r0.json", launch(model) | {"revision": revision})
        await node.until(partial(serves, node, revision))
        took = time.monotonic() - written
        if took < 1:
            break

    assert took < 1
    replica = node.replicas.get("chat_r0")
    assert replica is not None
    assert (replica.pool, replica.origin, replica.slots.total) == ("chat", ReplicaOrigin.LAUNCHED, 2)
    assert alive(replica.pid)
    assert await tokens(replica.base_url) == 4
    assert (node.state / "logs" / "chat_r0.log").stat().st_size > 0


async def test_an_assignment_s_file_becomes_the_replica_it_speaks_of(node: Node, model: Path) -> None:
    assignment = Assignment(
        pool="chat",
        namespace="team-a",
        revision="rev-1",
        model=AssignedModel(source=f"file:{model}", digest="sha256:abc"),
        devices={"cpu": AssignedDevice(vram_mib=64)},
        slots=3,
        context_tokens=256,
        engine_args=["--temp", "0.5", "--seed", "-1"],
    )
    node.write("chat_chat-abcde.json", launch_document("chat-abcde", assignment, str(model)))

    replica = await node.until_state("chat-abcde", ReplicaState.READY)

    assert (replica.origin, replica.namespace, replica.revision) == (ReplicaOrigin.ASSIGNED, "team-a", "rev-1")
    assert (replica.model, replica.devices, replica.slots.total) == ("sha256:abc", {"cpu": 64}, 3)
    environment = Path(f"/proc/{replica.pid}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=" in environment


async def test_a_deleted_file_ends_the_engine_after_its_last_request(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    pid, lease = replica.pid, node.replicas.lease(replica)
    assert lease is not None

    (node.directory / "chat_r0.json").unlink()
    await node.until_state("chat_r0", ReplicaState.DRAINING)
    await asyncio.sleep(0.2)

    assert alive(pid)
    assert node.replicas.lease(replica) is None
    node.replicas.release(replica, lease)
    await node.until_gone("chat_r0")
    assert await gone(pid, 0)
    assert list((node.state / "run").glob("*.run")) == []


async def test_a_drain_ends_at_its_deadline(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model, drain_deadline_seconds=0))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    node.replicas.lease(replica)
    pid = replica.pid

    (node.directory / "chat_r0.json").unlink()

    await node.until_gone("chat_r0", 4)
    assert await gone(pid, 0)


async def test_a_rewritten_file_replaces_the_engine_and_the_same_content_does_not(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model))
    first = await node.until_state("chat_r0", ReplicaState.READY)
    pid = first.pid

    node.write("chat_r0.json", launch(model) | {"note": "the same engine, spelt differently"})
    await asyncio.sleep(0.3)
    assert node.replicas.get("chat_r0") is first
    assert alive(pid)

    node.write("chat_r0.json", launch(model, slots=4))
    await node.until(lambda: (found := node.replicas.get("chat_r0")) and found.slots.total == 4 and found.serving)

    assert await gone(pid, 0)


async def test_a_file_that_comes_back_while_its_engine_drains_keeps_it(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    pid, lease = replica.pid, node.replicas.lease(replica)
    (node.directory / "chat_r0.json").unlink()
    await node.until_state("chat_r0", ReplicaState.DRAINING)

    node.write("chat_r0.json", launch(model))

    assert await node.until_state("chat_r0", ReplicaState.READY) is replica
    assert lease is not None
    node.replicas.release(replica, lease)
    assert (replica.pid, replica.slots.free) == (pid, 2)


async def test_two_files_of_one_id_run_one_engine_and_the_second_takes_over_when_the_first_goes(node: Node, model: Path) -> None:
    node.write("a.json", launch(model))
    node.write("b.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    pid = replica.pid

    (node.directory / "a.json").unlink()
    await asyncio.sleep(0.5)

    assert len(node.replicas) == 1
    assert alive(pid), "the same engine serves the other file"


async def test_nonsense_written_over_a_good_file_ends_nothing(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)

    for nonsense in (b"{", {"model": {"id": "x"}, "metadata": {}}, launch(model, engine_args=["--host", "0.0.0.0"])):
        node.write("chat_r0.json", nonsense)
        await asyncio.sleep(0.15)

    assert replica.serving
    assert alive(replica.pid)


# ---- failures


async def test_a_killed_engine_is_back_in_a_moment_and_its_death_is_named(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    pid = replica.pid

    os.kill(pid, signal.SIGSEGV)
    await node.until(lambda: "killed by signal 11 (SIGSEGV)" in replica.message)
    await node.until_state("chat_r0", ReplicaState.READY)

    assert replica.pid != pid
    assert replica.restarts == 1
    assert await tokens(replica.base_url) == 4


async def test_a_missing_model_file_is_waited_for(node: Node, model: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.gguf"
    node.write("chat_r0.json", launch(late))
    replica = await node.until_state("chat_r0", ReplicaState.PENDING)
    await node.until(lambda: replica.message)
    assert replica.message == f"model file {late} is missing; the engine starts when it is there"

    late.hardlink_to(model)

    await node.until_state("chat_r0", ReplicaState.READY)


async def test_a_broken_model_fails_in_one_line_and_is_tried_again_when_it_is_written_anew(
    node: Node, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:60_000])
    node.write("chat_r0.json", launch(broken))

    replica = await node.until_state("chat_r0", ReplicaState.FAILED)
    assert replica.message.startswith(f"{broken} cannot be loaded: ")
    assert "\n" not in replica.message

    write_atomically(broken, model.read_bytes())
    await node.until_state("chat_r0", ReplicaState.READY)


async def test_an_engine_that_fails_five_times_in_a_row_is_left_alone(tmp_path: Path, model: Path) -> None:
    engine = script(tmp_path / "engine", 'case "$1" in --help) exit 0;; esac; echo "CUDA error: no kernel image"; exit 1')
    async with running(tmp_path / "runtime", engine=str(engine)) as node:
        node.write("chat_r0.json", launch(model))

        replica = await node.until_state("chat_r0", ReplicaState.FAILED)

        assert replica.message == "failed 5 times in a row: CUDA error: no kernel image"
        assert replica.restarts == 4


async def test_a_port_that_is_taken_costs_nothing_but_another_port(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    ports = [taken.sockets[0].getsockname()[1]]
    monkeypatch.setattr(engine_start, "free_port", lambda: ports.pop() if ports else engine.free_port())
    async with taken, running(tmp_path / "runtime") as node:
        node.write("chat_r0.json", launch(model))
        replica = await node.until_state("chat_r0", ReplicaState.READY)

        assert ports == []
        assert replica.restarts == 0


async def test_without_an_engine_the_replica_says_how_to_get_one(tmp_path: Path, model: Path) -> None:
    async with running(tmp_path / "runtime", engine="/nowhere/llama-server") as node:
        node.write("chat_r0.json", launch(model))
        replica = await node.until_state("chat_r0", ReplicaState.PENDING)
        await node.until(lambda: replica.message)

        assert replica.message == "LLORCH_ENGINE=/nowhere/llama-server — must be an executable llama-server"


# ---- asked by the assignment side


async def test_drain_waits_for_the_requests_and_stop_leaves_nothing(node: Node, model: Path) -> None:
    node.write("chat_chat-x7k2p.json", launch(model) | {"origin": "assigned", "replica_id": "chat-x7k2p"})
    replica = await node.until_state("chat-x7k2p", ReplicaState.READY)
    pid, lease = replica.pid, node.replicas.lease(replica)
    assert lease is not None

    assert await node.engines.drain("chat-x7k2p", 0.1) is False
    assert replica.state is ReplicaState.DRAINING
    draining = asyncio.create_task(node.engines.drain("chat-x7k2p", SOON_S))
    node.replicas.release(replica, lease)
    assert await draining is True
    assert alive(pid)

    await node.engines.stop("chat-x7k2p")
    assert node.replicas.get("chat-x7k2p") is None
    assert await gone(pid, 0)
    assert list(node.directory.iterdir()) == []


async def test_a_drain_may_be_taken_back(node: Node, model: Path) -> None:
    node.write("chat_r0.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    await node.engines.drain("chat_r0", 1)

    node.engines.resume("chat_r0")

    assert replica.state is ReplicaState.READY
    assert node.replicas.lease(replica) is not None


async def test_what_was_stopped_and_has_a_file_of_its_user_s_stays_stopped_until_the_file_changes(
    node: Node, model: Path
) -> None:
    node.write("chat_r0.json", launch(model))
    await node.until_state("chat_r0", ReplicaState.READY)

    await node.engines.stop("chat_r0")
    await asyncio.sleep(0.7)
    assert node.replicas.get("chat_r0") is None

    node.write("chat_r0.json", launch(model, slots=1))
    await node.until_state("chat_r0", ReplicaState.READY)


async def test_closing_ends_all_engines_at_once_and_within_five_seconds_even_busy_ones(tmp_path: Path, model: Path) -> None:
    async with running(tmp_path / "runtime") as node, aiohttp.ClientSession() as session:
        for number in range(3):
            node.write(f"{number}.json", launch(model, f"r{number}", context_tokens=8192))
        replicas = [await node.until_state(f"chat_r{number}", ReplicaState.READY) for number in range(3)]
        pids = [replica.pid for replica in replicas]
        streams = [
            await session.post(f"{each.base_url}/v1/completions", json={"prompt": "a", "max_tokens": 8000, "stream": True})
            for each in replicas
        ]
        started = time.monotonic()

        await node.engines.close()

        assert time.monotonic() - started < 5
        assert not any(alive(pid) for pid in pids)
        assert len(node.replicas) == 0
        for stream in streams:
            stream.close()


async def test_an_engine_that_hangs_is_replaced(node: Node, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "HEALTH_INTERVAL_S", 0.1)
    monkeypatch.setattr(engine_probe, "PROBE_S", 0.2)
    node.write("chat_r0.json", launch(model))
    replica = await node.until_state("chat_r0", ReplicaState.READY)
    pid = replica.pid

    os.kill(pid, signal.SIGSTOP)

    await node.until(lambda: "failed 3 health checks: nothing within 0.2 s" in replica.message)
    await node.until_state("chat_r0", ReplicaState.READY)
    assert await gone(pid, 0)
