"""Models are fetched whole or not at all, over servers and lines that break in every way."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from fixtures.model_server import Authority, ModelServer, make_authority, running
from llorch_model.core.errors import DigestMismatch, ModelError, ModelErrorCode, NoDisk
from llorch_model.core.source import parse_source
from llorch_model.download import FetchSettings, open_partial
from llorch_model.fetch import FetchedModel, fetch
from llorch_model.https import Timeouts, open_session
from llorch_model.local import FileHashes
from llorch_model.model_directory import ModelDirectory
from llorch_model.tiny import write_mid, write_tiny

pytestmark = pytest.mark.functional
QUICK = FetchSettings(attempts=4, backoff_seconds=0.01, headroom_mib=1, timeouts=Timeouts(connect=2.0, read=0.5))

Fetch = Callable[..., Awaitable[FetchedModel]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_mid(tmp_path_factory.mktemp("mid") / "mid.gguf").read_bytes()


@pytest.fixture
async def server(authority: Authority, mid: bytes) -> AsyncIterator[ModelServer]:
    async with running(authority, mid) as started:
        yield started


@pytest.fixture
async def session(authority: Authority) -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session(authority.client_context()) as opened:
        yield opened


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def get(server: ModelServer, session: aiohttp.ClientSession, models: Path) -> Fetch:
    def call(**options: object) -> Awaitable[FetchedModel]:
        defaults: dict[str, object] = {
            "directory": models,
            "session": session,
            "settings": QUICK,
            "hashes": FileHashes(),
            "rng": random.Random(1),
        }
        return fetch(server.url, **(defaults | options))  # type: ignore[arg-type]

    return call


def kept(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir())


def whole(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_a_model_arrives_under_a_name_that_holds_its_sha256(server: ModelServer, get: Fetch, models: Path) -> None:
    told: list[tuple[int, int]] = []

    found = await get(sha256=server.sha256, progress=lambda done, total: told.append((done, total)))

    assert found.path == models / f"model.sha256-{server.sha256}.gguf"
    assert found.digest == f"sha256:{server.sha256}"
    assert found.size_bytes == len(server.content)
    assert whole(found.path) == server.sha256
    assert kept(models) == [found.path.name, found.path.name + ".json"], "nothing half-done is left"
    assert told[0] == (0, len(server.content))
    assert told[-1] == (len(server.content), len(server.content))
    assert told == sorted(told)


async def test_a_model_that_is_there_needs_no_network(server: ModelServer, get: Fetch) -> None:
    by_hash, by_etag = await get(sha256=server.sha256), await get()
    server.failures, server.requests = [500] * 9, []

    assert await get(sha256=server.sha256) == by_hash
    assert await get(digest=by_etag.digest) == by_etag
    assert await get(digest=by_hash.digest) == by_hash
    assert server.requests == []


async def test_a_file_that_was_tampered_with_is_fetched_again(server: ModelServer, get: Fetch) -> None:
    found = await get(sha256=server.sha256)
    found.path.write_bytes(b"GGUF" + bytes(100))

    assert whole((await get(sha256=server.sha256)).path) == server.sha256


async def test_a_cut_connection_goes_on_where_it_was_cut(server: ModelServer, get: Fetch) -> None:
    # The first answer is the header's.
    server.cuts = [1 << 30, 6_000_000, 9_000_000, 3_000_000]

    found = await get(sha256=server.sha256)

    assert whole(found.path) == server.sha256
    starts = [span.partition("-")[0] for span in server.requests[1:]]
    assert starts[0] == "all"
    assert [int(start) for start in starts[1:]] == sorted({int(start) for start in starts[1:]}), "always further on"
    assert server.bytes_sent < len(server.content) * 1.5


async def test_a_line_that_keeps_breaking_brings_the_file_nevertheless(server: ModelServer, get: Fetch) -> None:
    server.cuts = [1 << 30] + [3_000_000] * 8

    assert whole((await get(sha256=server.sha256)).path) == server.sha256


async def test_a_server_without_ranges_is_asked_from_the_beginning(server: ModelServer, get: Fetch) -> None:
    server.ranges, server.cuts = False, [1 << 30, 5_000_000]

    assert whole((await get(sha256=server.sha256)).path) == server.sha256
    assert set(server.requests) == {"all"}


async def test_a_server_that_hides_the_size_is_read_to_the_end(server: ModelServer, get: Fetch) -> None:
    server.ranges, server.chunked = False, True

    assert whole((await get()).path) == server.sha256


async def test_it_is_given_up_after_bounded_attempts_and_kept_for_later(server: ModelServer, get: Fetch, models: Path) -> None:
    server.cuts = [1 << 30, 5_000_000]

    with pytest.raises(ModelError, match="given up after 4 attempts") as caught:
        await asyncio.gather(get(), break_down(server))

    assert caught.value.code is ModelErrorCode.MODEL_NOT_AVAILABLE
    assert caught.value.retryable
    assert [name.endswith(".partial") for name in kept(models)] == [True]
    server.failures = []
    before = server.bytes_sent
    assert whole((await get()).path) == server.sha256
    assert server.bytes_sent - before < len(server.content), "the rest only"


async def break_down(server: ModelServer) -> None:
    """Fails every request once the file itself is on its way."""
    await server.sent(3_000_000)
    server.failures = [503] * 50


async def test_a_wrong_sha256_is_refused_and_nothing_is_left(server: ModelServer, get: Fetch, models: Path) -> None:
    with pytest.raises(DigestMismatch) as caught:
        await get(sha256="0" * 64)

    assert caught.value.message == f"{server.url}: sha256 is {server.sha256}, expected {'0' * 64}"
    assert kept(models) == []


async def test_a_file_that_changed_since_it_was_resolved_is_refused(server: ModelServer, get: Fetch) -> None:
    with pytest.raises(DigestMismatch, match="has changed since it was resolved: etag:one"):
        await get(digest="etag:zero+5")


async def test_a_file_that_changes_midway_is_not_mixed(server: ModelServer, get: Fetch, models: Path) -> None:
    server.cuts = [1 << 30, 5_000_000]

    async def change() -> None:
        await server.sent(6_000_000)
        server.content, server.etag = server.content[:-1] + b"x", '"two"'

    with pytest.raises(DigestMismatch, match="changed while it was fetched"):
        await asyncio.gather(get(), change())

    assert kept(models) == []
    assert whole((await get()).path) == server.sha256


async def test_what_an_older_file_left_does_not_spoil_the_new_one(server: ModelServer, get: Fetch, models: Path) -> None:
    models.mkdir()
    stale = ModelDirectory(models).path_of(parse_source(server.url), f"sha256:{server.sha256}")
    stale.with_name(stale.name + ".partial").write_bytes(b"GGUF of last week" * 1000)

    assert whole((await get(sha256=server.sha256)).path) == server.sha256


async def test_callers_of_the_same_file_share_one_download(server: ModelServer, get: Fetch) -> None:
    server.pause = 0.0005
    told: list[list[tuple[int, int]]] = [[], [], []]

    found = await asyncio.gather(*(get(progress=lambda *step, n=n: told[n].append(step)) for n in range(3)))

    assert len({model.path for model in found}) == 1
    assert server.requests == ["0-1048575", "all"]
    assert all(steps[-1] == (len(server.content), len(server.content)) for steps in told)


async def test_one_caller_that_leaves_does_not_stop_the_others(server: ModelServer, get: Fetch) -> None:
    server.pause = 0.0005
    first, second = asyncio.ensure_future(get()), asyncio.ensure_future(get())
    await server.sent(4_000_000)

    first.cancel()

    assert whole((await second).path) == server.sha256
    assert first.cancelled()


async def test_callers_share_a_refusal_too(server: ModelServer, get: Fetch) -> None:
    outcomes = await asyncio.gather(get(sha256="0" * 64), get(sha256="0" * 64), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [DigestMismatch, DigestMismatch]
    assert server.requests.count("all") == 1


async def test_a_cancelled_fetch_goes_on_where_it_was(server: ModelServer, get: Fetch, models: Path) -> None:
    server.pause = 0.001
    running_fetch = asyncio.ensure_future(get(sha256=server.sha256))
    await server.sent(12_000_000)
    running_fetch.cancel()
    await asyncio.wait([running_fetch])
    (partial,) = kept(models)
    received = (models / partial).stat().st_size
    server.pause = 0.0

    found = await get(sha256=server.sha256)

    assert received >= 8_000_000
    assert server.requests[-1] == f"{received}-"
    assert whole(found.path) == server.sha256


SCRIPT = """
import asyncio, sys
from pathlib import Path
from llorch_model.fetch import fetch
asyncio.run(fetch(sys.argv[1], directory=Path(sys.argv[2]), sha256=sys.argv[3]))
"""


async def test_a_killed_process_is_no_loss(server: ModelServer, authority: Authority, get: Fetch, models: Path) -> None:
    server.pause = 0.002
    environment = os.environ | {"SSL_CERT_FILE": str(authority.certificate)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, server.url, str(models), server.sha256, env=environment
    )
    await server.sent(14_000_000)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    server.pause = 0.0

    found = await get(sha256=server.sha256)

    assert int(server.requests[-1].removesuffix("-")) >= 4 << 20
    assert whole(found.path) == server.sha256


async def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    order: list[str] = []

    async def hold(name: str) -> None:
        async with open_partial(tmp_path / "x.partial", hashed=False) as partial:
            order.append(f"{name} in")
            await asyncio.sleep(0.05)
            partial.append(b"x")
            order.append(f"{name} out")

    await asyncio.gather(hold("a"), hold("b"))

    assert [step.split()[1] for step in order] == ["in", "out", "in", "out"]


async def test_a_web_page_is_refused_before_anything_is_written(server: ModelServer, get: Fetch, models: Path) -> None:
    server.content = b"<!doctype html>" + bytes(1000)

    with pytest.raises(ModelError, match="not a GGUF file") as caught:
        await get()

    assert caught.value.code is ModelErrorCode.BAD_MODEL
    assert not models.exists()


async def test_a_disk_without_room_is_said_in_mebibytes(server: ModelServer, get: Fetch, models: Path) -> None:
    with pytest.raises(NoDisk) as caught:
        await get(settings=FetchSettings(headroom_mib=1 << 40))

    assert caught.value.message.startswith(f"{models}: needs 25 MiB and 1,099,511,627,776 MiB to spare, ")
    assert caught.value.code is ModelErrorCode.NO_DISK


async def test_a_directory_that_cannot_be_made_is_named(get: Fetch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(NoDisk, match="cannot be written: Not a directory"):
        await get(directory=tmp_path / "file" / "models")


async def test_a_file_source_is_verified_where_it_is(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")

    found = await fetch(f"file:{path}", directory=tmp_path / "unused", sha256=whole(path))

    assert found.path == path
    assert found.digest == f"sha256:{whole(path)}"
    with pytest.raises(DigestMismatch):
        await fetch(f"file:{path}", directory=tmp_path / "unused", sha256="0" * 64)
    assert not (tmp_path / "unused").exists()


async def test_the_directory_knows_what_it_holds(server: ModelServer, get: Fetch, models: Path) -> None:
    by_hash, by_etag = await get(sha256=server.sha256), await get()
    (models / "stranger.gguf").write_bytes(b"GGUF")

    directory = ModelDirectory(models)

    assert {stored.digest for stored in directory} == {by_hash.digest, by_etag.digest}
    assert {stored.source for stored in directory} == {server.url}
    directory.remove(next(iter(directory)))
    assert len(list(directory)) == 1
