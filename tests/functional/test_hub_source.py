"""hf: sources, against a server that speaks the Hub's protocol: commits, LFS hashes, redirects to a CDN, refusals."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from yarl import URL

from fixtures.source_servers import COMMIT, HubServer, serving
from fixtures.split_gguf import split
from llorch_model.access import SourceAccess
from llorch_model.core.errors import DigestMismatch, ModelError, ModelErrorCode
from llorch_model.core.source import parse_source
from llorch_model.download import FetchSettings
from llorch_model.fetch import fetch
from llorch_model.inspection import inspect_model
from llorch_model.locate import locate
from llorch_model.tiny import write_mid, write_tiny

pytestmark = pytest.mark.functional
QUICK = FetchSettings(attempts=3, backoff_seconds=0.01, headroom_mib=1)


@pytest.fixture
def tiny(tmp_path: Path) -> bytes:
    return write_tiny(tmp_path / "source.gguf").read_bytes()


@pytest.fixture
async def hub(tiny: bytes) -> AsyncIterator[HubServer]:
    server = HubServer({"README.md": b"# tiny", "q4/tiny.gguf": tiny, "mmproj-f16.gguf": b"GGUF"})
    async with serving(server.handle) as server.port:
        yield server


def access(hub: HubServer, **more: str) -> SourceAccess:
    return SourceAccess(environment={"HF_ENDPOINT": hub.endpoint, **more})


async def refused(source: str, allowed: SourceAccess, code: ModelErrorCode = ModelErrorCode.MODEL_NOT_AVAILABLE) -> str:
    with pytest.raises(ModelError) as caught:
        await inspect_model(source, access=allowed)
    assert caught.value.code is code
    assert caught.value.message.isprintable()
    return caught.value.message


async def test_the_only_model_of_a_repository_is_found_and_pinned_to_its_commit(hub: HubServer) -> None:
    found = await inspect_model("hf:org/repo", access=access(hub))

    assert found.resolved == f"hf:org/repo/q4/tiny.gguf@{COMMIT}"
    assert found.digest == f"sha256:{hub.sha256('q4/tiny.gguf')}", "LFS tells it, nothing was downloaded for it"
    assert found.size_bytes == len(hub.files["q4/tiny.gguf"])
    assert found.shape.layers == 2
    assert [each for each in hub.cdn_headers if "Range" not in each] == [], "only ranges were read"


async def test_a_branch_is_the_commit_it_is_at(hub: HubServer) -> None:
    hub.revisions["v2"] = "d" * 40

    assert (await inspect_model("hf:org/repo@v2", access=access(hub))).resolved.endswith("@" + "d" * 40)


async def test_what_was_resolved_brings_the_same_file_after_the_branch_has_moved(hub: HubServer, tmp_path: Path) -> None:
    found = await inspect_model("hf:org/repo", access=access(hub))
    hub.revisions = {"main": "e" * 40, "old": COMMIT}

    fetched = await fetch(found.resolved, directory=tmp_path / "m", digest=found.digest, access=access(hub), settings=QUICK)

    assert f"sha256:{hashlib.sha256(fetched.path.read_bytes()).hexdigest()}" == found.digest


async def test_a_cut_download_goes_on_at_the_cdn_and_is_verified(hub: HubServer, tmp_path: Path) -> None:
    hub.files["mid.gguf"] = write_mid(tmp_path / "mid.gguf").read_bytes()
    size = len(hub.files["mid.gguf"])
    hub.cuts = [1 << 30, 6_000_000]
    told: list[tuple[int, int]] = []

    found = await fetch(
        "hf:org/repo/mid.gguf",
        directory=tmp_path / "m",
        access=access(hub),
        settings=QUICK,
        progress=lambda done, total: told.append((done, total)),
    )

    assert hashlib.sha256(found.path.read_bytes()).hexdigest() == hub.sha256("mid.gguf")
    assert found.digest == f"sha256:{hub.sha256('mid.gguf')}"
    starts = [int(each["Range"].removeprefix("bytes=").split("-")[0]) for each in hub.cdn_headers if "Range" in each]
    assert starts[-1] >= 4_000_000
    assert told[-1] == (size, size)


async def test_content_that_is_not_what_lfs_promised_is_never_kept(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HubServer, "sha256", lambda *_: "0" * 64)

    with pytest.raises(DigestMismatch, match="expected 0000"):
        await fetch("hf:org/repo", directory=tmp_path / "m", access=access(hub), settings=QUICK)

    assert list((tmp_path / "m").iterdir()) == []


async def test_another_sha256_than_the_stated_one_is_known_before_the_download(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match=f"sha256 is {hub.sha256('q4/tiny.gguf')}, expected 1111"):
        await fetch("hf:org/repo", directory=tmp_path / "m", sha256="1" * 64, access=access(hub), settings=QUICK)

    assert all("Range" in each for each in hub.cdn_headers)


async def test_files_outside_lfs_are_known_by_their_git_id(hub: HubServer, tiny: bytes) -> None:
    hub.plain_git = True

    found = await inspect_model("hf:org/repo", access=access(hub))

    assert found.digest == f"etag:{hashlib.sha1(tiny).hexdigest()}+{len(tiny)}"


async def test_several_models_without_a_file_named_are_listed(hub: HubServer, tiny: bytes) -> None:
    hub.files["q8/tiny.gguf"] = tiny

    message = await refused("hf:org/repo", access(hub))

    assert message == "hf:org/repo: name one of its 2 models, like hf:org/repo/q4/tiny.gguf: q4/tiny.gguf, q8/tiny.gguf"


async def test_a_repository_without_a_model_says_so(hub: HubServer) -> None:
    del hub.files["q4/tiny.gguf"]

    assert "no GGUF file in it" in await refused("hf:org/repo", access(hub), ModelErrorCode.BAD_MODEL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/repo/none.gguf", "hf:org/repo/none.gguf: no such file: none.gguf; it has mmproj-f16.gguf, q4/tiny.gguf"),
        ("hf:org/repo@v9", "hf:org/repo@v9: no such revision: v9"),
        ("hf:org/other", "hf:org/other: no such repository, or it is private and no HF_TOKEN is set"),
    ],
)
async def test_what_is_not_there_is_named(hub: HubServer, source: str, message: str) -> None:
    assert await refused(source, access(hub)) == message


async def test_a_private_repository_opens_with_the_token_of_a_file_that_may_change(hub: HubServer, tmp_path: Path) -> None:
    hub.token = "hf_right"
    secret = tmp_path / "token"
    secret.write_text("hf_old\n")
    allowed = SourceAccess(hf_token_file=secret, environment={"HF_ENDPOINT": hub.endpoint})

    assert await refused("hf:org/repo", access(hub)) == (
        "hf:org/repo: no such repository, or it is private and no HF_TOKEN is set"
    )
    assert "the token does not open it" in await refused("hf:org/repo", allowed)
    secret.write_text("hf_right\n")
    assert (await inspect_model("hf:org/repo", access=allowed)).shape.layers == 2
    assert (await inspect_model("hf:org/repo", access=access(hub, HF_TOKEN="hf_right"))).shape.layers == 2


async def test_a_token_is_shown_to_the_hub_and_not_to_the_host_it_redirects_to(hub: HubServer) -> None:
    hub.token = "hf_right"
    remote = await locate(parse_source("hf:org/repo"), access(hub, HF_TOKEN="hf_right"))
    (part,) = remote.parts

    assert part.target.headers(part.target.url) == {"Authorization": "Bearer hf_right"}
    assert part.target.headers(URL("https://cdn.example/x")) == {}
    assert "hf_right" not in repr(remote)


async def test_a_gated_repository_says_where_its_terms_are(hub: HubServer) -> None:
    hub.gated = True

    message = await refused("hf:org/repo", access(hub))

    assert message == (
        f"hf:org/repo: the repository is gated and no HF_TOKEN is set: its terms are accepted at {hub.endpoint}/org/repo"
    )


async def test_a_hub_that_is_away_is_asked_again(tmp_path: Path, unused_tcp_port: int) -> None:
    allowed = SourceAccess(environment={"HF_ENDPOINT": f"http://127.0.0.1:{unused_tcp_port}"})

    with pytest.raises(ModelError, match=r"cannot be asked: .*given up after 3 attempts") as caught:
        await fetch("hf:org/repo", directory=tmp_path / "m", access=allowed, settings=QUICK)

    assert caught.value.retryable


async def test_an_endpoint_that_is_no_url_is_one_line() -> None:
    allowed = SourceAccess(environment={"HF_ENDPOINT": "huggingface"})

    message = await refused("hf:org/repo", allowed, ModelErrorCode.UNSUPPORTED_SOURCE)

    assert message == "HF_ENDPOINT=huggingface — must be http://host[:port] or https://host[:port]"


async def test_parts_of_a_split_model_come_together(hub: HubServer, tmp_path: Path) -> None:
    parts = split(write_tiny(tmp_path / "t.gguf", layers=4), tmp_path / "big", 3)
    hub.files = {path.name: path.read_bytes() for path in parts}

    found = await inspect_model("hf:org/repo", access=access(hub))
    fetched = await fetch(found.resolved, directory=tmp_path / "m", digest=found.digest, access=access(hub), settings=QUICK)

    assert found.resolved == f"hf:org/repo/big-00001-of-00003.gguf@{COMMIT}"
    assert found.digest.startswith("split:")
    assert found.shape.layers == 4
    assert found.size_bytes == fetched.size_bytes == sum(len(content) for content in hub.files.values())
    assert [path.read_bytes() for path in sorted(fetched.path.parent.glob("*.gguf"))] == [path.read_bytes() for path in parts]


async def test_a_split_model_that_lacks_a_part_says_which(hub: HubServer, tmp_path: Path) -> None:
    parts = split(write_tiny(tmp_path / "t.gguf"), tmp_path / "big", 3)
    hub.files = {path.name: path.read_bytes() for path in parts if "00002" not in path.name}

    message = await refused("hf:org/repo", access(hub), ModelErrorCode.BAD_MODEL)

    assert message == "hf:org/repo: 1 of 3 parts are missing, the first is big-00002-of-00003.gguf"
