"""Models are inspected where they are: on a web server by their header alone, in a file with everything that can be wrong."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from fixtures.model_server import Authority, ModelServer, make_authority, running
from fixtures.sparse_gguf import header_of, write_sparse
from llorch_model.core.errors import ModelError, ModelErrorCode
from llorch_model.https import Timeouts, open_session
from llorch_model.inspection import inspect_model
from llorch_model.local import FileHashes, inspect_file
from llorch_model.remote import inspect_https
from llorch_model.tiny import write_tiny

pytestmark = pytest.mark.functional
SHORT = Timeouts(connect=2.0, read=0.3)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tiny(tmp_path: Path) -> bytes:
    return write_tiny(tmp_path / "source.gguf").read_bytes()


@pytest.fixture
async def server(authority: Authority, tiny: bytes) -> AsyncIterator[ModelServer]:
    async with running(authority, tiny) as started:
        yield started


@pytest.fixture
async def session(authority: Authority) -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session(authority.client_context()) as opened:
        yield opened


async def refusal(
    session: aiohttp.ClientSession, url: str, code: ModelErrorCode = ModelErrorCode.MODEL_NOT_AVAILABLE
) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await inspect_https(session, url, timeouts=SHORT)
    assert caught.value.code is code
    assert caught.value.message.isprintable()
    return caught.value


async def test_a_model_is_known_from_its_header_alone(server: ModelServer, session: aiohttp.ClientSession) -> None:
    header, _ = header_of("llama3-8b", tokens=True)
    server.content = header + bytes(1 << 20)

    with pytest.raises(ModelError, match="truncated, it has"):
        await inspect_https(session, server.url)

    assert server.requests[0] == "0-1048575"
    assert server.requests[1] == "1048576-2097151"
    assert server.requests[2] == "2097152-4194303", "pieces grow"


async def test_size_shape_and_identity_come_back(server: ModelServer, session: aiohttp.ClientSession) -> None:
    found = await inspect_https(session, server.url)

    assert found.size_bytes == len(server.content)
    assert found.digest == f"etag:one+{len(server.content)}"
    assert found.resolved == server.url
    assert (found.shape.architecture, found.shape.layers) == ("llama", 2)
    assert found.to_resolved().size_mib == 1


async def test_a_stated_sha256_is_the_identity(server: ModelServer, session: aiohttp.ClientSession) -> None:
    assert (await inspect_https(session, server.url, sha256="ab" * 32)).digest == "sha256:" + "ab" * 32


async def test_without_etag_the_date_tells_contents_apart(server: ModelServer, session: aiohttp.ClientSession) -> None:
    server.etag, server.last_modified = "", "Mon, 01 Jan 2024 00:00:00 GMT"
    first = await inspect_https(session, server.url)
    server.last_modified = "Tue, 02 Jan 2024 00:00:00 GMT"

    assert first.digest.startswith("url:")
    assert (await inspect_https(session, server.url)).digest != first.digest


async def test_a_server_without_ranges_is_left_once_the_header_is_read(
    server: ModelServer, session: aiohttp.ClientSession
) -> None:
    server.ranges, server.content, server.pause = False, server.content + bytes(64 << 20), 0.001

    found = await inspect_https(session, server.url)

    assert found.size_bytes == len(server.content)
    assert server.requests == ["all"]
    assert server.bytes_sent < 32 << 20


async def test_a_server_that_hides_the_size_is_taken_at_the_headers_word(
    server: ModelServer, session: aiohttp.ClientSession
) -> None:
    server.ranges, server.chunked = False, True

    assert (await inspect_https(session, server.url)).size_bytes == len(server.content)


async def test_redirects_are_followed_and_signatures_kept_out_of_the_status(
    server: ModelServer, session: aiohttp.ClientSession
) -> None:
    server.redirects = {"/a": "/b", "/b": f"{server.url}?X-Signature=s%2Fecret"}
    origin = server.url.replace("/model.gguf", "")

    found = await inspect_https(session, f"{origin}/a")

    assert found.resolved == server.url


async def test_redirects_that_never_end_are_given_up(server: ModelServer, session: aiohttp.ClientSession) -> None:
    server.redirects = {"/a": "/b", "/b": "/a"}

    error = await refusal(session, server.url.replace("/model.gguf", "/a"))

    assert "more than 5 redirects" in error.message
    assert not error.retryable


@pytest.mark.parametrize("target", ["http://localhost/model.gguf", "ftp://localhost/x", "file:///etc/passwd"])
async def test_redirects_leave_https_for_nothing(server: ModelServer, session: aiohttp.ClientSession, target: str) -> None:
    server.redirects = {"/a": target}

    error = await refusal(session, server.url.replace("/model.gguf", "/a"), ModelErrorCode.UNSUPPORTED_SOURCE)

    assert "only https is followed" in error.message


@pytest.mark.parametrize(
    ("status", "message", "retryable"),
    [
        (403, "the server refuses access (403 Forbidden)", False),
        (401, "the server refuses access (401 Unauthorized)", False),
        (404, "not found (404 Not Found)", False),
        (503, "the server answers 503 Service Unavailable", True),
        (429, "the server answers 429 Too Many Requests", True),
        (400, "the server answers 400 Bad Request", False),
    ],
)
async def test_a_refusing_server_is_quoted(
    server: ModelServer, session: aiohttp.ClientSession, status: int, message: str, retryable: bool
) -> None:
    server.failures = [status]

    error = await refusal(session, server.url)

    assert error.message == f"{server.url}: {message}"
    assert error.retryable is retryable


async def test_a_silent_server_times_out(server: ModelServer, session: aiohttp.ClientSession) -> None:
    server.stalled = True

    error = await refusal(session, server.url)

    assert "no answer for 0.3 s" in error.message
    assert error.retryable


async def test_a_server_that_is_not_there_is_named(session: aiohttp.ClientSession) -> None:
    error = await refusal(session, "https://localhost:1/model.gguf")

    assert error.message.startswith("https://localhost:1/model.gguf: cannot connect")
    assert error.retryable


async def test_a_web_page_is_not_a_model(server: ModelServer, session: aiohttp.ClientSession) -> None:
    server.content = b"<!doctype html><title>Log in</title>"

    error = await refusal(session, server.url, ModelErrorCode.BAD_MODEL)

    assert error.message == f"{server.url}: not a GGUF file"


async def test_an_empty_file_is_not_a_model(server: ModelServer, session: aiohttp.ClientSession) -> None:
    server.content = b""

    assert "the file is empty" in (await refusal(session, server.url, ModelErrorCode.BAD_MODEL)).message


async def test_a_truncated_file_says_how_much_is_missing(server: ModelServer, session: aiohttp.ClientSession) -> None:
    whole = len(server.content)
    server.content = server.content[:100_000]

    error = await refusal(session, server.url, ModelErrorCode.BAD_MODEL)

    assert error.message == f"{server.url}: truncated, it has 100,000 bytes and its header tells of {whole:,}"


async def test_an_unknown_authority_is_refused_until_ssl_cert_file_names_it(
    server: ModelServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_session() as session:
        error = await refusal(session, server.url)
    assert "its certificate is not trusted" in error.message
    assert not error.retryable

    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with open_session() as session:
        assert (await inspect_https(session, server.url)).shape.layers == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("handoff:", "handoff: names nothing on a web server"),
        ("ftp://x", "'ftp://x': must be file:/path"),
    ],
)
async def test_what_names_no_file_says_so(session: aiohttp.ClientSession, source: str, message: str) -> None:
    with pytest.raises(ModelError, match="^" + message) as caught:
        await inspect_model(source, session=session)

    assert caught.value.code is ModelErrorCode.UNSUPPORTED_SOURCE


async def test_copies_of_a_file_have_one_identity(tmp_path: Path, tiny: bytes) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(tiny)
    os.utime(tmp_path / "b", (1, 1))
    (tmp_path / "c").write_bytes(write_tiny(tmp_path / "other.gguf", seed=9).read_bytes())

    a, b, c = [(await inspect_model(f"file:{tmp_path / name}")).digest for name in "abc"]

    assert a == b != c
    assert a.startswith("sample:")


async def test_a_file_of_38_gib_is_inspected_at_once(tmp_path: Path) -> None:
    path = write_sparse("llama3-70b", tmp_path / "70b.gguf", tokens=True)

    found = await inspect_file(path)

    assert found.size_bytes > 38 << 30
    assert found.shape.weights_mib == 38_707


async def test_a_stated_sha256_of_a_file_is_checked_once(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny)
    hashes, told = FileHashes(), []
    expected = await hashes.sha256(path)

    found = await inspect_file(path, sha256=expected, hashes=hashes, progress=lambda done, total: told.append((done, total)))
    assert found.digest == f"sha256:{expected}"
    assert told == [], "it was known"

    path.write_bytes(tiny)
    os.utime(path, (5, 5))
    await inspect_file(path, sha256=expected, hashes=hashes, progress=lambda done, total: told.append((done, total)))
    assert told == [(len(tiny), len(tiny))], "it was written anew, so it was read again"

    with pytest.raises(ModelError, match=f"sha256 is {expected}, expected {'0' * 64}") as caught:
        await inspect_file(path, sha256="0" * 64, hashes=hashes)
    assert caught.value.code is ModelErrorCode.DIGEST_MISMATCH


@pytest.mark.parametrize(
    ("name", "message", "code"),
    [
        ("missing.gguf", "no such file", ModelErrorCode.MODEL_NOT_AVAILABLE),
        ("text.gguf", "not a GGUF file", ModelErrorCode.BAD_MODEL),
        ("empty.gguf", "the file is empty", ModelErrorCode.BAD_MODEL),
        ("short.gguf", "truncated, it has 100,000 bytes and its header tells of 173,408", ModelErrorCode.BAD_MODEL),
        ("directory", "a directory, not a GGUF file", ModelErrorCode.BAD_MODEL),
        ("pipe", "not a regular file", ModelErrorCode.BAD_MODEL),
        ("loop", "cannot be read: Too many levels of symbolic links", ModelErrorCode.MODEL_NOT_AVAILABLE),
        ("text.gguf/x", "cannot be read: Not a directory", ModelErrorCode.MODEL_NOT_AVAILABLE),
    ],
)
async def test_a_bad_file_is_named_with_what_is_wrong(
    tmp_path: Path, tiny: bytes, name: str, message: str, code: ModelErrorCode
) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "short.gguf").write_bytes(tiny[:100_000])
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises(ModelError) as caught:
        await inspect_file(tmp_path / name)

    assert caught.value.message == f"{tmp_path / name}: {message}"
    assert caught.value.code is code
