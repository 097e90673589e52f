"""One contract, three stores: every test here runs on memory, on SQLite and on a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from llorch_api import GPUNode, GPUNodeSpec, GPUPool, ObjectMeta
from llorch_api.meta import OwnerReference
from llorch_store import Conflict, Event, EventType, Invalid, Key, NotFound, Store, key_of
from llorch_store.core.validation import parse
from llorch_store.factory import open_store

pytestmark = pytest.mark.functional

ME, YOU = "me", "you"
CHAT = Key("default", "chat")


@pytest.fixture(params=["memory", "sqlite", "kubernetes"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    match request.param:
        case "memory":
            spec = "memory:"
        case "sqlite":
            spec = f"sqlite:{tmp_path / 'llorch.db'}"
        case _:
            request.getfixturevalue("kubeconfig")
            request.getfixturevalue("no_resources")
            spec = "kubernetes"
    async with open_store(spec) as opened:
        yield opened


def pool(name: str = "chat", namespace: str = "default", labels: dict[str, str] | None = None, **spec: Any) -> GPUPool:
    metadata = {"name": name, "namespace": namespace, **({"labels": labels} if labels else {})}
    return parse(GPUPool, {"metadata": metadata, "spec": {"model": {"source": "hf:org/repo"}, **spec}})


def node(name: str, **spec: Any) -> GPUNode:
    return parse(GPUNode, {"metadata": {"name": name}, **({"spec": spec} if spec else {})})


class Watch:
    """Reads a watch with a time-out."""

    def __init__(self, events: AsyncIterator[Event[Any]]) -> None:
        self._events = events

    async def next(self, seconds: float = 5.0) -> str:
        async with asyncio.timeout(seconds):
            event = await anext(self._events)
        return f"{event.type} {event.object.metadata.name}" if event.object else event.type

    async def until_synced(self, seconds: float = 30.0) -> list[str]:
        said = []
        async with asyncio.timeout(seconds):
            while (line := await self.next(seconds)) != EventType.SYNCED:
                said.append(line)
        return said

    async def event(self) -> Event[Any]:
        async with asyncio.timeout(5):
            return await anext(self._events)


@asynccontextmanager
async def watching(store: Store, kind: Any, **selection: Any) -> AsyncIterator[Watch]:
    async with aclosing(store.watch(kind, **selection)) as events:
        yield Watch(events)


# Apply


async def test_an_applied_object_gets_its_identity_and_an_empty_status(store: Store) -> None:
    created = await store.apply(pool(replicas=2), field_manager=ME)

    assert created.metadata.uid
    assert created.metadata.resource_version
    assert created.metadata.generation == 1
    assert created.metadata.creation_timestamp.endswith("Z")
    assert created.spec.replicas == 2
    assert created.status.to_json() == {}
    assert await store.get(GPUPool, CHAT) == created


async def test_apply_of_what_was_read_changes_nothing_and_never_writes_status(store: Store) -> None:
    await store.apply(pool(replicas=2), field_manager=ME)
    told = await store.patch_status(GPUPool, CHAT, {"ready": 1}, field_manager="operator")

    again = await store.apply(told.model_copy(update={"status": told.status.model_copy(update={"ready": 9})}), field_manager=ME)

    assert again.status.ready == 1
    assert again.metadata.generation == 1


async def test_apply_removes_what_this_manager_leaves_out(store: Store) -> None:
    await store.apply(pool(slots=8, placement={"pin": "box"}, labels={"a": "1", "b": "2"}), field_manager=ME)

    after = await store.apply(pool(labels={"b": "2"}), field_manager=ME)

    assert after.spec.slots == 4
    assert after.spec.placement.pin is None
    assert after.metadata.labels == {"b": "2"}
    assert after.metadata.generation == 2


async def test_a_drain_ends_when_its_manifest_no_longer_names_it(store: Store) -> None:
    await store.apply(node("a", drain={"deadlineSeconds": 5}, unschedulable=True), field_manager=ME)

    after = await store.apply(node("a", unschedulable=True), field_manager=ME)

    assert after.spec.drain is None
    assert (await store.get(GPUNode, Key("", "a"))).spec.drain is None


async def test_two_managers_do_not_remove_each_others_fields(store: Store) -> None:
    await store.apply(pool(slots=8, labels={"mine": "1"}), field_manager=ME)
    await store.apply(pool(replicas=3, labels={"yours": "1"}), field_manager=YOU)

    after = await store.apply(pool(slots=2), field_manager=ME)

    assert (after.spec.slots, after.spec.replicas) == (2, 3)
    assert after.metadata.labels == {"yours": "1"}


async def test_on_a_clash_the_last_apply_wins(store: Store) -> None:
    await store.apply(pool(replicas=3), field_manager=ME)
    await store.apply(pool(replicas=4), field_manager=YOU)

    after = await store.apply(pool(replicas=5), field_manager=ME)

    assert after.spec.replicas == 5


async def test_a_scaled_pool_stays_scaled_when_its_manifest_names_no_replicas(store: Store) -> None:
    await store.apply(pool(slots=8), field_manager=ME)
    await store.patch(GPUPool, CHAT, {"spec": {"replicas": 7}}, field_manager="scale")

    after = await store.apply(pool(slots=2), field_manager=ME)

    assert (after.spec.slots, after.spec.replicas) == (2, 7)


async def test_owner_references_are_applied(store: Store) -> None:
    owner = OwnerReference(api_version="v1", kind="Node", name="a", uid="1-2-3")

    applied = await store.apply(GPUNode(metadata=ObjectMeta(name="a", owner_references=[owner])), field_manager=ME)

    assert applied.metadata.owner_references == [owner]


# Patch


async def test_null_drops_a_key_and_the_rest_stays(store: Store) -> None:
    assignment = {
        "pool": "chat",
        "namespace": "default",
        "revision": "1",
        "model": {"source": "file:/m.gguf"},
        "devices": {"GPU-1": {"vramMiB": 10}},
        "slots": 1,
        "contextTokens": 512,
    }
    await store.apply(node("a"), field_manager=ME)
    await store.patch(GPUNode, Key("", "a"), {"spec": {"replicas": {"r1": assignment, "r2": assignment}}}, field_manager=ME)

    after = await store.patch(GPUNode, Key("", "a"), {"spec": {"replicas": {"r1": None}}}, field_manager=ME)

    assert list(after.spec.replicas) == ["r2"]
    assert after.spec.replicas["r2"].devices["GPU-1"].vram_mib == 10
    assert after.metadata.generation == 3


async def test_labels_are_patched_without_a_new_generation(store: Store) -> None:
    await store.apply(pool(labels={"a": "1"}), field_manager=ME)

    after = await store.patch(GPUPool, CHAT, {"metadata": {"labels": {"a": None, "b": "2"}}}, field_manager=YOU)

    assert after.metadata.labels == {"b": "2"}
    assert after.metadata.generation == 1


async def test_status_is_patched_without_touching_spec_or_generation(store: Store) -> None:
    created = await store.apply(pool(replicas=2), field_manager=ME)

    first = await store.patch_status(GPUPool, CHAT, {"ready": 1, "replicas": {"r1": {"node": "a"}}}, field_manager="operator")
    second = await store.patch_status(GPUPool, CHAT, {"replicas": {"r2": {"node": "b"}}}, field_manager="agent")
    third = await store.patch_status(GPUPool, CHAT, {"replicas": {"r1": None}}, field_manager="agent")

    assert second.status.ready == 1
    assert sorted(second.status.replicas) == ["r1", "r2"]
    assert list(third.status.replicas) == ["r2"]
    assert third.metadata.generation == 1
    assert third.spec == created.spec
    assert len({o.metadata.resource_version for o in (created, first, second, third)}) == 4


async def test_unknown_status_of_a_newer_writer_is_dropped_and_the_rest_is_written(store: Store) -> None:
    await store.apply(pool(), field_manager=ME)

    after = await store.patch_status(GPUPool, CHAT, {"ready": 1, "future": {"x": 1}}, field_manager="agent")

    assert after.status.ready == 1


async def test_a_write_meant_for_another_uid_finds_nothing(store: Store) -> None:
    old = await store.apply(pool(), field_manager=ME)
    await store.delete(GPUPool, CHAT)
    new = await store.apply(pool(), field_manager=ME)
    uid = old.metadata.uid

    with pytest.raises(NotFound):
        await store.patch(GPUPool, CHAT, {"spec": {"replicas": 3}}, field_manager=ME, uid=uid)
    with pytest.raises(NotFound):
        await store.patch_status(GPUPool, CHAT, {"ready": 3}, field_manager=ME, uid=uid)
    with pytest.raises(NotFound):
        await store.delete(GPUPool, CHAT, uid=uid)
    assert await store.get(GPUPool, CHAT) == new
    await store.patch_status(GPUPool, CHAT, {"ready": 3}, field_manager=ME, uid=new.metadata.uid)
    await store.delete(GPUPool, CHAT, uid=new.metadata.uid)


async def test_a_write_meant_for_another_version_conflicts(store: Store) -> None:
    old = await store.apply(pool(), field_manager=ME)
    new = await store.patch_status(GPUPool, CHAT, {"ready": 1}, field_manager=ME)
    version = old.metadata.resource_version

    with pytest.raises(Conflict):
        await store.patch(GPUPool, CHAT, {"spec": {"replicas": 3}}, field_manager=ME, resource_version=version)
    with pytest.raises(Conflict):
        await store.patch_status(GPUPool, CHAT, {"ready": 3}, field_manager=ME, resource_version=version)
    assert await store.get(GPUPool, CHAT) == new
    version = new.metadata.resource_version
    after = await store.patch_status(
        GPUPool, CHAT, {"ready": 3}, field_manager=ME, uid=new.metadata.uid, resource_version=version
    )
    assert after.status.ready == 3


async def test_what_is_not_there_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="chat"):
        await store.get(GPUPool, CHAT)
    with pytest.raises(NotFound, match="chat"):
        await store.patch(GPUPool, CHAT, {"spec": {"replicas": 1}}, field_manager=ME)
    with pytest.raises(NotFound, match="chat"):
        await store.patch_status(GPUPool, CHAT, {"ready": 1}, field_manager=ME)
    with pytest.raises(NotFound, match="chat"):
        await store.delete(GPUPool, CHAT)


@pytest.mark.parametrize(
    "spec",
    [
        {"replicas": -1},
        {"replicas": "2"},
        {"model": {"source": "ftp://host/model.gguf"}},
        {"placement": {"pin": "a", "avoid": ["a"]}},
        {"engine": {"args": ["--port", "1"]}},
        {"model": None},
    ],
)
async def test_an_invalid_write_says_where_and_leaves_nothing_written(store: Store, spec: dict[str, Any]) -> None:
    before = await store.apply(pool(), field_manager=ME)

    with pytest.raises(Invalid, match="spec") as refused:
        await store.patch(GPUPool, CHAT, {"spec": {"slots": 9, **spec}}, field_manager=ME)

    assert "\n" not in str(refused.value)
    assert await store.get(GPUPool, CHAT) == before


async def test_an_invalid_status_leaves_nothing_written(store: Store) -> None:
    before = await store.apply(node("a"), field_manager=ME)

    with pytest.raises(Invalid, match="phase"):
        await store.patch_status(GPUNode, Key("", "a"), {"phase": "Fine", "observedGeneration": 1}, field_manager=ME)

    assert await store.get(GPUNode, Key("", "a")) == before


async def test_an_object_with_a_bad_name_is_invalid(store: Store) -> None:
    with pytest.raises(Invalid, match="name"):
        await store.apply(GPUNode(metadata=ObjectMeta(name="Big_Box")), field_manager=ME)
    assert (await store.list(GPUNode)).items == []


async def test_concurrent_patches_from_32_writers_all_land(store: Store) -> None:
    await store.apply(pool(), field_manager=ME)

    async with asyncio.TaskGroup() as group:
        for n in range(32):
            patch = {"replicas": {f"r{n}": {"node": "a"}}}
            group.create_task(store.patch_status(GPUPool, CHAT, patch, field_manager=f"agent-{n}"))

    assert len((await store.get(GPUPool, CHAT)).status.replicas) == 32


# List and watch


async def test_a_list_is_of_one_kind_and_one_namespace(store: Store) -> None:
    for obj in (pool("a"), pool("b", "other")):
        await store.apply(obj, field_manager=ME)
    await store.apply(node("n"), field_manager=ME)

    assert [key_of(p) for p in (await store.list(GPUPool)).items] == [Key("default", "a"), Key("other", "b")]
    assert [key_of(p) for p in (await store.list(GPUPool, namespace="other")).items] == [Key("other", "b")]
    listing = await store.list(GPUNode)
    assert [key_of(n) for n in listing.items] == [Key("", "n")]
    assert listing.resource_version


class PickyNode(GPUNode):
    """A GPUNode as a version would read it that cannot read all of them."""

    spec: PickySpec


class PickySpec(GPUNodeSpec):
    unschedulable: Literal[True]


async def test_an_object_that_this_version_cannot_read_is_skipped_with_one_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for name, unschedulable in (("bad", False), ("good", True)):
        await store.apply(node(name, unschedulable=unschedulable), field_manager=ME)

    with pytest.raises(Invalid, match="unschedulable"):
        await store.get(PickyNode, Key("", "bad"))
    for _ in range(2):
        assert [item.metadata.name for item in (await store.list(PickyNode)).items] == ["good"]
    async with watching(store, PickyNode) as watch:
        assert await watch.until_synced() == ["ADDED good"]
        await store.apply(node("good", unschedulable=False), field_manager=ME)
        await store.apply(node("bad", unschedulable=True), field_manager=ME)
        assert await watch.next() == "ADDED bad"
        await store.delete(GPUNode, Key("", "good"))
        assert await watch.next() == "DELETED good"

    warned = [record.message for record in caplog.records if record.name == "llorch_store.reading"]
    assert len([line for line in warned if "GPUNode bad" in line]) == 1


async def test_a_watch_tells_what_is_there_then_every_change(store: Store) -> None:
    await store.apply(pool("a"), field_manager=ME)
    await store.apply(pool("b"), field_manager=ME)
    async with watching(store, GPUPool) as watch:
        assert await watch.until_synced() == ["ADDED a", "ADDED b"]

        await store.apply(pool("c"), field_manager=ME)
        assert await watch.next() == "ADDED c"
        await store.patch_status(GPUPool, Key("default", "a"), {"ready": 1}, field_manager=ME)
        event = await watch.event()
        assert event.object is not None
        assert (event.type, event.object.status.ready) == (EventType.MODIFIED, 1)
        await store.delete(GPUPool, Key("default", "b"))
        assert await watch.next() == "DELETED b"


async def test_an_object_created_anew_is_told_as_deleted_then_added(store: Store) -> None:
    await store.apply(pool(), field_manager=ME)
    async with watching(store, GPUPool) as watch:
        await watch.until_synced()

        await store.delete(GPUPool, CHAT)
        await store.apply(pool(), field_manager=ME)

        assert await watch.next() == "DELETED chat"
        assert await watch.next() == "ADDED chat"


async def test_a_watch_tells_of_its_own_name_and_namespace_only(store: Store) -> None:
    async with watching(store, GPUPool, namespace="other") as there, watching(store, GPUNode, name="b") as b:
        await there.until_synced()
        await b.until_synced()

        for obj in (pool("p"), pool("q", "other")):
            await store.apply(obj, field_manager=ME)
        for name in ("a", "b", "c"):
            await store.apply(node(name), field_manager=ME)

        assert await there.next() == "ADDED q"
        assert await b.next() == "ADDED b"
        await store.delete(GPUNode, Key("", "a"))
        await store.delete(GPUNode, Key("", "b"))
        assert await b.next() == "DELETED b"


async def test_a_write_that_changes_nothing_is_told_to_nobody(store: Store) -> None:
    await store.apply(pool(replicas=2), field_manager=ME)
    async with watching(store, GPUPool) as watch:
        await watch.until_synced()

        await store.apply(pool(replicas=2), field_manager=ME)
        await store.patch(GPUPool, CHAT, {"spec": {"replicas": 2}}, field_manager=ME)
        await store.patch_status(GPUPool, CHAT, {"ready": 1}, field_manager=ME)
        await store.patch_status(GPUPool, CHAT, {"ready": 1}, field_manager=ME)
        await store.apply(pool("last"), field_manager=ME)

        assert await watch.next() == "MODIFIED chat"
        assert await watch.next() == "ADDED last"


async def test_each_of_many_watchers_is_told_within_a_moment_of_a_write(store: Store) -> None:
    await store.apply(pool(), field_manager=ME)
    async with watching(store, GPUPool) as one, watching(store, GPUPool) as two:
        await one.until_synced()
        await two.until_synced()
        await store.patch_status(GPUPool, CHAT, {"ready": 1}, field_manager=ME)
        assert [await watch.next(seconds=0.3) for watch in (one, two)] == ["MODIFIED chat", "MODIFIED chat"]
