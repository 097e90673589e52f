"""A node's object is registered, kept up to date and found again, on real stores that fail now and then."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from faulty_store import FaultyStore

from llorch_agent.core.heartbeat import Heartbeat, Pace
from llorch_agent.pool_entries import PoolEntries
from llorch_agent.publisher import Publisher
from llorch_agent.replicas import Replica, Replicas
from llorch_api import (
    AgentState,
    GPUNode,
    GPUPool,
    GPUPoolSpec,
    ModelSpec,
    ObjectMeta,
    OwnerReference,
    ReplicaOrigin,
    ReplicaState,
)
from llorch_store import Key, NotFound, Unavailable
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional

NODE = Key("", "gpu-1")
POOL = Key("default", "chat")
QUICK = Pace(interval=1.0, gap=0.3, full_every=300.0)


@pytest.fixture(params=["memory:", "sqlite:{}/llorch.db"], ids=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FaultyStore]:
    async with open_store(request.param.format(tmp_path)) as opened:
        yield FaultyStore(opened)


class World:
    """What the snapshot is made of, and the publisher that writes it."""

    def __init__(self, store: FaultyStore, pace: Pace) -> None:
        self.store = store
        self.status: dict[str, Any] = {
            "agent": {"state": "Running", "bootId": "b1"},
            "node": {},
            "devices": {"cpu": {"kind": "cpu", "health": "Healthy", "vramFreeMiB": 1024}},
            "system": {},
            "replicas": {},
            "models": {},
            "summary": {"gpus": "cpu"},
        }
        self.owner: OwnerReference | None = None
        self.heartbeat = Heartbeat(pace, random.Random(1).random)
        self.publisher = Publisher(store, NODE.name, self.heartbeat, lambda: self.status, owner=lambda: self.owner)

    async def node(self) -> GPUNode:
        return await self.store.store.get(GPUNode, NODE)

    def replica(self, name: str, state: str | None) -> None:
        replicas = dict(self.status["replicas"])
        replicas.pop(name, None)
        if state is not None:
            replicas[name] = {"pool": "chat", "state": state}
        self.status = {**self.status, "replicas": replicas}
        self.publisher.poke()

    async def until(self, condition: Callable[[GPUNode], object], within_s: float = 5.0) -> GPUNode:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    node = await self.node()
                except NotFound:
                    node = None
                if node is not None and condition(node):
                    return node
                await asyncio.sleep(0.01)


@asynccontextmanager
async def publishing(store: FaultyStore, pace: Pace = QUICK) -> AsyncIterator[World]:
    world = World(store, pace)
    task = asyncio.create_task(world.publisher.run())
    try:
        yield world
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_node_is_registered_within_a_second_and_tells_everything(store: FaultyStore):
    async with publishing(store) as world:
        async with asyncio.timeout(1):
            node = await world.until(lambda node: node.status.heartbeat.sequence)
        assert node.status.devices["cpu"].vram_free_mib == 1024
        assert node.status.summary.gpus == "cpu"
        assert node.metadata.owner_references == []


async def test_it_beats_and_every_beat_is_another_token(store: FaultyStore):
    async with publishing(store) as world:
        first = await world.until(lambda node: node.status.heartbeat.sequence)
        later = await world.until(lambda node: node.status.heartbeat.sequence >= first.status.heartbeat.sequence + 2)
        assert later.status.heartbeat.interval_seconds == 1
        assert set(store.writes[-1][2]) == {"heartbeat"}


async def test_changes_of_state_are_told_at_once_and_a_flapping_one_not_every_time(store: FaultyStore):
    async with publishing(store) as world:
        await world.until(lambda node: node.status.heartbeat.sequence)
        for state in ("Pending", "Loading", "Ready"):
            world.replica("a", state)
            await world.until(lambda node, state=state: state in str(node.status.replicas.get("a")), 0.25)
        before = len(store.writes)
        for number in range(30):
            world.replica("a", ("Loading", "Pending")[number % 2])
            await asyncio.sleep(0.03)
        assert len(store.writes) - before <= 5
        world.replica("a", None)
        await world.until(lambda node: not node.status.replicas)
        assert store.most_in_flight == 1


async def test_the_operators_fields_are_left_alone(store: FaultyStore):
    async with publishing(store) as world:
        await world.until(lambda node: node.status.heartbeat.sequence)
        await store.store.patch_status(
            GPUNode, NODE, {"phase": "Online", "observedGeneration": 1}, field_manager="llorch-operator"
        )
        before = (await world.node()).status.heartbeat.sequence
        node = await world.until(lambda node: node.status.heartbeat.sequence > before)
        assert node.status.phase == "Online"


async def test_a_deleted_node_registers_again_and_tells_everything(store: FaultyStore):
    async with publishing(store) as world:
        world.replica("a", "Ready")
        first = await world.until(lambda node: node.status.replicas)
        await store.delete(GPUNode, NODE)
        again = await world.until(lambda node: node.status.replicas)
        assert again.metadata.uid != first.metadata.uid
        assert again.status.heartbeat.sequence > first.status.heartbeat.sequence


async def test_a_store_that_is_away_at_the_start_is_waited_for(store: FaultyStore):
    store.fail = Unavailable("no route to host")
    async with publishing(store) as world:
        await asyncio.sleep(0.2)
        store.fail = None
        await world.until(lambda node: node.status.heartbeat.sequence)
        assert world.publisher.outcomes["register", "error"] >= 1


async def test_a_write_whose_answer_was_lost_is_told_again_in_full(store: FaultyStore):
    async with publishing(store) as world:
        await world.until(lambda node: node.status.heartbeat.sequence)
        await asyncio.sleep(QUICK.gap)
        store.lose_answers = True
        world.replica("a", "Ready")
        await world.until(lambda node: node.status.replicas)
        world.replica("a", None)
        store.lose_answers = False
        await world.until(lambda node: not node.status.replicas)


async def test_a_store_that_says_nothing_costs_the_timeout_and_the_next_beat_comes(store: FaultyStore):
    async with publishing(store) as world:
        node = await world.until(lambda node: node.status.heartbeat.sequence)
        store.silent = True
        await asyncio.sleep(1.2)
        store.silent = False
        await world.until(lambda later: later.status.heartbeat.sequence > node.status.heartbeat.sequence + 1)


async def test_the_owner_is_written_once_it_is_known(store: FaultyStore):
    async with publishing(store) as world:
        await world.until(lambda node: node.status.heartbeat.sequence)
        world.owner = OwnerReference(api_version="v1", kind="Node", name="gpu-1", uid="n-1")
        world.publisher.register_again()
        node = await world.until(lambda node: node.metadata.owner_references)
        assert node.metadata.owner_references[0].uid == "n-1"


async def test_the_last_word_is_told_before_the_agent_ends(store: FaultyStore):
    async with publishing(store) as world:
        await world.until(lambda node: node.status.heartbeat.sequence)
        for state in (AgentState.DRAINING, AgentState.STOPPED):
            world.status = {**world.status, "agent": {"state": state.value, "bootId": "b1"}}
            assert await world.publisher.tell(state, 0.5)
            assert (await world.node()).status.agent.state is state
        store.fail = Unavailable("away")
        world.status = {**world.status, "agent": {"state": "Running", "bootId": "b1"}}
        assert not await world.publisher.tell(AgentState.RUNNING, 0.3)


# ---- the pools' entries


def pool_of(replicas: int) -> GPUPool:
    spec = GPUPoolSpec(model=ModelSpec(source="file:/m/tiny.gguf"), replicas=replicas)
    return GPUPool(metadata=ObjectMeta(name=POOL.name, namespace=POOL.namespace), spec=spec)


class Told:
    """A pool and the agent that tells it of its replicas."""

    def __init__(self, store: FaultyStore) -> None:
        self.store = store
        self.replicas = Replicas()
        self.entries = PoolEntries(store, NODE.name, self.replicas, random.Random(1))

    def put(self, name: str, state: ReplicaState, origin: ReplicaOrigin = ReplicaOrigin.ASSIGNED) -> None:
        namespace = POOL.namespace if origin is ReplicaOrigin.ASSIGNED else ""
        self.replicas.put(Replica(id=name, pool=POOL.name, namespace=namespace, origin=origin, state=state))
        self.entries.poke()

    async def until(self, condition: Callable[[GPUPool], object]) -> GPUPool:
        async with asyncio.timeout(5):
            while True:
                pool = await self.store.store.get(GPUPool, POOL)
                if condition(pool):
                    return pool
                await asyncio.sleep(0.01)


@asynccontextmanager
async def telling(store: FaultyStore, replicas: int = 2) -> AsyncIterator[Told]:
    await store.store.apply(pool_of(replicas), field_manager="user")
    told = Told(store)
    task = asyncio.create_task(told.entries.run())
    try:
        yield told
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_pool_is_told_of_its_replicas_and_of_their_end(store: FaultyStore):
    async with telling(store) as told:
        told.put("chat-a", ReplicaState.LOADING)
        pool = await told.until(lambda pool: pool.status.replicas)
        assert (pool.status.replicas["chat-a"].node, pool.status.replicas["chat-a"].state) == ("gpu-1", ReplicaState.LOADING)
        told.put("chat-a", ReplicaState.READY)
        await told.until(lambda pool: pool.status.replicas["chat-a"].state is ReplicaState.READY)
        told.replicas.remove("chat-a")
        told.entries.poke()
        await told.until(lambda pool: not pool.status.replicas)


async def test_other_nodes_entries_stay_and_own_leftovers_go(store: FaultyStore):
    async with telling(store) as told:
        entries = {"x": {"node": "gpu-2", "state": "Ready"}, "old": {"node": "gpu-1", "state": "Ready"}}
        await store.store.patch_status(GPUPool, POOL, {"replicas": entries}, field_manager="test")
        told.put("chat-a", ReplicaState.READY)
        pool = await told.until(lambda pool: "chat-a" in pool.status.replicas)
        assert set(pool.status.replicas) == {"chat-a", "x"}


async def test_a_large_pool_gets_no_entries(store: FaultyStore):
    async with telling(store, replicas=100) as told:
        await store.store.patch_status(GPUPool, POOL, {"desired": 100}, field_manager="test")
        told.put("chat-a", ReplicaState.READY)
        await asyncio.sleep(0.3)
        assert not store.writes


async def test_engines_of_handoff_files_are_not_told(store: FaultyStore):
    async with telling(store) as told:
        told.put("r0", ReplicaState.READY, ReplicaOrigin.ADOPTED)
        await asyncio.sleep(0.2)
        assert not store.writes


async def test_a_pool_that_cannot_be_told_ends_nothing_and_hears_of_the_next_transition(store: FaultyStore):
    async with telling(store) as told:
        store.fail = Unavailable("away")
        told.put("chat-a", ReplicaState.LOADING)
        await asyncio.sleep(0.1)
        store.fail = None
        told.put("chat-a", ReplicaState.READY)
        pool = await told.until(lambda pool: pool.status.replicas)
        assert pool.status.replicas["chat-a"].state is ReplicaState.READY


async def test_replicas_of_a_pool_that_is_gone_are_nobodys(store: FaultyStore):
    async with telling(store) as told:
        await store.delete(GPUPool, POOL)
        told.put("chat-a", ReplicaState.READY)
        await asyncio.sleep(0.2)
        assert not store.writes
