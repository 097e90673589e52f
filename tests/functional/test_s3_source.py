"""s3: sources, against a server that checks every signature."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fixtures.source_servers import S3Server, serving
from fixtures.split_gguf import split
from llorch_model.access import SourceAccess
from llorch_model.core.errors import DigestMismatch, ModelError, ModelErrorCode
from llorch_model.download import FetchSettings
from llorch_model.fetch import fetch
from llorch_model.inspection import inspect_model
from llorch_model.tiny import write_mid, write_tiny

pytestmark = pytest.mark.functional
QUICK = FetchSettings(attempts=3, backoff_seconds=0.01, headroom_mib=1)
KEY, SECRET = "AKIALLORCH", "secret/of+llorch"
ODD = "models/a+c(ü)&%20?/q4=x~.gguf"


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[S3Server]:
    tiny = write_tiny(tmp_path / "source.gguf").read_bytes()
    server = S3Server({"bucket/tiny.gguf": tiny, f"bucket/{ODD}": tiny}, KEY, SECRET, "eu-west-1")
    async with serving(server.handle) as server.port:
        yield server


def access(s3: S3Server, **changed: str) -> SourceAccess:
    environment = {
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        **changed,
    }
    return SourceAccess(environment={name: value for name, value in environment.items() if value})


async def refused(source: str, allowed: SourceAccess, code: ModelErrorCode = ModelErrorCode.MODEL_NOT_AVAILABLE) -> str:
    with pytest.raises(ModelError) as caught:
        await inspect_model(source, access=allowed)
    assert caught.value.code is code
    assert caught.value.message.isprintable()
    assert SECRET not in caught.value.message
    return caught.value.message


async def test_a_model_is_known_from_its_header_and_its_etag(s3: S3Server) -> None:
    content = s3.objects["bucket/tiny.gguf"]

    found = await inspect_model("s3://bucket/tiny.gguf", access=access(s3))

    assert found.digest == f"etag:{hashlib.md5(content).hexdigest()}+{len(content)}"
    assert found.resolved == "s3://bucket/tiny.gguf"
    assert found.shape.layers == 2
    assert s3.ranges == ["bytes=0-1048575"]


async def test_a_cut_download_goes_on_where_it_was_cut_with_a_fresh_signature(s3: S3Server, tmp_path: Path) -> None:
    content = s3.objects["bucket/mid.gguf"] = write_mid(tmp_path / "mid.gguf").read_bytes()
    s3.cuts = [1 << 30, 6_000_000]

    found = await fetch("s3://bucket/mid.gguf", directory=tmp_path / "m", access=access(s3), settings=QUICK)

    assert found.path.read_bytes() == content
    assert int(s3.ranges[-1].removeprefix("bytes=").rstrip("-")) >= 4_000_000


async def test_an_object_that_changed_since_it_was_resolved_is_refused(s3: S3Server, tmp_path: Path) -> None:
    found = await inspect_model("s3://bucket/tiny.gguf", access=access(s3))
    s3.objects["bucket/tiny.gguf"] = write_tiny(tmp_path / "other.gguf", seed=9).read_bytes()

    with pytest.raises(DigestMismatch, match="has changed since it was resolved"):
        await fetch("s3://bucket/tiny.gguf", directory=tmp_path / "m", digest=found.digest, access=access(s3), settings=QUICK)


async def test_a_bucket_for_everybody_needs_no_key(s3: S3Server) -> None:
    s3.access_key = ""

    found = await inspect_model("s3://bucket/tiny.gguf", access=access(s3, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""))

    assert found.shape.layers == 2


async def test_refusals_name_what_s3_said(s3: S3Server) -> None:
    source = "s3://bucket/tiny.gguf"

    assert await refused(source, access(s3, AWS_SECRET_ACCESS_KEY="wrong")) == (
        f"{source}: the server refuses access (403 SignatureDoesNotMatch)"
    )
    assert await refused(source, access(s3, AWS_REGION="us-east-1")) == (
        f"{source}: the server refuses access (403 AuthorizationHeaderMalformed)"
    )
    assert await refused(source, access(s3, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")) == (
        f"{source}: the server refuses access (403 AccessDenied); no AWS_ACCESS_KEY_ID is set, so it was asked for without a key"
    )
    assert await refused("s3://bucket/none.gguf", access(s3)) == "s3://bucket/none.gguf: not found (404 NoSuchKey)"
    assert "belong together" in await refused(source, access(s3, AWS_SECRET_ACCESS_KEY=""), ModelErrorCode.UNSUPPORTED_SOURCE)


async def test_odd_keys_are_signed_as_they_are_sent(s3: S3Server) -> None:
    assert (await inspect_model(f"s3://bucket/{ODD}", access=access(s3))).shape.layers == 2


async def test_parts_of_a_split_model_come_together(s3: S3Server, tmp_path: Path) -> None:
    parts = split(write_tiny(tmp_path / "t.gguf"), tmp_path / "big", 2)
    s3.objects |= {f"bucket/dir/{path.name}": path.read_bytes() for path in parts}
    source = f"s3://bucket/dir/{parts[0].name}"

    found = await fetch(source, directory=tmp_path / "m", access=access(s3), settings=QUICK)

    assert [path.read_bytes() for path in sorted(found.path.parent.glob("*.gguf"))] == [path.read_bytes() for path in parts]


def test_amazons_own_hosts_are_found_by_region_and_bucket() -> None:
    from llorch_model.core.source import S3Source
    from llorch_model.locate import _s3

    allowed = SourceAccess(environment={"AWS_REGION": "eu-west-1"})

    assert str(_s3(S3Source("bucket", "a/b.gguf"), allowed).parts[0].target.url) == (
        "https://bucket.s3.eu-west-1.amazonaws.com/a/b.gguf"
    )
    assert str(_s3(S3Source("my.bucket", "b.gguf"), allowed).parts[0].target.url) == (
        "https://s3.eu-west-1.amazonaws.com/my.bucket/b.gguf"
    )
