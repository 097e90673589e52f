"""A whole agent under test: real engine, real store, the operator played by the test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llorch_agent.app import Agent
from llorch_agent.settings import AgentSettings
from llorch_api import AssignedDevice, AssignedModel, Assignment, Desired, GPUNode, ReplicaState
from llorch_store import Key, NotFound, Store

NODE = Key("", "gpu-1")
SOON_S = 15.0


def settings(root: Path, **more: Any) -> AgentSettings:
    """Settings of an agent whose files are under `root`."""
    fields: dict[str, Any] = {
        "node_id": NODE.name,
        "store": "memory:",
        "runtime_dir": root / "engines",
        "model_dir": root / "models",
        "watch_interval_ms": 500,
        "heartbeat_interval_secs": 1,
        "devices": "cpu",
        "drain_secs": 5,
        "engine": os.environ.get("LLORCH_ENGINE") or None,
    }
    return AgentSettings(**{**fields, **more})


def assignment(model: Path | str, desired: Desired = Desired.RUN, sha256: str = "", **more: Any) -> Assignment:
    """What the operator writes for one replica of the pool `chat`."""
    source = f"file:{model}" if isinstance(model, Path) else model
    fields: dict[str, Any] = {
        "desired": desired,
        "pool": "chat",
        "namespace": "default",
        "revision": "rev-1",
        "model": AssignedModel(source=source, sha256=sha256, digest="", size_mib=1),
        "devices": {"cpu": AssignedDevice(vram_mib=128)},
        "slots": 2,
        "context_tokens": 256,
        "drain_deadline_seconds": 5,
    }
    return Assignment(**{**fields, **more})


class Node:
    """The agent, and the store through which the test speaks to it."""

    def __init__(self, agent: Agent, store: Store, root: Path) -> None:
        self.agent = agent
        self.store = store
        self.root = root

    @property
    def files(self) -> list[str]:
        """Names of the handoff files."""
        return sorted(path.name for path in (self.root / "engines").glob("*.json"))

    async def assign(self, replicas: Mapping[str, Assignment | None]) -> None:
        """Writes assignments as the operator does; None removes one."""
        patch = {name: wanted.to_json() if wanted else None for name, wanted in replicas.items()}
        await self.until(lambda _: True)
        await self.store.patch(GPUNode, NODE, {"spec": {"replicas": patch}}, field_manager="llorch-operator")

    async def until(self, condition: Callable[[GPUNode], object], within_s: float = SOON_S) -> GPUNode:
        """The node as soon as the store's copy of it satisfies `condition`."""
        node: GPUNode | None = None
        try:
            async with asyncio.timeout(within_s):
                while True:
                    try:
                        node = await self.store.get(GPUNode, NODE)
                    except NotFound:
                        node = None
                    if node is not None and condition(node):
                        return node
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"after {within_s} s: {node.status.to_json() if node else 'no node'}")

    async def until_state(self, replica: str, state: ReplicaState, within_s: float = SOON_S) -> GPUNode:
        """The node once it reports that state."""
        return await self.until(
            lambda node: replica in node.status.replicas and node.status.replicas[replica].state is state, within_s
        )

    async def until_gone(self, replica: str) -> GPUNode:
        """The node once it does not report the replica any more."""
        return await self.until(lambda node: replica not in node.status.replicas)


@asynccontextmanager
async def running(root: Path, store: Store, /, **more: Any) -> AsyncIterator[Node]:
    """An agent at work while the context lasts."""
    agent = Agent(settings(root, **more), store)
    await agent.start()
    try:
        yield Node(agent, store, root)
    finally:
        await agent.stop()
