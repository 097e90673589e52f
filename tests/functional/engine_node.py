"""A node's engines under test: real handoff files, real llama-servers. LLORCH_ENGINE chooses the engine, else it is found."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch_agent.core.adoption import Health
from llorch_agent.core.engine_args import command_line
from llorch_agent.core.handoff import Launch
from llorch_agent.core.supervision import Limits
from llorch_agent.engine import free_port
from llorch_agent.engine_binary import find_engine
from llorch_agent.engine_probe import EngineProbe
from llorch_agent.engines import Engines, EngineSettings
from llorch_agent.handoff import write_atomically
from llorch_agent.processes import all_processes, stat_of
from llorch_agent.replicas import Replica, Replicas
from llorch_api import ReplicaState

ENGINE = os.environ.get("LLORCH_ENGINE", "")
SOON_S = 10.0
"""More than anything here takes on a busy machine; what must be faster is measured."""
QUICK = EngineSettings(engine=ENGINE, interval_s=0.5, limits=Limits(initial_s=0.2, min_s=0.01, max_s=0.2))


class Node:
    """The engines of one node under test."""

    def __init__(self, root: Path, settings: EngineSettings) -> None:
        self.directory = root / "engines"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.state = root
        self.replicas = Replicas()
        self.engines = Engines(self.replicas, self.directory, settings)

    def write(self, name: str, content: dict[str, Any] | bytes) -> None:
        write_atomically(self.directory / name, content if isinstance(content, bytes) else json.dumps(content).encode())

    async def until(self, condition: Callable[[], object], within_s: float = SOON_S) -> None:
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    await self.replicas.wait_beyond(self.replicas.version)
        except TimeoutError:
            pytest.fail(f"after {within_s} s: {[(each.id, each.state.value, each.message) for each in self.replicas]}")

    async def until_state(self, replica_id: str, state: ReplicaState, within_s: float = SOON_S) -> Replica:
        def reached() -> bool:
            replica = self.replicas.get(replica_id)
            return replica is not None and replica.state is state

        await self.until(reached, within_s)
        replica = self.replicas.get(replica_id)
        assert replica is not None
        return replica

    async def until_gone(self, replica_id: str, within_s: float = SOON_S) -> None:
        await self.until(lambda: self.replicas.get(replica_id) is None, within_s)


@asynccontextmanager
async def running(root: Path, engine: str = ENGINE) -> AsyncIterator[Node]:
    """The engines of a node while the context lasts."""
    node = Node(root, replace(QUICK, engine=engine))
    async with asyncio.TaskGroup() as group:
        group.create_task(node.engines.run())
        try:
            yield node
        finally:
            await node.engines.close()


def launch(model: Path, replica: str = "r0", **more: Any) -> dict[str, Any]:
    """A handoff file that asks for an engine."""
    return {"pool_id": "chat", "replica_id": replica, "model": {"path": str(model)}, "slots": 2, "context_tokens": 256} | more


def alive(pid: int) -> bool:
    """True unless it is gone or a zombie."""
    found = stat_of(pid)
    return found is not None and found.alive


async def gone(pid: int, within_s: float = SOON_S) -> bool:
    """True as soon as it is gone."""
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody tells us about other people's processes
        await asyncio.sleep(0.02)
    return not alive(pid)


@asynccontextmanager
async def foreign_engine(model: Path, port: int = 0, slots: int = 2) -> AsyncIterator[tuple[int, str]]:
    """Pid and url of an engine that somebody else started and that is up."""
    port = port or free_port()
    command = await find_engine(ENGINE)
    asked = Launch(pool="foreign", replica="r0", model_path=str(model), slots=slots, context_tokens=256)
    process = await asyncio.create_subprocess_exec(
        *command.argv,
        *command_line(asked, port, command.flags),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    probe, url = EngineProbe(), f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(SOON_S):
            while (await probe.ask(url)).health is not Health.UP:  # noqa: ASYNC110 - an engine has no event
                await asyncio.sleep(0.02)
        yield process.pid, url
    finally:
        await probe.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def tokens(url: str, count: int = 4) -> int:
    """Tokens that the engine at `url` generated when asked for `count`."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": count}) as response,
    ):
        return int((await response.json())["usage"]["completion_tokens"])


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def processes_named(word: str) -> list[int]:
    """Living processes with `word` in their command line."""
    found = []
    for process in all_processes():
        try:
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
        if process.alive and word.encode() in line:
            found.append(process.pid)
    return found
