"""The cache of fetched models: full ones make room by age and never by use, and nothing broken stays."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from agent_node import Node, assignment, running

from fixtures.source_servers import S3Server, serving
from llorch_api import Desired, ReplicaState
from llorch_model.access import SourceAccess
from llorch_model.cache import CachePolicy, clear_stale, room_bytes
from llorch_model.core.errors import NoDisk
from llorch_model.core.shape import MIB
from llorch_model.download import FetchSettings, open_partial
from llorch_model.fetch import FetchedModel, fetch
from llorch_model.model_directory import ModelDirectory
from llorch_model.tiny import write_tiny
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional
QUICK = FetchSettings(attempts=2, backoff_seconds=0.01, headroom_mib=1)
SIZE = 2 * MIB
NAMES = ("a", "b", "c", "d")

Fetch = Callable[..., Awaitable[FetchedModel]]


@pytest.fixture
async def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[S3Server]:
    """Holds models of 2 MiB each."""
    server = S3Server()
    for seed, name in enumerate(NAMES):
        content = write_tiny(tmp_path / "source.gguf", seed=seed).read_bytes()
        server.objects[f"bucket/{name}.gguf"] = content.ljust(SIZE, b"\0")
    async with serving(server.handle) as server.port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield server


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def get(s3: S3Server, models: Path) -> Fetch:
    access = SourceAccess(environment={"AWS_ENDPOINT_URL": s3.endpoint})

    async def call(name: str, policy: CachePolicy) -> FetchedModel:
        return await fetch(f"s3://bucket/{name}.gguf", directory=models, access=access, cache=policy, settings=QUICK)

    return call


def kept(models: Path) -> str:
    return "".join(sorted(path.name[0] for path in models.glob("*.gguf")))


def aged(models: Path, name: str, hours: float) -> None:
    """Makes the last use of a model that long ago."""
    (note,) = models.glob(f"{name}.*.json")
    when = time.time() - hours * 3600
    os.utime(note, (when, when))


async def test_what_was_not_used_for_longest_makes_room(models: Path, get: Fetch) -> None:
    policy = CachePolicy(limit_mib=6)
    for name, hours in (("a", 1), ("b", 3), ("c", 2)):
        await get(name, policy)
        aged(models, name, hours)

    await get("d", policy)

    assert kept(models) == "acd"
    assert len(list(models.iterdir())) == 6, "models and their notes, nothing else"


async def test_a_model_that_was_asked_for_again_counts_as_used(models: Path, get: Fetch, s3: S3Server) -> None:
    policy = CachePolicy(limit_mib=6)
    for name, hours in (("a", 1), ("b", 3), ("c", 2)):
        await get(name, policy)
        aged(models, name, hours)

    await get("b", policy)
    await get("d", policy)

    assert kept(models) == "abd"


async def test_a_model_in_use_is_never_evicted_however_old(models: Path, get: Fetch) -> None:
    first = await get("a", CachePolicy(limit_mib=4))
    await get("b", CachePolicy(limit_mib=4))
    aged(models, "a", 100)

    for held in (str(first.path), first.digest, "s3://bucket/a.gguf"):
        policy = CachePolicy(limit_mib=4, held=lambda held=held: frozenset([held]))  # type: ignore[misc]
        await get("c", policy)
        await get("d", policy)
        assert kept(models) == "ad"


async def test_without_room_beside_the_models_in_use_nothing_is_evicted_and_the_error_has_the_arithmetic(
    models: Path, get: Fetch
) -> None:
    first = await get("a", CachePolicy())
    await get("b", CachePolicy())
    policy = CachePolicy(limit_mib=3, held=lambda: frozenset([str(first.path)]))

    with pytest.raises(NoDisk, match="needs 2 MiB, and LLORCH_MODEL_CACHE_MIB=3 leaves 1 beside the models in use"):
        await get("c", policy)

    assert kept(models) == "ab"


async def test_head_room_on_the_disk_evicts_too(models: Path, get: Fetch, s3: S3Server) -> None:
    await get("a", CachePolicy())
    free = os.statvfs(models).f_bavail * os.statvfs(models).f_frsize
    access = SourceAccess(environment={"AWS_ENDPOINT_URL": s3.endpoint})
    too_much = FetchSettings(attempts=1, headroom_mib=free // MIB + 100)

    with pytest.raises(NoDisk, match="MiB to spare"):
        await fetch("s3://bucket/b.gguf", directory=models, access=access, settings=too_much)

    assert kept(models) == "a", "it would not have been enough"


async def test_what_a_new_model_may_take_counts_what_can_be_evicted(models: Path, get: Fetch) -> None:
    first = await get("a", CachePolicy())
    await get("b", CachePolicy())
    directory, held = ModelDirectory(models), lambda: frozenset([str(first.path)])

    assert room_bytes(directory, 10 * MIB, CachePolicy(held=held)) == 12 * MIB
    assert room_bytes(directory, 10 * MIB, CachePolicy(5, held)) == 3 * MIB


async def test_what_broken_downloads_left_is_cleared_and_what_is_being_written_is_not(models: Path, get: Fetch) -> None:
    await get("a", CachePolicy())
    old = time.time() - 30 * 86_400
    for name in (
        "x.etag-1.gguf.partial",
        "y.etag-1.gguf.partial",
        "new.etag-3.gguf.partial",
        ".12.evicted",
        "z.etag-4.gguf.json",
    ):
        (models / name).write_bytes(b"GGUF")
        if not name.startswith("new"):
            os.utime(models / name, (old, old))

    async with open_partial(models / "y.etag-1.gguf.partial", hashed=False):
        os.utime(models / "y.etag-1.gguf.partial", (old, old))
        cleared = {path.name for path in clear_stale(models)}

    assert cleared == {"x.etag-1.gguf.partial", ".12.evicted", "z.etag-4.gguf.json"}
    assert kept(models) == "a"


@pytest.fixture
async def node(tmp_path: Path, s3: S3Server) -> AsyncIterator[Node]:
    async with open_store("memory:") as store, running(tmp_path / "home", store, model_cache_mib=4) as started:
        yield started


async def test_an_agent_evicts_only_what_none_of_its_replicas_runs(node: Node) -> None:
    models = node.root / "models"
    for name in "ab":
        await node.assign({f"chat-{name * 5}": assignment(f"s3://bucket/{name}.gguf")})
        await node.until_state(f"chat-{name * 5}", ReplicaState.READY)
    await node.assign({"chat-ccccc": assignment("s3://bucket/c.gguf")})
    failed = await node.until_state("chat-ccccc", ReplicaState.FAILED)
    assert "LLORCH_MODEL_CACHE_MIB=4 leaves 0 beside the models in use" in failed.status.replicas["chat-ccccc"].message
    assert kept(models) == "ab"

    await node.assign({"chat-aaaaa": assignment("s3://bucket/a.gguf", desired=Desired.STOP), "chat-ccccc": None})
    await node.until_state("chat-aaaaa", ReplicaState.STOPPED)
    await node.assign({"chat-ddddd": assignment("s3://bucket/d.gguf")})
    await node.until_state("chat-ddddd", ReplicaState.READY)

    assert kept(models) == "bd"
    found = await node.until(lambda each: len(each.status.models) == 2)
    assert {model.source for model in found.status.models.values()} == {"s3://bucket/b.gguf", "s3://bucket/d.gguf"}
