"""The operator on a store, with agents that beat in real time: what it places, what it says, and what it does when nodes die."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.simulated_agent import SimulatedAgent
from llorch_api import GPUNode, GPUPool
from llorch_model.tiny import write_tiny
from llorch_operator.app import Operator
from llorch_operator.core.liveness import Timing
from llorch_operator.settings import OperatorSettings
from llorch_store import Key, NotFound, Store, Unavailable
from llorch_store.memory import MemoryStore

pytestmark = pytest.mark.functional

TIMING = Timing(node_timeout=1.2, suspect_intervals=0.8, grace=1.0)
CHAT = Key("default", "chat")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    write_tiny(path)
    return path


@asynccontextmanager
async def an_operator(store: Store, timing: Timing = TIMING) -> AsyncIterator[Operator]:
    operator = Operator(store, OperatorSettings.model_validate({"load_deadline_secs": 60}))
    operator.fleet.tracker.timing = timing
    task = asyncio.create_task(operator.run())
    try:
        yield operator
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def fleet(*names: str, **options: Any) -> AsyncIterator[tuple[Store, dict[str, SimulatedAgent], Operator]]:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(MemoryStore())
        agents = {name: await stack.enter_async_context(SimulatedAgent(store, name, **options)) for name in names}
        operator = await stack.enter_async_context(an_operator(store))
        yield store, agents, operator


def a_pool(source: str, **spec: Any) -> GPUPool:
    body = {"model": {"source": source}, **spec}
    return GPUPool.model_validate({"metadata": {"name": "chat", "namespace": "default"}, "spec": body})


async def until(store: Store, check: Callable[[GPUPool], object], seconds: float = 8.0) -> GPUPool:
    """The pool, once `check` holds of it."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        pool = await store.get(GPUPool, CHAT)
        if check(pool):
            return pool
        assert asyncio.get_running_loop().time() < end, pool.status
        await asyncio.sleep(0.05)


async def assignments(store: Store) -> dict[str, list[str]]:
    nodes = (await store.list(GPUNode)).items
    return {node.metadata.name: sorted(node.spec.replicas) for node in nodes}


async def test_an_applied_pool_is_resolved_placed_and_ready(model: Path) -> None:
    async with fleet("a", "b") as (store, _, _):
        await store.apply(a_pool(f"file:{model}", replicas=2), field_manager="test")
        pool = await until(store, lambda pool: pool.status.ready == 2)
        assert pool.status.model is not None
        assert pool.status.model.shape.architecture == "llama"
        assert {endpoint.node for endpoint in pool.status.endpoints.values()} == {"a", "b"}
        assert (pool.status.reason, pool.status.slots_total, pool.status.observed_generation) == ("AllReady", 8, 1)


async def test_a_quiet_fleet_costs_no_write(model: Path) -> None:
    async with fleet("a", "b") as (store, _, operator):
        await store.apply(a_pool(f"file:{model}"), field_manager="test")
        await until(store, lambda pool: pool.status.ready == 1)
        await asyncio.sleep(1.5)
        assert operator.fleet.writes >= 4  # two nodes, an assignment and the pool: each kind of write is counted
        before = (operator.fleet.writes, (await store.get(GPUPool, CHAT)).metadata.resource_version)
        await asyncio.sleep(2)
        assert (operator.fleet.writes, (await store.get(GPUPool, CHAT)).metadata.resource_version) == before


async def test_a_dead_nodes_replica_leaves_routing_when_offline_and_is_placed_elsewhere_when_lost(model: Path) -> None:
    async with fleet("a", "b", "c") as (store, agents, _):
        await store.apply(a_pool(f"file:{model}", replicas=2), field_manager="test")
        pool = await until(store, lambda pool: pool.status.ready == 2)
        victim = min(endpoint.node for endpoint in pool.status.endpoints.values())
        survivors = set(pool.status.endpoints) - {rid for rid, e in pool.status.endpoints.items() if e.node == victim}
        agents[victim].silent = True

        offline = await until(store, lambda pool: set(pool.status.endpoints) == survivors)
        assert offline.status.current == 2
        healed = await until(store, lambda pool: pool.status.ready == 2)
        assert victim not in {endpoint.node for endpoint in healed.status.endpoints.values()}
        assert (await store.get(GPUNode, Key("", victim))).status.phase == "Lost"

        agents[victim].silent = False
        await asyncio.sleep(1.0)
        back = await store.get(GPUNode, Key("", victim))
        assert (back.status.phase, back.spec.replicas) == ("Online", {})
        assert sum(len(ids) for ids in (await assignments(store)).values()) == 2


async def test_a_pool_with_nothing_left_gets_an_extra_replica_as_soon_as_its_node_is_offline(model: Path) -> None:
    # given a grace so long that no node is Lost within the test
    patient = replace(TIMING, grace=600.0)
    async with (
        MemoryStore() as store,
        SimulatedAgent(store, "a") as a,
        SimulatedAgent(store, "b") as b,
        an_operator(store, patient),
    ):
        await store.apply(a_pool(f"file:{model}"), field_manager="test")
        pool = await until(store, lambda pool: pool.status.ready == 1)
        (only,) = pool.status.endpoints.values()
        {"a": a, "b": b}[only.node].silent = True
        moved = await until(store, lambda pool: {e.node for e in pool.status.endpoints.values()} == {"a", "b"} - {only.node})
        assert moved.status.ready == 1
        assert (await store.get(GPUNode, Key("", only.node))).status.phase == "Offline"


async def test_a_failed_replica_is_tried_on_another_node_and_its_message_is_kept_when_there_is_none(model: Path) -> None:
    async with fleet("a", "b") as (store, agents, _):
        agents["a"].fails["chat"] = agents["b"].fails["chat"] = "CUDA error: out of memory"
        await store.apply(a_pool(f"file:{model}"), field_manager="test")
        pool = await until(store, lambda pool: pool.status.reason == "DoesNotFit")
        messages = {item.type: item.message for item in pool.status.conditions}
        assert "CUDA error: out of memory" in messages["Available"]
        assert "this revision failed here within the last 10 minutes" in messages["Placed"]


async def test_a_pool_that_fits_nowhere_says_for_each_node_what_it_needs_and_what_is_free(model: Path) -> None:
    async with fleet("a", "b", vram_mib=600) as (store, _, _):
        await store.apply(a_pool(f"file:{model}", contextTokens=1 << 20), field_manager="test")
        pool = await until(store, lambda pool: pool.status.reason == "DoesNotFit")
        message = next(item.message for item in pool.status.conditions if item.type == "Placed")
        assert "a: needs " in message
        assert "b: needs " in message
        assert "MiB, 600 free of 600" in message


async def test_a_missing_file_and_a_broken_one_are_told_apart(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    async with fleet("a") as (store, _, _):
        await store.apply(a_pool(f"file:{tmp_path}/nowhere.gguf"), field_manager="test")
        pool = await until(store, lambda pool: pool.status.reason == "ModelNotAvailable")
        assert "nowhere.gguf: no such file" in next(item.message for item in pool.status.conditions if item.type == "Placed")
        await store.apply(a_pool(f"file:{broken}"), field_manager="test")
        pool = await until(store, lambda pool: pool.status.reason == "BadModel")
        assert "broken.gguf" in next(item.message for item in pool.status.conditions if item.type == "Placed")


async def test_a_new_revision_replaces_the_old_one_without_a_gap(model: Path) -> None:
    async with fleet("a") as (store, _, _):
        await store.apply(a_pool(f"file:{model}"), field_manager="test")
        first = await until(store, lambda pool: pool.status.ready == 1)
        await store.apply(a_pool(f"file:{model}", slots=2), field_manager="test")
        served = []

        def done(pool: GPUPool) -> bool:
            served.append(pool.status.ready)
            return pool.status.ready == 1 and not set(pool.status.endpoints) & set(first.status.endpoints)

        second = await until(store, done)
        assert min(served) >= 1
        assert second.status.slots_total == 2
        await asyncio.sleep(0.6)
        assert sum(len(ids) for ids in (await assignments(store)).values()) == 1


async def test_scaling_and_deleting_end_the_replicas(model: Path) -> None:
    async with fleet("a", "b") as (store, _, _):
        await store.apply(a_pool(f"file:{model}", replicas=3), field_manager="test")
        await until(store, lambda pool: pool.status.ready == 3)
        await store.patch(GPUPool, CHAT, {"spec": {"replicas": 1}}, field_manager="test")
        await until(store, lambda pool: pool.status.ready == 1 and pool.status.current == 1)
        await store.delete(GPUPool, CHAT)
        for _ in range(100):
            if not any((await assignments(store)).values()):
                break
            await asyncio.sleep(0.05)
        assert not any((await assignments(store)).values())
        with pytest.raises(NotFound):
            await store.get(GPUPool, CHAT)


async def test_a_restarted_operator_keeps_what_runs(model: Path) -> None:
    async with MemoryStore() as store, SimulatedAgent(store, "a"), SimulatedAgent(store, "b"):
        async with an_operator(store):
            await store.apply(a_pool(f"file:{model}", replicas=2), field_manager="test")
            await until(store, lambda pool: pool.status.ready == 2)
            before = await assignments(store)
        async with an_operator(store):
            await asyncio.sleep(1.5)
            assert await assignments(store) == before
            assert (await store.get(GPUPool, CHAT)).status.ready == 2


async def test_a_drained_node_is_emptied_and_gets_nothing_new(model: Path) -> None:
    async with fleet("a", "b") as (store, _, _):
        await store.apply(a_pool(f"file:{model}"), field_manager="test")
        pool = await until(store, lambda pool: pool.status.ready == 1)
        (only,) = pool.status.endpoints.values()
        await store.patch(GPUNode, Key("", only.node), {"spec": {"drain": {}}}, field_manager="test")
        await until(store, lambda pool: {e.node for e in pool.status.endpoints.values()} == {"a", "b"} - {only.node})
        assert (await store.get(GPUNode, Key("", only.node))).status.phase == "Draining"


class Away(MemoryStore):
    """A store that can be away: every write fails at once, as with a refused connection."""

    away = False
    failed = 0

    async def patch_status(self, *args: Any, **options: Any) -> Any:
        if self.away and options.get("field_manager") == "llorch-operator":
            self.failed += 1
            raise Unavailable("connection refused")
        return await super().patch_status(*args, **options)


async def test_a_store_that_is_away_is_asked_again_in_a_moment_and_not_in_a_hot_loop(model: Path) -> None:
    async with Away() as store, SimulatedAgent(store, "a"), an_operator(store):
        await store.apply(a_pool(f"file:{model}"), field_manager="test")
        await until(store, lambda pool: pool.status.ready == 1)
        store.away = True
        await store.patch(GPUPool, CHAT, {"spec": {"replicas": 2}}, field_manager="test")
        await asyncio.sleep(3)
        assert 1 <= store.failed <= 12
        store.away = False
        await until(store, lambda pool: pool.status.ready == 2)
