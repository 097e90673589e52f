"""The demo model in a real llama-server: it loads, streams printable text, and runs to max_tokens."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional

ENGINE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx, params.port = sys.argv[1], 2, 4096, 0
params.hostnames = ["127.0.0.1"]
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[str]:
    """Base URL of a server in a process of its own, which ends with its stdin."""
    pytest.importorskip("xllamacpp")
    model = write_tiny(tmp_path / "tiny.gguf")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, str(model), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(30):
            while not (found := re.match(rb"listening on (\S+)", line := await process.stdout.readline())):
                assert line, "the engine did not start"
        yield found[1].decode()
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


async def chat(engine: str, **options: object) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Häagen 漢字\n\x01"}], **options}
    async with aiohttp.ClientSession() as session, session.post(f"{engine}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.text()


@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
async def test_every_request_runs_to_max_tokens_and_is_printable(engine: str, temperature: float) -> None:
    answer = json.loads(await chat(engine, max_tokens=100, temperature=temperature))

    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens"] == 100
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].isascii()
    assert choice["message"]["content"].isprintable()


async def test_a_stream_brings_a_piece_for_every_token(engine: str) -> None:
    events = [line[6:] for line in (await chat(engine, max_tokens=32, stream=True)).splitlines() if line.startswith("data: ")]

    pieces = [choice["delta"].get("content") for event in events[:-1] for choice in json.loads(event)["choices"]]
    texts = [piece for piece in pieces if piece]
    assert events[-1] == "[DONE]"
    assert len(texts) == 32
    assert "".join(texts).isprintable()
