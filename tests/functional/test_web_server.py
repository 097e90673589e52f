"""The parts that every server of llorch shares, on real sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from llorch_web import auth
from llorch_web.application import application
from llorch_web.auth import Tokens, is_loopback
from llorch_web.body import read_body
from llorch_web.errors import ApiError
from llorch_web.server import Server, parse_address
from llorch_web.settings import StartError

pytestmark = pytest.mark.functional

TOKEN = "0123456789abcdef0123456789abcdef"


async def hello(_: web.Request) -> web.Response:
    return web.json_response({"hello": "world"})


async def boom(_: web.Request) -> web.Response:
    raise KeyError("a bug")


async def refuse(_: web.Request) -> web.Response:
    raise ApiError(429, "all slots are taken", code="no_slot", headers={"Retry-After": "1"})


async def echo(request: web.Request) -> web.Response:
    return web.Response(body=await read_body(request, 1000))


async def slow(_: web.Request) -> web.Response:
    await asyncio.sleep(0.3)
    return web.json_response({"done": True})


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    return response


ROUTES = [
    web.get("/stream", stream),
    web.get("/hello", hello),
    web.get("/boom", boom),
    web.get("/refuse", refuse),
    web.post("/echo", echo),
    web.get("/slow", slow),
]


@asynccontextmanager
async def serving(tokens: Tokens | None = None) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    registry = CollectorRegistry()
    Counter("llorch_example", "An example.", registry=registry).inc()
    server = Server(application(ROUTES, registries=[registry], tokens=tokens), "127.0.0.1:0", variable="LLORCH_ADDR")
    await server.start()
    try:
        async with aiohttp.ClientSession(server.url) as session:
            yield server, session
    finally:
        await server.stop(1.0)


async def test_every_failure_is_an_openai_envelope(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (_, session):
        expected = {
            "/nowhere": (404, "not_found"),
            "/echo": (405, "method_not_allowed"),
            "/boom": (500, "internal_error"),
            "/refuse": (429, "no_slot"),
        }
        for path, (status, code) in expected.items():
            async with session.get(path) as answer:
                assert answer.status == status
                error = (await answer.json())["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["code"] == code
                if status == 429:
                    assert answer.headers["Retry-After"] == "1"
        assert "a bug" not in str(error)
        assert "KeyError" in caplog.text


async def test_a_body_over_the_limit_is_413_declared_or_not() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 500

    async with serving() as (_, session):
        async with session.post("/echo", data=b"x" * 1000) as answer:
            assert len(await answer.read()) == 1000
        for data in (b"x" * 1001, pieces()):
            async with session.post("/echo", data=data) as answer:
                assert answer.status == 413
                assert (await answer.json())["error"]["code"] == "request_too_large"


async def test_the_correlation_id_is_kept_when_it_is_clean_and_made_when_not() -> None:
    async with serving() as (_, session):
        async with session.get("/hello", headers={"X-Correlation-Id": "abc-123"}) as answer:
            assert answer.headers["X-Correlation-Id"] == "abc-123"
        async with session.get("/boom", headers={"X-Correlation-Id": "no spaces!"}) as answer:
            made = answer.headers["X-Correlation-Id"]
            assert made != "no spaces!"
            assert len(made) == 36


async def test_health_and_metrics_are_open_and_everything_else_needs_the_token() -> None:
    async with serving(Tokens(TOKEN)) as (_, session):
        for path in ("/health", "/metrics"):
            async with session.get(path) as answer:
                assert answer.status == 200
        async with session.get("/metrics") as answer:
            assert "llorch_example_total 1.0" in await answer.text()
        for header, code in ((None, "missing_token"), ("Bearer ", "missing_token"), ("Bearer nope", "bad_token")):
            async with session.get("/hello", headers={"Authorization": header} if header else {}) as answer:
                assert answer.status == 401
                assert (await answer.json())["error"]["code"] == code
        async with session.get("/hello", headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
            assert answer.status == 200


async def test_without_a_token_only_loopback_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Tokens()) as (_, session):
        async with session.get("/hello") as answer:
            assert answer.status == 200
        monkeypatch.setattr(auth, "is_loopback", lambda _: False)  # this machine has no other address to come from
        async with session.get("/hello") as answer:
            assert answer.status == 403
            assert (await answer.json())["error"]["code"] == "non_loopback_without_token"


def test_loopback_is_recognised_in_all_its_forms() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("10.0.0.1", "::", "fe80::1%eth0", "", None, "localhost")))


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "LOOK_INTERVAL", 0.0)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    tokens = Tokens(file=file)
    assert tokens.accepts(TOKEN)
    assert tokens.headers() == [("Authorization", f"Bearer {TOKEN}")]
    fresh = tmp_path / "fresh"
    fresh.write_text(f"{'n' * 32},{TOKEN}")
    os.replace(fresh, file)
    assert tokens.current() == "n" * 32
    assert tokens.accepts("n" * 32)
    assert tokens.accepts(TOKEN), "the previous one holds while others still show it"
    file.write_text("n" * 32)
    assert not tokens.accepts(TOKEN)
    file.unlink()
    assert tokens.accepts("n" * 32), "an unreadable file changes nothing"


def test_a_token_file_that_is_missing_refuses_everybody(tmp_path: Path) -> None:
    tokens = Tokens(file=tmp_path / "none")
    assert tokens.configured
    assert not tokens.accepts("")


def test_tokens_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = Tokens("short-one, with space")
    tokens.accepts("short-two")
    assert "shorter than" in caplog.text
    assert "short-one" not in caplog.text


async def test_a_taken_port_is_one_line_that_names_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StartError) as raised:
            await Server(application([]), address, variable="ORCHESTRATORD_ADDR").start()
    assert str(raised.value) == (
        f"ORCHESTRATORD_ADDR={address} — the port is taken by another process; choose another or stop it"
    )


@pytest.mark.parametrize("text", ["", "8080", "host", "host:port", "host:70000", "::1:80"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StartError, match=r"^LLORCH_ADDR=.* — must be host:port"):
        parse_address(text, "LLORCH_ADDR")


def test_addresses_may_leave_out_the_host_or_be_ipv6() -> None:
    assert parse_address(":80", "X") == ("0.0.0.0", 80)
    assert parse_address("[::1]:80", "X") == ("::1", 80)


async def test_stopping_lets_running_answers_end_and_closes_idle_connections() -> None:
    async with serving() as (server, session):
        async with session.get("/hello") as answer:
            assert answer.status == 200
        running = asyncio.create_task(session.get("/slow"))
        await asyncio.sleep(0.05)
        await server.stop(2.0)
        async with await running as answer:
            assert (await answer.json()) == {"done": True}
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get("/hello")


async def test_stopping_cuts_off_what_outlasts_the_deadline() -> None:
    async with serving() as (server, session):
        running = asyncio.create_task(session.get("/slow"))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(server.stop(0.05), 1.0)
        with pytest.raises(aiohttp.ClientError):
            await running


async def test_a_client_that_left_before_it_was_heard_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (server, session):
        # given a server that was frozen while its clients came and left: the kernel took what they sent
        host, port = parse_address(server.url.removeprefix("http://"), variable="URL")
        for _ in range(20):
            with socket.create_connection((host, port)) as client:
                client.sendall(b"GET /stream HTTP/1.1\r\nHost: llorch\r\n\r\n")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        # when it goes on
        async with session.get("/hello") as answer:
            assert answer.status == 200
        await asyncio.sleep(0.1)
    # then it has nothing to complain of
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
