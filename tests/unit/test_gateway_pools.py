"""Which names a gateway answers to, and which replicas stand behind them."""

from __future__ import annotations

from typing import Any

import pytest

from llorch_api import GPUPool
from llorch_gateway.core.pools import EMPTY, PoolKey, PoolTable, build, load_state
from llorch_gateway.settings import GatewaySettings


def pool(
    name: str,
    *,
    namespace: str = "default",
    created: str = "2026-01-01T00:00:00Z",
    aliases: tuple[str, ...] = (),
    endpoints: tuple[str, ...] = (),
    state: str = "Ready",
    replicas: int = 1,
    source: str = "file:/m.gguf",
    **status: Any,
) -> GPUPool:
    """A pool with `endpoints` on agents a, b, … in this order."""
    urls = {
        each: {"node": f"n{number}", "url": f"http://10.0.0.{number}:9200/replicas/{each}", "state": state, "slotsTotal": 4}
        for number, each in enumerate(endpoints, start=1)
    }
    return GPUPool.model_validate(
        {
            "metadata": {"name": name, "namespace": namespace, "creationTimestamp": created},
            "spec": {"model": {"source": source, "aliases": list(aliases)}, "replicas": replicas},
            "status": {"endpoints": urls, **status},
        }
    )


def with_endpoint(endpoint_id: str, url: str) -> GPUPool:
    """Pool `a` with one endpoint."""
    made = pool("a")
    return made.model_validate({**made.to_json(), "status": {"endpoints": {endpoint_id: {"url": url}}}})


def table(*pools: GPUPool, previous: PoolTable = EMPTY, qualified: bool = False) -> PoolTable:
    return build(pools, previous, qualified=qualified)


def endpoints(of: PoolTable, model: str) -> list[str]:
    found = of.resolve(model)
    assert found is not None
    return [endpoint.replica for endpoint in found.endpoints]


def test_a_pool_answers_to_its_name_and_its_aliases_and_to_nothing_else() -> None:
    known = table(pool("chat", aliases=("gpt-4o", "chat"), endpoints=("chat-1", "chat-2")))
    for name in ("chat", "gpt-4o"):
        found = known.resolve(name)
        assert found is not None
        assert found.name == "chat"
        assert [(each.agent, each.url, each.slots) for each in found.endpoints] == [
            ("http://10.0.0.1:9200", "http://10.0.0.1:9200/replicas/chat-1", 4),
            ("http://10.0.0.2:9200", "http://10.0.0.2:9200/replicas/chat-2", 4),
        ]
    assert known.resolve("") is None
    assert known.resolve("CHAT") is None
    assert [name for name, _ in known.models()] == ["chat", "gpt-4o"]
    assert known.agents() == {"http://10.0.0.1:9200", "http://10.0.0.2:9200"}


@pytest.mark.parametrize("order", [1, -1])
def test_the_oldest_pool_keeps_an_alias_whatever_the_order_they_come_in(order: int) -> None:
    older = pool("b", aliases=("x",), created="2026-01-01T00:00:00Z")
    newer = pool("a", aliases=("x",), created="2026-01-02T00:00:00Z")
    known = table(*(older, newer)[::order])
    found = known.resolve("x")
    assert found is not None
    assert found.name == "b"
    assert [(each.alias, each.owner, each.loser) for each in known.conflicts] == [
        ("x", PoolKey("default", "b"), PoolKey("default", "a"))
    ]


def test_a_pools_own_name_beats_an_older_pools_alias() -> None:
    known = table(pool("b", aliases=("a",)), pool("a", created="2026-01-02T00:00:00Z"))
    found = known.resolve("a")
    assert found is not None
    assert found.name == "a"
    assert known.conflicts[0].loser.name == "b"


def test_with_several_namespaces_the_namespace_is_part_of_the_name() -> None:
    known = table(pool("chat", aliases=("x",)), pool("chat", namespace="team", aliases=("x",)), qualified=True)
    assert [name for name, _ in known.models()] == ["default/chat", "team/chat", "default/x", "team/x"]
    assert known.resolve("chat") is None
    assert not known.conflicts


def test_only_ready_endpoints_are_routed_to() -> None:
    assert endpoints(table(pool("a", endpoints=("a-1",), state="Draining")), "a") == []


def test_an_endpoint_whose_url_is_no_replicas_url_is_left_out() -> None:
    for url in ("http://10.0.0.1:9200/x", "http://10.0.0.1:9200/replicas/", "/replicas/a-1", ""):
        assert endpoints(table(with_endpoint("a-1", url)), "a") == []


def test_the_last_known_endpoints_are_kept_when_all_would_vanish_from_a_pool_that_is_wanted() -> None:
    before = table(pool("a", endpoints=("a-1", "a-2")))
    gone = table(pool("a"), previous=before)
    found = gone.resolve("a")
    assert found is not None
    assert found.kept
    assert endpoints(gone, "a") == ["a-1", "a-2"]
    assert endpoints(table(pool("a"), previous=gone), "a") == ["a-1", "a-2"]
    back = table(pool("a", endpoints=("a-3",)), previous=gone).resolve("a")
    assert back is not None
    assert not back.kept
    assert [each.replica for each in back.endpoints] == ["a-3"]


def test_an_engine_out_of_a_handoff_file_has_a_name_of_its_node_and_one_of_its_agent() -> None:
    found = table(with_endpoint("gpu-1.r0", "http://10.0.0.1:9200/replicas/r0/")).resolve("a")
    assert found is not None
    (endpoint,) = found.endpoints
    assert (endpoint.id, endpoint.replica, endpoint.agent) == ("gpu-1.r0", "r0", "http://10.0.0.1:9200")
    assert endpoint.url == "http://10.0.0.1:9200/replicas/r0"


def test_one_endpoint_less_is_one_less() -> None:
    before = table(pool("a", endpoints=("a-1", "a-2")))
    assert endpoints(table(pool("a", endpoints=("a-1",)), previous=before), "a") == ["a-1"]


def test_a_pool_that_is_scaled_to_zero_or_deleted_keeps_nothing() -> None:
    before = table(pool("a", endpoints=("a-1",)))
    assert endpoints(table(pool("a", replicas=0), previous=before), "a") == []
    assert table(previous=before).resolve("a") is None


def test_a_pool_of_handed_over_engines_is_wanted_though_nobody_asked_for_replicas() -> None:
    before = table(pool("a", endpoints=("a-1",), replicas=0, source="handoff:"))
    assert endpoints(table(pool("a", replicas=0, source="handoff:"), previous=before), "a") == ["a-1"]


def test_the_load_state_says_what_is_waited_for() -> None:
    loading = pool("a", reason="NotReady", replicas=2)
    known = table(
        loading.model_validate(
            {
                **loading.to_json(),
                "status": {
                    "reason": "NotReady",
                    "replicas": {
                        "a-1": {"node": "gpu-1", "state": "Loading"},
                        "a-2": {"node": "gpu-2", "state": "Ready"},
                        "a-3": {"node": "gpu-3", "state": "Fetching", "progressPercent": 40},
                    },
                },
            }
        )
    ).resolve("a")
    assert known is not None
    assert load_state(known) == "NotReady; a-1 on gpu-1 is Loading; a-3 on gpu-3 is Fetching (40 %)"
    fresh = table(pool("b")).resolve("b")
    assert fresh is not None
    assert load_state(fresh) == "its replicas are not placed yet"


@pytest.mark.parametrize(
    ("value", "namespaces", "qualified"),
    [("default", ("default",), False), ("a,b", ("a", "b"), True), ("*", (None,), True), ("a,a", ("a",), False)],
)
def test_the_namespaces_to_serve_are_one_several_or_all(
    value: str, namespaces: tuple[str | None, ...], qualified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLORCH_NAMESPACE", value)
    settings = GatewaySettings()
    assert (settings.namespaces, settings.qualified) == (namespaces, qualified)
