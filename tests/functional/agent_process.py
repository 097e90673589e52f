"""`llorch agent` as a process under test, and the store that it publishes to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent_node import NODE
from programs import free_port

from llorch_api import GPUNode
from llorch_store import NotFound, Store
from llorch_store.factory import open_store


def environment(root: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("POOL_MANAGERD_", "KUBERNETES_"))}
    return {
        **inherited,
        "POOL_MANAGERD_NODE_ID": NODE.name,
        "POOL_MANAGERD_ADDR": f"127.0.0.1:{free_port()}",
        "POOL_MANAGERD_RUNTIME_DIR": str(root / "engines"),
        "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS": "1",
        "LLORCH_MODEL_DIR": str(root / "models"),
        "LLORCH_STORE": f"sqlite:{root}/llorch.db",
        "LLORCH_DEVICES": "cpu",
        **more,
    }


class Process:
    """A running agent, and the store that it publishes to."""

    def __init__(self, process: asyncio.subprocess.Process, env: dict[str, str], store: Store) -> None:
        self.process = process
        self.url = f"http://{env['POOL_MANAGERD_ADDR']}"
        self.store = store

    async def until(self, condition: Any, within_s: float = 15.0) -> GPUNode:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    node = await self.store.get(GPUNode, NODE)
                    if condition(node):
                        return node
                except NotFound:
                    pass
                assert self.process.returncode is None, "the agent ended"
                await asyncio.sleep(0.02)

    async def end(self, number: signal.Signals = signal.SIGTERM, within_s: float = 10.0) -> tuple[int, float]:
        """Its exit code and the seconds it took."""
        began = time.monotonic()
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(within_s):
            code = await self.process.wait()
        return code, time.monotonic() - began


@asynccontextmanager
async def running(root: Path, **more: str) -> AsyncIterator[Process]:
    env = environment(root, **more)
    async with open_store(env["LLORCH_STORE"]) as store:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "llorch_agent", env=env)
        agent = Process(process, env, store)
        try:
            yield agent
        finally:
            await agent.end()
