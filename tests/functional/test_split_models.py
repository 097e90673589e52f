"""Split models over https and on disk: facts over all parts, one size, all or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from engine_node import launch
from engine_node import running as engine_running

from fixtures.model_server import make_authority
from fixtures.source_servers import send_range
from fixtures.split_gguf import split
from llorch_api import ReplicaState
from llorch_model.access import SourceAccess
from llorch_model.core.errors import BadModel, DigestMismatch, ModelNotAvailable, UnsupportedSource
from llorch_model.download import FetchSettings
from llorch_model.fetch import fetch
from llorch_model.inspection import inspect_model
from llorch_model.local import FileHashes
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional
QUICK = FetchSettings(attempts=2, backoff_seconds=0.01, headroom_mib=1)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "whole.gguf", layers=4)


@pytest.fixture
def parts(tmp_path: Path, whole: Path) -> list[Path]:
    (tmp_path / "parts").mkdir()
    return split(whole, tmp_path / "parts" / "big", 3)


class Files:
    """An https server of files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.asked: list[str] = []
        self.base = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.path.removeprefix("/")
        if name == "elsewhere.gguf":
            return web.Response(status=302, headers={"Location": self.base.replace("localhost", "127.0.0.1") + "/x.gguf"})
        if name not in self.files:
            return web.Response(status=404)
        self.asked.append(f"{name} {request.headers.get('Range', 'all')}")
        content = self.files[name]
        return await send_range(request, content, hashlib.md5(content).hexdigest(), self.cuts)


@pytest.fixture
async def server(tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Files]:
    authority = make_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    files = Files()
    files.files = {path.name: path.read_bytes() for path in parts}
    runner = web.ServerRunner(web.Server(files.handle, access_log=None), handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=authority.server_context()).start()
    files.base = f"https://localhost:{runner.addresses[0][1]}"
    try:
        yield files
    finally:
        await runner.cleanup()


def in_a_row(parts: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()


async def test_a_split_file_has_the_shape_of_the_whole(whole: Path, parts: list[Path]) -> None:
    expected, found = await inspect_model(f"file:{whole}"), await inspect_model(f"file:{parts[0]}")

    assert found.shape == expected.shape
    assert found.size_bytes == sum(path.stat().st_size for path in parts)
    assert found.digest.startswith("split:")


async def test_a_split_file_is_verified_by_the_sha256_of_its_parts_in_a_row(parts: list[Path]) -> None:
    found = await inspect_model(f"file:{parts[0]}", sha256=in_a_row(parts))

    assert found.digest == f"sha256:{in_a_row(parts)}"
    with pytest.raises(DigestMismatch):
        await inspect_model(f"file:{parts[0]}", sha256=hashlib.sha256(parts[0].read_bytes()).hexdigest())


async def test_a_part_that_is_missing_or_cut_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(BadModel, match=r"00002-of-00003\.gguf: truncated"):
        await inspect_model(f"file:{parts[0]}")

    parts[1].unlink()
    with pytest.raises(ModelNotAvailable, match=r"00002-of-00003\.gguf: no such file"):
        await inspect_model(f"file:{parts[0]}")


async def test_a_split_model_comes_over_https_in_one_progress(server: Files, parts: list[Path], tmp_path: Path) -> None:
    source = f"{server.base}/{parts[0].name}"
    told: list[tuple[int, int]] = []
    total = sum(path.stat().st_size for path in parts)

    resolved = await inspect_model(source)
    found = await fetch(
        source,
        directory=tmp_path / "m",
        digest=resolved.digest,
        settings=QUICK,
        progress=lambda done, size: told.append((done, size)),
    )

    assert resolved.shape.layers == 4
    assert found.size_bytes == resolved.size_bytes == total
    assert told == sorted(told)
    assert {size for _, size in told} == {total}
    assert told[-1] == (total, total)
    assert [path.name[-20:] for path in sorted((tmp_path / "m").glob("*.gguf"))] == [path.name[-20:] for path in parts]
    server.files = {}
    assert await fetch(source, directory=tmp_path / "m", digest=resolved.digest, settings=QUICK) == found, "no network"


async def test_parts_that_are_here_are_not_fetched_again_after_a_failure(
    server: Files, parts: list[Path], tmp_path: Path
) -> None:
    source = f"{server.base}/{parts[0].name}"
    server.cuts = [1 << 30] * 3 + [1 << 30, 10_000] + [0] * 3
    with pytest.raises(ModelNotAvailable, match="given up"):
        await fetch(source, directory=tmp_path / "m", settings=QUICK)
    assert list((tmp_path / "m").glob("*.gguf")) == [], "nothing is taken for a model before all of it is here"
    server.asked, server.cuts = [], []

    await fetch(source, directory=tmp_path / "m", settings=QUICK)

    wholes = [each for each in server.asked if "bytes=0-" not in each]
    assert not any(parts[0].name in each for each in wholes)
    assert [each.partition("-of-")[0][-1] for each in wholes] == ["2", "3"]


async def test_a_split_model_with_another_sha256_leaves_nothing(server: Files, parts: list[Path], tmp_path: Path) -> None:
    source = f"{server.base}/{parts[0].name}"
    good = await fetch(source, directory=tmp_path / "m", sha256=in_a_row(parts), settings=QUICK, hashes=FileHashes())
    assert good.digest == f"sha256:{in_a_row(parts)}"

    with pytest.raises(DigestMismatch, match="of its 3 parts in a row is"):
        await fetch(source, directory=tmp_path / "n", sha256="0" * 64, settings=QUICK)

    assert list((tmp_path / "n").iterdir()) == []


async def test_a_real_engine_loads_what_was_fetched_from_its_first_part(server: Files, parts: list[Path], tmp_path: Path) -> None:
    found = await fetch(f"{server.base}/{parts[0].name}", directory=tmp_path / "m", settings=QUICK)

    async with engine_running(tmp_path / "node") as node:
        node.write("chat_r0.json", launch(found.path))
        await node.until_state("chat_r0", ReplicaState.READY)


async def test_private_addresses_are_refused_by_name_and_by_number(server: Files, parts: list[Path]) -> None:
    public_only = SourceAccess(allow_private=False, environment={})
    port = server.base.rpartition(":")[2]

    for host, shown in (("localhost", r"localhost \((127\.0\.0\.1|::1)\)"), ("127.0.0.1", r"127\.0\.0\.1"), ("[::1]", "::1")):
        with pytest.raises(
            UnsupportedSource, match=f"{shown} is not a public address, and LLORCH_ALLOW_PRIVATE_SOURCES is false"
        ):
            await inspect_model(f"https://{host}:{port}/{parts[0].name}", access=public_only)
    assert server.asked == []


async def test_a_redirect_to_a_private_address_is_refused_though_an_endpoint_named_by_the_administrator_is_trusted(
    server: Files, parts: list[Path]
) -> None:
    trusting = SourceAccess(allow_private=False, environment={"HF_ENDPOINT": server.base})

    assert (await inspect_model(f"{server.base}/{parts[0].name}", access=trusting)).shape.layers == 4
    with pytest.raises(UnsupportedSource, match=r"127\.0\.0\.1 is not a public address"):
        await inspect_model(f"{server.base}/elsewhere.gguf", access=trusting)
