"""`llorch gateway` as a program: what it says when it cannot start, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from data_path import SOON_S, agent, chat, engine, events, publish, ready_replica

from llorch_agent.engine import free_port
from llorch_model.tiny import write_mid
from llorch_store.sqlite import SQLiteStore

pytestmark = pytest.mark.functional


@asynccontextmanager
async def program(**variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m llorch_gateway` with these variables; what it says goes to its stderr pipe."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch_gateway", env={**os.environ, **variables}, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, list[str]]:
    async with asyncio.timeout(SOON_S):
        _, said = await process.communicate()
    return process.returncode, said.decode().splitlines()


async def serving(url: str, model: str) -> None:
    """Returns once the gateway at `url` lists `model`."""
    async with asyncio.timeout(SOON_S), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.get(f"{url}/v1/models") as answer:
                    if model in await answer.text():
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.05)


async def test_a_bad_value_is_one_line_and_exit_code_2() -> None:
    async with program(LLORCH_MAX_BODY_MIB="0") as process:
        assert await ended(process) == (2, ["llorch: LLORCH_MAX_BODY_MIB=0 — must be 1 to 1024 (MiB)"])


async def test_a_taken_port_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with program(LLORCH_GATEWAY_ADDR=address, LLORCH_STORE=f"sqlite:{tmp_path / 'db'}") as process:
            code, said = await ended(process)
    assert code == 2
    assert said == [f"llorch: LLORCH_GATEWAY_ADDR={address} — the port is taken by another process; choose another or stop it"]


async def test_a_store_that_cannot_be_opened_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    async with program(LLORCH_GATEWAY_ADDR="127.0.0.1:0", LLORCH_STORE=f"sqlite:{tmp_path / 'file' / 'db'}") as process:
        code, said = await ended(process)
    assert code == 2
    assert len(said) == 1
    assert said[0].startswith("llorch: ")


async def test_asked_to_stop_it_ends_its_last_stream_and_then_itself(tmp_path: Path) -> None:
    model, store_file, port = write_mid(tmp_path / "mid.gguf"), tmp_path / "db", free_port()
    url = f"http://127.0.0.1:{port}"
    async with (
        engine(model) as running_engine,
        agent(ready_replica("a", running_engine.url)) as running,
        SQLiteStore(str(store_file)) as store,
        program(
            LLORCH_GATEWAY_ADDR=f"127.0.0.1:{port}", LLORCH_STORE=f"sqlite:{store_file}", LLORCH_LOG_FORMAT="json"
        ) as process,
        aiohttp.ClientSession() as http,
    ):
        await publish(store, "chat", {"a": running.url})
        await serving(url, "chat")
        async with http.post(f"{url}/v1/chat/completions", json=chat(tokens=200, stream=True)) as answer:
            await answer.content.readline()
            process.send_signal(signal.SIGTERM)
            assert (await events(answer))[-1] == "[DONE]"
        answered = time.monotonic()
        code, said = await ended(process)
        assert time.monotonic() - answered < 2
        assert code == 0
        assert all(json.loads(line)["component"] == "gateway" for line in said)


async def test_idle_it_ends_within_a_second(tmp_path: Path) -> None:
    port = free_port()
    async with program(LLORCH_GATEWAY_ADDR=f"127.0.0.1:{port}", LLORCH_STORE=f"sqlite:{tmp_path / 'db'}") as process:
        await serving(f"http://127.0.0.1:{port}", '"list"')
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        code, _ = await ended(process)
        assert time.monotonic() - asked < 1
        assert code == 0
