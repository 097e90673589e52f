"""The operator about devices: held by other pods, in use by strangers, and models whose need nobody knows."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fixtures.simulated_agent import SimulatedAgent
from fixtures.sparse_gguf import header_of
from llorch_api import GPUNode, GPUPool
from llorch_model.core.measured import measurement_key
from llorch_model.tiny import write_tiny
from llorch_operator.app import Operator
from llorch_operator.core.revision import engine_arguments
from llorch_operator.settings import OperatorSettings
from llorch_store import Key, Store
from llorch_store.memory import MemoryStore

pytestmark = pytest.mark.functional

CHAT = Key("default", "chat")
GPU = "GPU-a-0"


class Told:
    """Events as they were told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def emit(self, about: GPUNode | GPUPool, *, warning: bool, reason: str, message: str) -> None:
        assert about.metadata.name
        assert warning or "Unmanaged" not in reason
        self.events.append((reason, message))

    def of(self, *reasons: str) -> list[tuple[str, str]]:
        return [event for event in self.events if event[0] in reasons]


@asynccontextmanager
async def one_node() -> AsyncIterator[tuple[Store, SimulatedAgent, Told]]:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(MemoryStore())
        agent = await stack.enter_async_context(SimulatedAgent(store, "a"))
        told = Told()
        task = asyncio.create_task(Operator(store, OperatorSettings(), events=told).run())
        try:
            yield store, agent, told
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def a_pool(source: Path, **engine: Any) -> GPUPool:
    spec = {"model": {"source": f"file:{source}"}, "engine": engine}
    return GPUPool.model_validate({"metadata": {"name": "chat", "namespace": "default"}, "spec": spec})


async def until(store: Store, check: Callable[[GPUPool], object]) -> GPUPool:
    async with asyncio.timeout(8):
        while True:
            if check(pool := await store.get(GPUPool, CHAT)):
                return pool
            await asyncio.sleep(0.05)


async def until_node(store: Store, check: Callable[[GPUNode], object]) -> GPUNode:
    async with asyncio.timeout(8):
        while True:
            if check(node := await store.get(GPUNode, Key("", "a"))):
                return node
            await asyncio.sleep(0.05)


def explained(node: GPUNode) -> str:
    return next((each.status.value for each in node.status.conditions if each.type == "MemoryExplained"), "")


def placed(pool: GPUPool) -> str:
    return next((each.message for each in pool.status.conditions if each.type == "Placed"), "")


async def test_memory_that_no_pod_explains_is_told_when_it_comes_and_when_it_goes_and_not_in_between() -> None:
    async with one_node() as (store, agent, told):
        await until_node(store, lambda node: explained(node) == "True")
        agent.shows[GPU] = {"foreignMiB": 2_048}
        await until_node(store, lambda node: explained(node) == "False")
        agent.shows[GPU] = {"foreignMiB": 9_024}
        await until_node(store, lambda node: node.status.devices[GPU].foreign_mib == 9_024)
        await asyncio.sleep(0.5)
        agent.shows[GPU] = {"foreignMiB": 0}
        await until_node(store, lambda node: explained(node) == "True")
        await asyncio.sleep(0.3)
    assert told.of("UnmanagedMemory", "MemoryExplained") == [
        ("UnmanagedMemory", f"a: 2,048 MiB on {GPU} in use that no pod explains"),
        ("MemoryExplained", "a: all device memory in use is explained again"),
    ]


async def test_a_gpu_that_another_pod_holds_gets_a_replica_only_once_it_is_free(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf")
    async with one_node() as (store, agent, _):
        agent.shows[GPU] = {"heldBy": "ml/trainer-0"}
        await until_node(store, lambda node: node.status.devices and node.status.devices[GPU].held_by)
        await store.apply(a_pool(tmp_path / "m.gguf"), field_manager="kubectl")
        pool = await until(store, lambda pool: "held by another pod" in placed(pool))
        assert placed(pool).endswith("a: 1 of 1 devices match, held by another pod: ml/trainer-0")
        agent.shows[GPU] = {"heldBy": ""}
        await until(store, lambda pool: pool.status.ready == 1)


def latent_attention(path: Path) -> None:
    """A model file whose header does not decide its memory need."""
    header, size = header_of("llama3-8b")
    # The same length, so that nothing else in the header moves.
    header = header.replace(b"llama.vocab_size", b"llama.ssm.sizeee")
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(size)


async def test_a_model_whose_need_nobody_knows_waits_for_a_figure(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    latent_attention(source)
    async with one_node() as (store, _, _):
        await store.apply(a_pool(source), field_manager="kubectl")
        pool = await until(store, lambda pool: "engine.vramMiB" in placed(pool))
        assert "a: llama keeps recurrent state" in placed(pool)
        assert pool.status.reason == "DoesNotFit"
        await store.patch(GPUPool, CHAT, {"spec": {"engine": {"vramMiB": 9_000}}}, field_manager="kubectl")
        await until(store, lambda pool: pool.status.ready == 1)
        node = await store.get(GPUNode, Key("", "a"))
        assert [each.devices[GPU].vram_mib for each in node.spec.replicas.values()] == [9_000]


async def test_what_llama_fit_params_says_places_it_with_the_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tools = tmp_path / "m.gguf", tmp_path / "tools"
    latent_attention(source)
    tools.mkdir()
    (tools / "llama-fit-params").write_text("#!/bin/sh\necho 'CUDA0 4403 2048 258'\necho 'Host 282 0 40'\n")
    (tools / "llama-fit-params").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    async with one_node() as (store, _, _):
        await store.apply(a_pool(source), field_manager="kubectl")
        pool = await until(store, lambda pool: pool.status.ready == 1)
        assert pool.status.model is not None
        assert pool.status.model.vram_mib == 6_709
        node = await store.get(GPUNode, Key("", "a"))
        assert [each.devices[GPU].vram_mib for each in node.spec.replicas.values()] == [6_709 + 512]


async def test_what_an_agent_measured_places_the_next_replica(tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    latent_attention(source)
    async with one_node() as (store, agent, _):
        await store.apply(a_pool(source), field_manager="kubectl")
        pool = await until(store, lambda pool: "engine.vramMiB" in placed(pool))
        assert pool.status.model is not None
        key = measurement_key(
            pool.status.model.digest, slots=4, context_tokens=4096, engine_args=engine_arguments("f16", []), devices=1
        )
        agent.measured = {key: 7_000}
        await until(store, lambda pool: pool.status.ready == 1)
        node = await store.get(GPUNode, Key("", "a"))
        assert [each.devices[GPU].vram_mib for each in node.spec.replicas.values()] == [7_256]
