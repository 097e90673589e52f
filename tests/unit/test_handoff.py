"""What a handoff file's bytes mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_agent.core.handoff import (
    LOOPBACK_ONLY,
    MAX_BYTES,
    Added,
    Adopt,
    Changed,
    Ignore,
    Launch,
    Partial,
    Removed,
    UrlPolicy,
    diff,
    file_name,
    launch_document,
    local_id,
    parse,
    same_engine,
)
from llorch_api import AssignedDevice, AssignedModel, Assignment, ReplicaOrigin

PREPARED = {
    "pool_id": "pool-0",
    "replica_id": "r0",
    "engine": "llamacpp",
    "url": "http://127.0.0.1:8081",
    "engine_version": "b1",
    "slots": 4,
}


def entry_of(content: Any, policy: UrlPolicy = LOOPBACK_ONLY) -> Any:
    return parse(json.dumps(content).encode(), policy)


@pytest.mark.parametrize(
    ("producer", "slots", "model"),
    [
        pytest.param(PREPARED, 4, "", id="A: all that a consumer needs"),
        pytest.param(
            {k: v for k, v in PREPARED.items() if k != "slots"}
            | {"provisioning_mode": "source", "model": {"path": "/m/a.gguf"}, "flags": ["--jinja"]},
            None,
            "/m/a.gguf",
            id="B: with the model's path, without slots",
        ),
        pytest.param(
            {k: v for k, v in PREPARED.items() if k != "slots"}
            | {"flags": [], "model": {"id": "hf:a/b", "path": "/m/b.gguf"}, "provisioning_mode": "container"},
            None,
            "/m/b.gguf",
            id="C: with the model's id and path",
        ),
        pytest.param(PREPARED | {"slots_total": 3, "slots_free": 1, "slots": None}, None, "", id="null slots say nothing"),
    ],
)
def test_a_file_with_url_adopts_the_engine_there(producer: dict[str, Any], slots: int | None, model: str) -> None:
    entry = entry_of(producer)

    assert isinstance(entry, Adopt)
    assert (entry.id, entry.url, entry.slots, entry.model_path) == ("pool-0_r0", "http://127.0.0.1:8081", slots, model)


def test_a_model_s_metadata_without_pool_and_url_is_ignored_with_a_reason() -> None:
    entry = entry_of({"model": {"id": "x", "path": "/m/x.gguf"}, "metadata": {"size_bytes": 1, "ctx_max": 4096}})

    assert entry == Ignore("neither url nor pool_id: it describes no engine")


def test_slots_total_counts_where_slots_is_missing() -> None:
    given_ = {k: v for k, v in PREPARED.items() if k != "slots"} | {"slots_total": 6, "slots_free": 2}

    assert entry_of(given_).slots == 6


def test_a_url_alone_is_replica_r0_of_the_default_pool() -> None:
    assert entry_of({"url": "http://localhost:9000/"}) == Adopt(pool="default", replica="r0", url="http://localhost:9000")


@pytest.mark.parametrize(
    ("url", "policy", "accepted"),
    [
        ("http://127.0.0.1:1", UrlPolicy(), "http://127.0.0.1:1"),
        ("http://127.9.9.9:1", UrlPolicy(), "http://127.9.9.9:1"),
        ("http://[::1]:8080", UrlPolicy(), "http://[::1]:8080"),
        ("http://0.0.0.0:8080", UrlPolicy(), "http://127.0.0.1:8080"),
        ("http://10.0.0.7:80", UrlPolicy(), None),
        ("http://10.0.0.7:80", UrlPolicy(frozenset({"10.0.0.7"})), "http://10.0.0.7:80"),
        ("http://gpu-3:80", UrlPolicy(frozenset({"gpu-3"})), "http://gpu-3:80"),
        ("http://gpu-3:80", UrlPolicy(), None),
        ("http://elsewhere:80", UrlPolicy(any_host=True), "http://elsewhere:80"),
        ("http://169.254.169.254/", UrlPolicy(), None),
        ("http://2130706433:80", UrlPolicy(), None),
        ("https://127.0.0.1:1", UrlPolicy(), None),
        ("file:///etc/passwd", UrlPolicy(), None),
        ("http://user@127.0.0.1:1", UrlPolicy(), None),
        ("http://127.0.0.1:1/v1", UrlPolicy(), None),
        ("http://127.0.0.1:99999", UrlPolicy(), None),
        ("http://127.0.0.1:1?x=1", UrlPolicy(), None),
        ("http://", UrlPolicy(), None),
    ],
)
def test_only_engines_on_this_node_are_adopted(url: str, policy: UrlPolicy, accepted: str | None) -> None:
    entry = entry_of(PREPARED | {"url": url}, policy)

    assert (entry.url if isinstance(entry, Adopt) else None) == accepted
    assert isinstance(entry, Adopt) or (isinstance(entry, Ignore) and entry.reason.startswith("url "))


def test_a_file_with_a_model_and_no_url_launches_an_engine() -> None:
    entry = entry_of(
        {
            "pool_id": "chat",
            "replica_id": "r1",
            "model": {"path": "/m/a.gguf"},
            "slots": 2,
            "context_tokens": 512,
            "engine_args": ["--temp", "0.2", "--cache-type-k", "q8_0"],
            "devices": {"GPU-b": 100, "GPU-a": 300},
            "surprise": {"deep": [1]},
        }
    )

    assert entry == Launch(
        pool="chat",
        replica="r1",
        model_path="/m/a.gguf",
        slots=2,
        context_tokens=512,
        engine_args=("--temp", "0.2", "--cache-type-k", "q8_0"),
        devices=(("GPU-b", 100), ("GPU-a", 300)),
    )
    assert entry.id == "chat_r1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"replica_id": None}, "replica_id is missing"),
        ({"pool_id": "../../etc"}, "pool_id '../../etc': 1 to 63 letters"),
        ({"replica_id": "a/b"}, "replica_id 'a/b'"),
        ({"replica_id": ".hidden"}, "replica_id '.hidden'"),
        ({"model": {"path": "a.gguf"}}, "not an absolute path"),
        ({"model": {"path": "/m/../../etc/shadow"}}, "has '..' in it"),
        ({"model": {"path": "/m/a\u0000.gguf"}}, "not an absolute path"),
        ({"model": {}}, "nothing to adopt or to launch"),
        ({"engine_args": ["--host", "0.0.0.0"]}, "--host may not be set"),
        ({"engine_args": ["--log-file=/x"]}, "--log-file may not be set"),
        ({"slots": 0}, "slots: "),
        ({"slots": "many"}, "slots: "),
        ({"context_tokens": -1}, "context_tokens: "),
        ({"devices": {"GPU-a; rm": 1}}, "UUIDs"),
        ({"device_mask": "0 1"}, "UUIDs"),
        ({"origin": "heaven"}, "origin: "),
    ],
)
def test_what_cannot_be_launched_is_ignored_with_a_reason_that_names_the_field(change: dict[str, Any], reason: str) -> None:
    entry = entry_of({"pool_id": "chat", "replica_id": "r1", "model": {"path": "/m/a.gguf"}} | change)

    assert isinstance(entry, Ignore)
    assert reason in entry.reason
    assert "\n" not in entry.reason


@pytest.mark.parametrize("data", [b"", b"{", b'{"pool_id": "a', '{"a": "ü'.encode()[:-1], b"[" * 10_000])
def test_half_a_file_is_read_again(data: bytes) -> None:
    assert isinstance(parse(data), Partial)


@pytest.mark.parametrize("data", [b"[]", b"3", b'"x"', b"null", b"{}", b" " * (MAX_BYTES + 1)])
def test_json_of_another_kind_is_ignored(data: bytes) -> None:
    assert isinstance(parse(data), Ignore)


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_no_bytes_at_all_make_it_raise(data: bytes) -> None:
    parse(data)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.none()
            | st.integers()
            | st.text(max_size=8)
            | st.lists(st.text(max_size=5), max_size=3)
            | st.just({"path": "/a"})
            for name in ("pool_id", "replica_id", "url", "slots", "model", "engine_args", "devices", "pid", "origin")
        },
    )
)
def test_no_object_at_all_makes_it_raise(content: dict[str, Any]) -> None:
    entry_of(content)


def assignment(**changes: Any) -> Assignment:
    values: dict[str, Any] = {
        "pool": "chat",
        "namespace": "team-a",
        "revision": "abc",
        "model": AssignedModel(source="hf:a/b", digest="sha256:1", aliases=["small"]),
        "devices": {"GPU-b": AssignedDevice(vram_mib=200), "GPU-a": AssignedDevice(vram_mib=100)},
        "slots": 4,
        "context_tokens": 2048,
        "engine_args": ["--cache-type-k", "q8_0"],
        "drain_deadline_seconds": 7,
    }
    return Assignment(**(values | changes))


def test_what_the_agent_writes_it_reads_back_whole() -> None:
    entry = parse(launch_document("chat-x7k2p", assignment(), "/models/ab.gguf"))

    assert entry == Launch(
        pool="chat",
        replica="chat-x7k2p",
        model_path="/models/ab.gguf",
        origin=ReplicaOrigin.ASSIGNED,
        digest="sha256:1",
        aliases=("small",),
        slots=4,
        context_tokens=2048,
        engine_args=("--cache-type-k", "q8_0"),
        devices=(("GPU-b", 200), ("GPU-a", 100)),
        namespace="team-a",
        revision="abc",
        drain_deadline_s=7,
    )
    assert entry.id == "chat-x7k2p"
    assert file_name(entry.pool, entry.replica) == "chat_chat-x7k2p.json"


def test_one_assignment_gives_the_same_bytes_every_time() -> None:
    assert launch_document("r", assignment(), "/m") == launch_document("r", assignment(), "/m")


def test_a_replica_s_id_on_its_node_starts_with_its_pool() -> None:
    assert local_id("pool-0", "r0") == "pool-0_r0"
    assert local_id("chat", "chat-x7k2p") == "chat-x7k2p"


def test_an_assigned_replica_keeps_its_id_however_long_its_pool_s_name_is() -> None:
    pool = "p" * 63
    entry = parse(launch_document(f"{pool[:50]}-x7k2p", assignment(pool=pool), "/m"))
    assert isinstance(entry, Launch)
    assert entry.id == f"{pool[:50]}-x7k2p"


def test_only_what_the_engine_sees_makes_it_another_engine() -> None:
    one = parse(launch_document("chat-x", assignment(), "/m/a"))

    assert same_engine(one, parse(launch_document("chat-x", assignment(drain_deadline_seconds=9), "/m/a")))
    assert not same_engine(one, parse(launch_document("chat-x", assignment(slots=5), "/m/a")))
    assert not same_engine(one, parse(launch_document("chat-x", assignment(revision="d"), "/m/a")))
    assert not same_engine(one, entry_of(PREPARED))


def test_a_directory_s_changes_are_named_removals_first() -> None:
    assert diff({"a": "1", "b": "1", "c": "1"}, {"b": "2", "c": "1", "d": "1"}) == [Removed("a"), Changed("b"), Added("d")]
    assert diff({"a": "1"}, {"a": "1"}) == []
