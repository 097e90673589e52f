"""The pure part of the stores: what is refused and how that is said, what a write makes of an object, what a watcher is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_api import GPUNode, GPUPool, ObjectMeta
from llorch_store import Conflict, Event, EventType, Invalid, Key, NotFound
from llorch_store.core import backoff, records
from llorch_store.core.fields import fields_of, pruned, unknown
from llorch_store.core.ownership import Operation, Owner
from llorch_store.core.records import Record, Stamp
from llorch_store.core.validation import parse, readable
from llorch_store.core.watching import Told

SOURCE = {"source": "hf:org/repo"}
POOL = fields_of(GPUPool)


def test_unknown_fields_are_pruned_and_named_with_what_was_meant() -> None:
    document = {
        "spec": {"model": {"source": "hf:a/b", "sha": "x"}, "contextTokenz": 1, "placement": {"nodeSelector": {"any": "1"}}}
    }
    assert list(unknown(POOL, document)) == [
        "spec.model.sha (did you mean sha256?)",
        "spec.contextTokenz (did you mean contextTokens?)",
    ]
    assert pruned(POOL, document) == {"spec": {"model": {"source": "hf:a/b"}, "placement": {"nodeSelector": {"any": "1"}}}}


def _pool(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "chat", "namespace": "default"}, "spec": {"model": SOURCE, **spec}}


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (_pool(replicas=-1), "GPUPool chat: spec.replicas: -1 — must be at least 0"),
        (_pool(replicas=5000), "GPUPool chat: spec.replicas: 5000 — must be at most 1000"),
        (_pool(replicas="3"), 'GPUPool chat: spec.replicas: "3" — must be a whole number'),
        (_pool(slots=True), "GPUPool chat: spec.slots: true — must be a whole number"),
        (_pool(model={}), "GPUPool chat: spec.model.source: is required"),
        (_pool(model="x"), 'GPUPool chat: spec.model: "x" — must be a map'),
        (
            _pool(model={"source": "ftp://h/m.gguf"}),
            (
                'GPUPool chat: spec.model.source: "ftp://h/m.gguf" — must be file:/path, https://…, '
                "hf:org/repo[/file.gguf][@rev], s3://bucket/key or handoff:"
            ),
        ),
        (_pool(placement={"strategy": "best"}), "GPUPool chat: spec.placement.strategy: \"best\" — must be 'pack' or 'spread'"),
        (
            _pool(placement={"pin": "Big_Box"}),
            "GPUPool chat: spec.placement.pin: \"Big_Box\" — must be lowercase letters, digits and '-'",
        ),
        (_pool(placement={"pin": "a", "avoid": ["a"]}), "GPUPool chat: spec.placement: pin names a node that avoid excludes"),
        (_pool(placement={"avoid": ["a", 3]}), "GPUPool chat: spec.placement.avoid[1]: 3 — must be text"),
        (
            _pool(engine={"args": ["--port", "1\n\x1b[2J"]}),
            (
                'GPUPool chat: spec.engine.args: ["--port", "1\\n\\u001b[2J"] — --port: only '
                "llama-server arguments that open no port, path or log may be set; see docs/pools.md"
            ),
        ),
        (_pool(replica=1), "GPUPool chat: unknown field spec.replica (did you mean replicas?)"),
        ({**_pool(), "sepc": {}}, "GPUPool chat: unknown field sepc (did you mean spec?)"),
        ({**_pool(), "kind": "GPUNode"}, 'GPUPool chat: kind: "GPUNode" — must be GPUPool'),
        ({**_pool(), "apiVersion": "v1"}, 'GPUPool chat: apiVersion: "v1" — must be llorch.dev/v1alpha1'),
        ({"spec": {"model": SOURCE}}, "GPUPool: metadata: is required"),
        (
            {**_pool(), "metadata": {"name": "Chat", "namespace": "default"}},
            "GPUPool Chat: metadata.name: 'Chat' — must be lowercase letters, digits, '-' and '.', at most 253",
        ),
        (
            {**_pool(), "metadata": {"name": "chat"}},
            "GPUPool chat: metadata.namespace: '' — must be lowercase letters, digits and '-', 1 to 63",
        ),
        (
            {**_pool(), "metadata": {"name": "c", "namespace": "d", "labels": {"a b": "1", "k": "no spaces"}}},
            (
                "GPUPool c: metadata.labels: 'a b' — must "
                "be [PREFIX/]NAME of letters, digits, '-', '_' and '.', NAME at most 63; metadata.labels.k: 'no spaces' — must "
                "be letters, digits, '-', '_' and '.', at most 63"
            ),
        ),
        (
            _pool(replicas=-1, slots=0, contextTokens=1, drainDeadlineSeconds=-1, placement={"pin": ""}),
            (
                "GPUPool chat: spec.replicas: -1 — must be at least 0; spec.slots: 0 — must be at least 1; "
                "spec.contextTokens: 1 — must be at least 256; and 2 more"
            ),
        ),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line_that_says_what_is_allowed(document: dict[str, Any], line: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse(GPUPool, document)
    assert str(refused.value) == line


def test_a_manifest_as_kubectl_writes_it_is_accepted() -> None:
    document = {
        "apiVersion": "llorch.dev/v1alpha1",
        "kind": "GPUPool",
        "metadata": {
            "name": "chat",
            "namespace": "default",
            "creationTimestamp": None,
            "managedFields": [],
            "finalizers": ["x/y"],
        },
        "spec": {"model": SOURCE, "contextTokens": 4096},
        "status": {"anything": 1},
    }
    pool = parse(GPUPool, document)
    assert pool.spec.context_tokens == 4096
    assert "status" not in pool.to_json()


def test_a_stored_object_of_a_newer_writer_is_read_past_its_unknown_fields() -> None:
    pool = readable(GPUPool, _pool(future={"x": 1}))
    assert pool.metadata.name == "chat"
    with pytest.raises(Invalid):
        readable(GPUPool, _pool(placement={"strategy": "future"}))


# Records


def _stamp(version: int) -> Stamp:
    return Stamp(version, f"uid-{version}", "2026-01-01T00:00:00Z")


def _created(**spec: Any) -> Record:
    return records.applied(parse(GPUPool, _pool(**spec)), None, field_manager="me", stamp=_stamp(1)).record


def test_the_generation_counts_changes_of_spec_alone() -> None:
    created = _created()
    assert created.document["metadata"]["generation"] == 1
    labelled = records.patched(GPUPool, created, {"metadata": {"labels": {"a": "b"}}}, field_manager="me", stamp=_stamp(2))
    told = records.status_patched(GPUPool, labelled.record, {"ready": 1}, stamp=_stamp(3))
    scaled = records.patched(GPUPool, told.record, {"spec": {"replicas": 2}}, field_manager="me", stamp=_stamp(4))
    assert [outcome.object.metadata.generation for outcome in (labelled, told, scaled)] == [1, 1, 2]
    assert [outcome.object.metadata.resource_version for outcome in (labelled, told, scaled)] == ["2", "3", "4"]
    assert scaled.object.metadata.uid == "uid-1"


def test_a_write_that_changes_nothing_makes_no_version() -> None:
    created = _created(replicas=2)
    again = records.applied(parse(GPUPool, _pool(replicas=2)), created, field_manager="you", stamp=_stamp(2))
    assert not again.changed
    assert again.record.version == "1"
    assert Owner("you", Operation.APPLY) in again.record.owners


def test_status_in_an_apply_or_patch_and_spec_in_a_status_patch_are_not_written() -> None:
    created = _created()
    patch = {"spec": {"slots": 2}, "status": {"ready": 7}}
    assert records.patched(GPUPool, created, patch, field_manager="me", stamp=_stamp(2)).object.status.ready == 0
    status = records.status_patched(GPUPool, created, {"spec": {"slots": 2}, "ready": 7}, stamp=_stamp(2))
    assert (status.object.status.ready, status.object.spec.slots) == (7, 4)


def test_identity_cannot_be_patched() -> None:
    with pytest.raises(Invalid, match=r"metadata\.name cannot be patched"):
        records.patched(GPUPool, _created(), {"metadata": {"name": "other"}}, field_manager="me", stamp=_stamp(2))


def test_preconditions_name_the_object_and_the_version() -> None:
    created = _created()
    assert records.require(GPUPool, "chat", created, uid="uid-1", resource_version="1") is created
    with pytest.raises(NotFound):
        records.require(GPUPool, "chat", None, uid="")
    with pytest.raises(NotFound):
        records.require(GPUPool, "chat", created, uid="uid-0", resource_version="0")
    with pytest.raises(Conflict):
        records.require(GPUPool, "chat", created, uid="uid-1", resource_version="0")


# What a watcher is told


def _node(name: str, version: int, uid: str = "") -> GPUNode:
    return GPUNode(metadata=ObjectMeta(name=name, uid=uid or f"{name}-1", resource_version=str(version)))


def _said(events: list[Event[GPUNode]]) -> list[str]:
    objects = [event.object.metadata if event.object else None for event in events]
    return [
        f"{event.type} {metadata.name}@{metadata.resource_version}" if metadata else event.type
        for event, metadata in zip(events, objects, strict=True)
    ]


def test_a_relist_tells_the_difference_to_what_was_told() -> None:
    told = Told[GPUNode]()
    assert _said(told.listed([_node("a", 1), _node("b", 2), _node("c", 3)])) == ["ADDED a@1", "ADDED b@2", "ADDED c@3", "SYNCED"]
    assert _said(told.listed([_node("a", 1), _node("c", 5), _node("d", 6)])) == [
        "DELETED b@2",
        "MODIFIED c@5",
        "ADDED d@6",
        "SYNCED",
    ]


def test_no_object_is_told_twice_at_one_version() -> None:
    told = Told[GPUNode]()
    told.listed([_node("a", 1)])
    assert told.changed(_node("a", 1)) == []
    assert _said(told.changed(_node("a", 2))) == ["MODIFIED a@2"]
    assert told.changed(_node("a", 2)) == []
    assert _said(told.deleted(Key("", "a"), _node("a", 3))) == ["DELETED a@3"]
    assert told.deleted(Key("", "a")) == []


def test_an_object_created_anew_is_told_as_deleted_and_added() -> None:
    told = Told[GPUNode]()
    told.listed([_node("a", 1)])
    assert _said(told.changed(_node("a", 9, "a-2"))) == ["DELETED a@1", "ADDED a@9"]


def test_an_object_that_became_unreadable_has_not_vanished() -> None:
    told = Told[GPUNode]()
    told.listed([_node("a", 1)])
    assert [event.type for event in told.listed([], unreadable=[Key("", "a")])] == [EventType.SYNCED]


# Backoff


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_backoff_grows_to_ten_seconds_and_is_never_less_than_asked_for(failures: int, chance: float) -> None:
    assert 0.25 <= backoff.delay(failures, chance) <= 10
    assert backoff.delay(failures, chance, retry_after=7) >= 7
