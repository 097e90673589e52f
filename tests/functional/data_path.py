"""The data path under test: a real llama-server, a front door on a hand-made table of replicas, a gateway over a store."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import uvloop

from llorch_agent.core.engine_args import command_line
from llorch_agent.core.handoff import Launch
from llorch_agent.core.slots import SlotTable
from llorch_agent.engine import free_port
from llorch_agent.engine_binary import find_engine
from llorch_agent.frontdoor import FrontDoor
from llorch_agent.replicas import Replica, Replicas
from llorch_api import GPUPool, ReplicaOrigin, ReplicaState
from llorch_gateway.app import Gateway
from llorch_gateway.settings import GatewaySettings
from llorch_store import Key, Store
from llorch_store.memory import MemoryStore
from llorch_web.application import application
from llorch_web.auth import Tokens
from llorch_web.server import Server

ENGINE = os.environ.get("LLORCH_ENGINE", "")
SOON_S = 15.0
"""More than anything here takes on a busy machine; what must be faster is measured."""
SLOTS = 4


async def until(condition: Callable[[], bool], within: float = SOON_S) -> float:
    """Waits for `condition` and returns the seconds that it took."""
    started = time.monotonic()
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - conditions are of many kinds, and of other processes
            await asyncio.sleep(0.002)
    return time.monotonic() - started


class Engine:
    """A llama-server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def gauge(self, name: str) -> int:
        """One of the engine's own figures, for example requests_processing."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as answer:
            found = re.search(rf"^llamacpp:{name} (\S+)$", await answer.text(), re.MULTILINE)
            assert found is not None
            return int(float(found[1]))

    async def until_idle(self, within: float = SOON_S) -> None:
        async with asyncio.timeout(within):
            while await self.gauge("requests_processing") + await self.gauge("requests_deferred"):  # noqa: ASYNC110 - an engine has no event
                await asyncio.sleep(0.02)


@asynccontextmanager
async def engine(model: Path, *, slots: int = SLOTS, context: int = 4096, args: Sequence[str] = ()) -> AsyncIterator[Engine]:
    """A llama-server that is up."""
    command, port = await find_engine(ENGINE), free_port()
    asked = Launch(
        pool="engines-own-name", replica="r0", model_path=str(model), slots=slots, context_tokens=context, engine_args=tuple(args)
    )
    process = await asyncio.create_subprocess_exec(
        *command.argv,
        *command_line(asked, port, command.flags),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    running = Engine(process, f"http://127.0.0.1:{port}")
    try:
        async with asyncio.timeout(SOON_S), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"{running.url}/health") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientConnectionError:
                    assert process.returncode is None, "the engine did not start"
                await asyncio.sleep(0.02)
        yield running
    finally:
        await running.kill()


def ready_replica(name: str, url: str, *, pool: str = "chat", slots: int = SLOTS) -> Replica:
    return Replica(
        id=name, pool=pool, origin=ReplicaOrigin.ASSIGNED, base_url=url, slots=SlotTable(slots), state=ReplicaState.READY
    )


@dataclass
class Agent:
    """A front door that listens."""

    replicas: Replicas
    door: FrontDoor
    server: Server

    @property
    def url(self) -> str:
        return self.server.url

    def replica(self, name: str) -> Replica:
        found = self.replicas.get(name)
        assert found is not None
        return found


@asynccontextmanager
async def agent(*replicas: Replica, token: str | None = None, **options: Any) -> AsyncIterator[Agent]:
    """A front door with these replicas."""
    table = Replicas()
    for each in replicas:
        table.put(each)
    door = FrontDoor(table, node_id="node", **options)
    app = application(door.routes(), tokens=Tokens(token))
    server = Server(app, "127.0.0.1:0", variable="POOL_MANAGERD_ADDR")
    await server.start()
    try:
        yield Agent(table, door, server)
    finally:
        await door.shutdown(0)
        await server.stop(1)


class ChildAgent:
    """A front door in a process of its own, which can be frozen and killed."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def child_agent(name: str, engine_url: str, *, slots: int = SLOTS) -> AsyncIterator[ChildAgent]:
    """An agent with one replica in a child process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, name, engine_url, str(slots), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    child = ChildAgent(process, "")
    try:
        async with asyncio.timeout(SOON_S):
            child.url = (await process.stdout.readline()).decode().strip()
        yield child
    finally:
        await child.kill()


async def _serve_as_child(name: str, engine_url: str, slots: int) -> None:
    async with agent(ready_replica(name, engine_url, slots=slots)) as running:
        print(running.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def publish(
    store: Store, name: str, endpoints: dict[str, str], *, aliases: Sequence[str] = (), slots: int = SLOTS, **status: Any
) -> None:
    """A pool in the store, as an operator would leave it: replica -> agent's base URL."""
    spec = {"model": {"source": "file:/m.gguf", "aliases": list(aliases)}, "replicas": max(1, len(endpoints))}
    made = GPUPool.model_validate({"metadata": {"name": name, "namespace": "default"}, "spec": spec})
    await store.apply(made, field_manager="test")
    urls = {
        replica: {"node": "n", "url": f"{base}/replicas/{replica}", "state": "Ready", "slotsTotal": slots}
        for replica, base in endpoints.items()
    }
    await store.patch_status(GPUPool, Key("default", name), {"endpoints": urls, **status}, field_manager="test")


@dataclass
class Front:
    """A gateway that listens."""

    store: MemoryStore
    gateway: Gateway
    server: Server
    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession

    async def pool(
        self, name: str, endpoints: dict[str, str], *, aliases: Sequence[str] = (), slots: int = SLOTS, **status: Any
    ) -> None:
        """A pool with `endpoints`: replica -> agent's base URL. Returns once the gateway knows it."""
        await publish(self.store, name, endpoints, aliases=aliases, slots=slots, **status)
        table = self.gateway._view

        def known() -> bool:
            found = table.table.resolve(name)
            return found is not None and {each.replica for each in found.endpoints} == set(endpoints)

        await until(known)

    def alive(self) -> int:
        """Agents that the gateway takes for alive."""
        return int(self.metric("llorch_gateway_agents", state="alive"))

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series, 0 where there is none yet."""
        return self.gateway.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[Front]:
    """A gateway over an empty store."""
    store = MemoryStore()
    made = Gateway(store, GatewaySettings(**settings))
    server = Server(
        application(made.routes(), registries=[made.registry], health=made.health), "127.0.0.1:0", variable="LLORCH_GATEWAY_ADDR"
    )
    await server.start()
    await made.start()
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)
    try:
        async with client, aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as http:
            await until(lambda: made.health() == "")
            yield Front(store, made, server, client, http)
    finally:
        await server.stop(1)
        await made.stop()


def chat(model: str = "chat", *, tokens: int = 8, words: int = 3, **more: Any) -> dict[str, Any]:
    """The body of a chat request whose prompt has about four tokens per word."""
    return {"model": model, "messages": [{"role": "user", "content": "word " * words}], "max_tokens": tokens, **more}


async def events(answer: aiohttp.ClientResponse) -> list[Any]:
    """All events of a stream, parsed; [DONE] as the string."""
    found: list[Any] = []
    async for line in answer.content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found


if __name__ == "__main__":
    uvloop.run(_serve_as_child(sys.argv[1], sys.argv[2], int(sys.argv[3])))
