"""Logs of engines: bounded without losing a line, readable through the agent, and `llorch logs` from the command line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from agent_node import Node, assignment, settings

from llorch_agent import engine_log
from llorch_agent.app import Agent
from llorch_agent.engine_log import EngineLog, EngineLogs
from llorch_agent.handoff import write_atomically
from llorch_api import ReplicaState
from llorch_model.tiny import write_tiny
from llorch_store.factory import open_store
from llorch_web.application import application
from llorch_web.auth import Tokens
from llorch_web.server import Server

pytestmark = pytest.mark.functional

TOKEN = "t" * 40
LINE = 100
LLORCH = Path(sys.executable).parent / "llorch"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


def numbered(number: int) -> bytes:
    return f"{number:0{LINE - 1}d}\n".encode()


def numbers(text: bytes) -> list[int]:
    return [int(line) for line in text.splitlines()]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineLog:
    monkeypatch.setattr(engine_log, "MAX_LOG_BYTES", 64 * 1024)
    made = EngineLog(tmp_path / "logs" / "r.log")
    made.begin()
    return made


@pytest.fixture(params=["collapse", "hole", "neither"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system under the log can do: on this one all that it really can."""
    real = engine_log._fallocate
    modes = {"collapse": (8, 3), "hole": (3,), "neither": ()}[request.param]
    monkeypatch.setattr(engine_log, "_fallocate", lambda fd, mode, at, count: real(fd, mode, at, count) if mode in modes else -1)
    return str(request.param)


def test_a_log_stays_bounded_while_an_engine_writes_and_no_line_is_lost(log: EngineLog, file_system: str) -> None:
    # Given an engine that writes all the time, and a reader that follows
    written, done = 20_000, threading.Event()

    def write() -> None:
        with open(log.path, "ab", buffering=0) as engines_own:
            for number in range(written):
                engines_own.write(numbered(number))
        done.set()

    log.path.touch()
    followed, position = log.last(0)
    assert followed == b""
    writer = threading.Thread(target=write)
    writer.start()
    # When the log is rotated beside both
    read, largest = b"", 0
    while not done.is_set() or len(read) < written * LINE:
        if file_system != "neither" or done.is_set():
            log.rotate()
        piece, position = log.since(position, 1 << 20)
        read += piece
        if done.is_set() and not piece:
            break
        disk = os.stat(log.path).st_blocks * 512
        largest = max(largest, disk if file_system == "hole" else os.stat(log.path).st_size)
    writer.join()
    # Then what the reader missed was rotated away before it came to it, and the two files hold the end without a gap
    log.rotate()
    kept, _ = log.last(10_000)
    assert numbers(kept)[-1] == written - 1
    assert numbers(kept) == list(range(numbers(kept)[0], written)), "a line is missing, or is there twice"
    assert len(kept) > 64 * 1024 - LINE
    assert os.stat(log.path).st_blocks * 512 <= 72 * 1024
    assert log.older.stat().st_size <= 2 * 1024 * 1024 if file_system == "neither" else 64 * 1024
    assert log.tail(1) == [numbered(written - 1).decode().strip()]


def test_the_last_lines_reach_into_the_rotated_file(log: EngineLog, file_system: str) -> None:
    with open(log.path, "ab", buffering=0) as engines_own:
        engines_own.write(b"".join(map(numbered, range(700))))
        log.rotate()
        engines_own.write(numbered(700))

    assert numbers(log.last(300)[0]) == list(range(401, 701))
    assert numbers(log.last(1)[0]) == [700]


def test_a_follower_goes_on_over_rotation_and_restart(log: EngineLog, file_system: str) -> None:
    with open(log.path, "ab", buffering=0) as engines_own:
        engines_own.write(b"".join(map(numbered, range(700))))
        _, position = log.last(0)
        engines_own.write(numbered(700))
        if file_system != "neither":  # there the line would be in the older file by now
            log.rotate()
        new, position = log.since(position)
        assert numbers(new) == [700]
        assert log.since(position) == (b"", position)
    log.begin()
    log.path.write_bytes(numbered(1))
    new, position = log.since(position)
    assert numbers(new) == [1]
    assert log.since(position)[0] == b""


def test_logs_of_replicas_long_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_log, "KEPT_LOGS", 2)
    logs = EngineLogs(tmp_path)
    for number in range(5):
        for _ in range(2):
            logs.begin(f"r{number}").path.write_text("said\n")
        os.utime(tmp_path / f"r{number}.log", (number, number))
        if number:
            logs.ended(f"r{number}")

    logs.begin("new")

    # The newest two, and r0, which still runs.
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} >= {"r0", "r3", "r4"}
    assert not (tmp_path / "r1.log").exists()
    assert not (tmp_path / "r1.log.1").exists()
    found = logs.get("r4")
    assert found is not None
    assert found.last(10)[0] == b"said\nsaid\n", "the life before, and the last one"
    assert logs.get("../r4") is None


@asynccontextmanager
async def listening(root: Path) -> AsyncIterator[tuple[Node, Server, dict[str, str]]]:
    """An agent over HTTP with a token, and the environment in which `llorch` finds it."""
    spec = f"sqlite:{root}/llorch.db"
    root.mkdir(parents=True, exist_ok=True)
    async with open_store(spec) as store:
        agent = Agent(settings(root, store=spec), store)
        server = Server(application(agent.routes(), tokens=Tokens(TOKEN)), "127.0.0.1:0", variable="POOL_MANAGERD_ADDR")
        await server.start()
        agent.advertise(server.url)
        await agent.start()
        try:
            yield Node(agent, store, root), server, {**os.environ, "LLORCH_STORE": spec, "LLORCH_API_TOKEN": TOKEN}
        finally:
            await agent.stop()
            await server.stop(1)


async def llorch(env: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("llorch"),
        *arguments,
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(15):
        out, error = await process.communicate()
    return process.returncode or 0, out.decode(), error.decode()


async def test_the_last_lines_of_an_engine_are_had_from_its_agent_and_only_with_the_token(tmp_path: Path, model: Path) -> None:
    async with listening(tmp_path / "home") as (node, server, env):
        await node.assign({"chat-abcde": assignment(model), "chat-fghij": assignment(model, slots=1)})
        await node.until_state("chat-abcde", ReplicaState.READY)
        await node.until_state("chat-fghij", ReplicaState.READY)
        async with aiohttp.ClientSession() as http, http.get(f"{server.url}/replicas/chat-abcde/log") as answer:
            assert answer.status == 401
        async with aiohttp.ClientSession(f"{server.url}/replicas/", headers={"Authorization": f"Bearer {TOKEN}"}) as http:
            async with http.get("chat-abcde/log?lines=3") as answer:
                assert answer.content_type == "text/plain"
                assert (await answer.text()).count("\n") == 3
            for asked, status, code in (
                ("nobody/log", 404, "no_replica"),
                ("chat-abcde/log?lines=many", 400, "invalid_request"),
                ("chat-abcde/log?lines=10001", 400, "invalid_request"),
            ):
                async with http.get(asked) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
            # A log that is followed goes on, and ends with the agent.
            async with http.get("chat-abcde/log?lines=0&follow=true") as followed:
                path = tmp_path / "home" / "logs" / "chat-abcde.log"
                path.write_bytes(path.read_bytes() + b"CUDA error: an illegal memory access was encountered\n")
                async with asyncio.timeout(2):
                    assert (await followed.content.readline()).startswith(b"CUDA error")

                code, out, _ = await llorch(env, "logs", "chat-abcde", "-n", "1")
                assert (code, out) == (0, "CUDA error: an illegal memory access was encountered\n")
                code, out, _ = await llorch(env, "logs", "pool/chat", "-n", "2")
                assert (code, {line.split()[0] for line in out.splitlines()}) == (0, {"[chat-abcde]", "[chat-fghij]"})
                code, _, error = await llorch(env, "logs", "pool/nothing")
                assert (code, error.count("\n")) == (1, 1)
                code, _, error = await llorch({**env, "LLORCH_API_TOKEN": "wrong"}, "logs", "chat-abcde")
                assert code == 1
                assert "LLORCH_API_TOKEN" in error
                # The log outlives the replica.
                await node.assign({"chat-abcde": None})
                await node.until_gone("chat-abcde")
                code, out, _ = await llorch(env, "logs", "chat-abcde", "-n", "50", "--agent", server.url)
                assert code == 0
                assert "CUDA error: an illegal memory access was encountered\n" in out
                await node.agent.stop()
                async with asyncio.timeout(2):
                    await followed.content.read()


async def test_an_adopted_engine_s_log_is_its_owner_s(tmp_path: Path, model: Path) -> None:
    async with listening(tmp_path / "home") as (node, server, _):
        adopted = {"pool_id": "mine", "replica_id": "r0", "url": "http://127.0.0.1:9", "slots": 1}
        directory = tmp_path / "home" / "engines"
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "mine_r0.json", json.dumps(adopted).encode())
        (name,) = (await node.until(lambda each: each.status.replicas)).status.replicas
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(headers=headers) as http, http.get(f"{server.url}/replicas/{name}/log") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "no_log")
