"""What clients may ask of the front door's time and memory: large prompts, slow senders, slow readers, long headers."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from data_path import SLOTS, Agent, agent, chat, events, ready_replica, until

from llorch_web.server import Server

pytestmark = pytest.mark.functional

CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}


class StubEngine:
    """Answers as llama-server does, at once, and counts what it was sent."""

    def __init__(self) -> None:
        self.received = 0
        self.pieces = 1
        self.text = "a"
        self.url = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        async for piece in request.content.iter_any():
            self.received += len(piece)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        event = {**CHUNK, "choices": [{"index": 0, "delta": {"content": self.text}, "finish_reason": None}]}
        last = {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        for _ in range(self.pieces):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        return response


@asynccontextmanager
async def stub_engine() -> AsyncIterator[StubEngine]:
    stub = StubEngine()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/{kind:.*}", stub.serve)
    server = Server(app, "127.0.0.1:0", variable="TEST")
    await server.start()
    stub.url = server.url
    try:
        yield stub
    finally:
        await server.stop(0.1)


async def lag(into: list[float]) -> None:
    """Notes by how much each sleep was late, in seconds."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.001)
        into.append(time.monotonic() - before - 0.001)


def connect(to: Agent, **options: int) -> socket.socket:
    where = urlsplit(to.url)
    made = socket.socket()
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.connect((where.hostname, where.port))
    made.setblocking(False)
    return made


@pytest.mark.parametrize("kind", ["chat", "tokens"])
async def test_a_prompt_of_several_mib_holds_up_no_other_stream(kind: str) -> None:
    # Given a request of 4 MiB
    body: dict[str, Any] = chat(stream=True)
    path = "chat/completions"
    if kind == "chat":
        body["messages"][0]["content"] = 'say "wört"\n' * (4 * 1024 * 1024 // 13)
    else:
        path, body = "completions", {"model": "chat", "prompt": list(range(100_000, 624_288)), "stream": True}
    sent = json.dumps(body).encode()
    assert len(sent) > 4 << 20

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(sent), 1 << 16):
            yield sent[start : start + (1 << 16)]

    async with stub_engine() as stub, agent(ready_replica("r", stub.url)) as running, aiohttp.ClientSession() as http:
        late: list[float] = []
        watching = asyncio.create_task(lag(late))
        # When it goes through
        async with http.post(f"{running.url}/replicas/r/v1/{path}", data=pieces()) as answer:
            assert answer.status == 200
            assert (await events(answer))[-1] == "[DONE]"
        watching.cancel()
        # Then the loop, on which here client and engine are too, was never away for long
        assert stub.received >= len(sent)
        assert max(late) < 0.05, f"{max(late) * 1000:.0f} ms"
        assert running.replica("r").slots.free == SLOTS


async def test_a_client_that_never_sends_its_whole_request_is_told_so_and_holds_no_slot() -> None:
    async with stub_engine() as stub, agent(ready_replica("r", stub.url), body_timeout=0.3) as running:
        loop = asyncio.get_running_loop()
        with connect(running) as slow:
            head = b"POST /replicas/r/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            await loop.sock_sendall(slow, head)
            async with asyncio.timeout(2):
                answer = await loop.sock_recv(slow, 4096)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"request_timeout" in answer
        assert stub.received == 0
        assert running.replica("r").slots.free == SLOTS


async def test_a_client_that_does_not_read_its_answer_loses_its_slot() -> None:
    async with stub_engine() as stub, agent(ready_replica("r", stub.url), stall_timeout=0.5) as running:
        stub.pieces, stub.text = 400, "x" * 64 * 1024
        loop = asyncio.get_running_loop()
        with connect(running, SO_RCVBUF=4096) as idle:
            body = json.dumps(chat(stream=True)).encode()
            head = f"POST /replicas/r/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(idle, head.encode() + body)
            await until(lambda: running.replica("r").slots.in_use == 1)
            took = await until(lambda: running.replica("r").slots.free == SLOTS, 5)
        assert took >= 0.4
        assert running.door.in_flight == 0


async def test_headers_that_are_too_long_are_refused_and_the_door_stays_open() -> None:
    async with stub_engine() as stub, agent(ready_replica("r", stub.url)) as running, aiohttp.ClientSession() as http:
        url = f"{running.url}/replicas/r/v1/chat/completions"
        async with http.post(url, json=chat(), headers={"X-Long": "x" * 20_000}) as answer:
            assert answer.status in (400, 431)
        async with http.post(url, json=chat()) as answer:
            assert answer.status == 200
        assert stub.received > 0
