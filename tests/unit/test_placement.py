"""Where replicas go, and why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch_api import Desired, ModelShape, PlacementSpec, ReplicaState, Strategy
from llorch_operator.core.fit import available, need_of
from llorch_operator.core.liveness import Liveness
from llorch_operator.core.placement import Assign, Drain, Plan, Remove, plan
from llorch_operator.core.refusal import Cause, Refusal, explain
from llorch_operator.core.views import DeviceView, NodeView, PoolKey, PoolView, ReplicaView

GIB = 1024
CHAT = PoolKey("default", "chat")
SHAPE = ModelShape(
    architecture="llama",
    layers=32,
    embedding_length=4096,
    vocab_size=128_256,
    context_length=8192,
    weights_mib=4403,
    host_mib=282,
    kv_key_elements=32 * 1024,
    kv_value_elements=32 * 1024,
)


def gpu(name: str, free: int, total: int = 24 * GIB, *, foreign: int = 0, healthy: bool = True) -> DeviceView:
    return DeviceView(name, "gpu", "NVIDIA L4", total, free, foreign, healthy, (8, 9))


def node(name: str, *devices: DeviceView, **changes: object) -> NodeView:
    return replace(NodeView(name, Liveness.FRESH, True, devices=devices, disk_free=100 * GIB), **changes)  # type: ignore[arg-type]


def pool(**changes: object) -> PoolView:
    base = PoolView(
        key=CHAT,
        order="1",
        revision="r1",
        replicas=1,
        slots=4,
        context_tokens=4096,
        kv_cache_type="f16",
        engine_args=(),
        placement=PlacementSpec(),
        shape=SHAPE,
        digest="sha256:1",
        model_size=4700,
        must_fetch=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def replica(replica_id: str, on: str, **changes: object) -> ReplicaView:
    base = ReplicaView(replica_id, CHAT, on, "r1", Desired.RUN, {f"{on}-0": 7000}, 4, ReplicaState.READY, 0, 4)
    return replace(base, **changes)  # type: ignore[arg-type]


def run(pools: list[PoolView], nodes: list[NodeView]) -> Plan:
    return plan(pools, nodes, known=frozenset(item.key for item in pools))


def carry_out(result: Plan, nodes: list[NodeView], pools: list[PoolView]) -> list[NodeView]:
    """The nodes as they look once the plan is written and before any agent has reacted."""
    board = {item.name: item for item in nodes}
    by_key = {item.key: item for item in pools}
    for number, change in enumerate(result.changes):
        old = board[change.node]
        match change:
            case Assign(pool=key, node=name, devices=devices):
                mib = sum(devices.values())
                wanted = by_key[key]
                new = ReplicaView(
                    f"n{number}", key, name, wanted.revision, Desired.RUN, devices, wanted.slots, None, mib, wanted.slots
                )
                board[name] = replace(old, replicas=(*old.replicas, new))
            case Drain(node=name, replica=replica_id):
                kept = tuple(replace(r, desired=Desired.DRAIN) if r.id == replica_id else r for r in old.replicas)
                board[name] = replace(old, replicas=kept)
            case Remove(node=name, replica=replica_id):
                board[name] = replace(old, replicas=tuple(r for r in old.replicas if r.id != replica_id))
    return list(board.values())


def test_a_replica_goes_to_the_node_with_the_most_free_memory() -> None:
    result = run([pool()], [node("a", gpu("a-0", 9 * GIB)), node("b", gpu("b-0", 20 * GIB))])
    assert result.changes == (Assign(CHAT, "b", {"b-0": need_of(pool(), "gpu").total_mib}),)


def test_replicas_of_a_pool_spread_over_nodes_before_the_models_place_counts() -> None:
    nodes = [node("a", gpu("a-0", 20 * GIB), models=frozenset({"sha256:1"})), node("b", gpu("b-0", 9 * GIB))]
    assert [change.node for change in run([pool(replicas=2)], nodes).changes] == ["a", "b"]


def test_pack_fills_the_fullest_node_that_still_has_room() -> None:
    nodes = [node("a", gpu("a-0", 20 * GIB)), node("b", gpu("b-0", 9 * GIB))]
    packed = pool(placement=PlacementSpec(strategy=Strategy.PACK))
    assert [change.node for change in run([packed], nodes).changes] == ["b"]


def test_memory_that_others_use_is_not_capacity_and_the_refusal_has_the_arithmetic() -> None:
    needed = need_of(pool(), "gpu").total_mib
    result = run([pool()], [node("gpu-3", gpu("x", 5120, foreign=16_384))])
    assert result.changes == ()
    outcome = result.pools[CHAT]
    assert outcome.unplaced == 1
    assert explain(outcome.refusals) == f"gpu-3: needs {needed:,} MiB, 5,120 free of 24,576 (foreign 16,384)"


def test_a_promise_counts_in_full_until_the_agent_reports_what_is_left_of_it() -> None:
    promised = replica("chat-1", "a", state=None, reserved=7000)
    reported = replica("chat-1", "a", reserved=1000)
    assert available(node("a", gpu("a-0", 10_000), replicas=(promised,))) == {"a-0": 3000}
    assert available(node("a", gpu("a-0", 10_000), replicas=(reported,))) == {"a-0": 9000}


@pytest.mark.parametrize(
    ("changes", "placement", "said"),
    [
        ({"placeable": False, "why_not": "Offline"}, {}, "n: Offline"),
        ({}, {"pin": "other"}, "n: the pool is pinned to other"),
        ({}, {"avoid": ["n"]}, "n: the pool avoids it"),
        ({}, {"node_selector": {"disk": "ssd"}}, "n: label disk is not set, not ssd"),
        ({}, {"gpu_selector": {"name": "H100"}}, "n: none of 1 devices matches"),
        ({}, {"gpu_selector": {"minComputeCapability": "9.0"}}, "n: none of 1 devices matches"),
        ({}, {"gpu_selector": {"minVramMiB": "40000"}}, "n: none of 1 devices matches"),
        ({"devices": ()}, {}, "n: has no GPU, and the pool does not allow the CPU (placement.allowCPU)"),
        ({"devices": (gpu("x", 20 * GIB, healthy=False),)}, {}, "n: none of 1 devices matches, 1 unhealthy"),
        ({"disk_free": 100}, {}, "n: the model takes 4,700 MiB of disk, 100 free"),
    ],
)
def test_every_refusal_names_its_reason(changes: dict[str, object], placement: dict[str, object], said: str) -> None:
    result = run([pool(placement=PlacementSpec(**placement))], [node("n", gpu("x", 20 * GIB), **changes)])  # type: ignore[arg-type]
    assert [str(refusal) for refusal in result.pools[CHAT].refusals] == [said]


def test_a_file_source_goes_only_where_the_file_is() -> None:
    nodes = [node("a", gpu("a-0", 20 * GIB)), node("b", gpu("b-0", 10 * GIB))]
    assert [c.node for c in run([pool(must_fetch=False, present_on=frozenset({"b"}))], nodes).changes] == ["b"]


def test_the_cpu_is_used_only_where_the_pool_allows_it_and_no_gpu_is_there() -> None:
    cpu = DeviceView("cpu", "cpu", "AMD EPYC", 32 * GIB, 30 * GIB, 0, True)
    assert run([pool()], [node("a", cpu)]).changes == ()
    allowed = pool(placement=PlacementSpec(allow_cpu=True))
    assert [c.node for c in run([allowed], [node("a", cpu)]).changes] == ["a"]
    assert run([allowed], [node("a", cpu, gpu("g", 100))]).changes == ()


def test_a_model_too_big_for_one_gpu_is_split_only_when_allowed() -> None:
    nodes = [node("a", gpu("a-0", 6 * GIB), gpu("a-1", 5 * GIB))]
    assert run([pool()], nodes).changes == ()
    (change,) = run([pool(placement=PlacementSpec(allow_split=True))], nodes).changes
    assert isinstance(change, Assign)
    assert set(change.devices) == {"a-0", "a-1"}
    assert change.devices["a-0"] <= 6 * GIB
    assert change.devices["a-1"] <= 5 * GIB


def test_replicas_of_a_lost_node_are_placed_elsewhere_and_taken_away_there() -> None:
    dead = node("a", gpu("a-0", 0), liveness=Liveness.LOST, placeable=False, replicas=(replica("chat-1", "a"),))
    changes = run([pool()], [dead, node("b", gpu("b-0", 20 * GIB))]).changes
    assert changes[0] == Remove("a", "chat-1", "its node is lost")
    assert [c.node for c in changes if isinstance(c, Assign)] == ["b"]


def test_replicas_of_an_offline_node_wait_but_a_pool_with_nothing_left_gets_one_extra() -> None:
    def offline(name: str, replica_id: str) -> NodeView:
        return node(name, gpu(f"{name}-0", 0), liveness=Liveness.OFFLINE, placeable=False, replicas=(replica(replica_id, name),))

    alive = node("b", gpu("b-0", 20 * GIB), replicas=(replica("chat-2", "b"),))
    assert run([pool(replicas=2)], [offline("a", "chat-1"), alive]).changes == ()
    spare = node("c", gpu("c-0", 20 * GIB))
    changes = run([pool(replicas=1)], [offline("a", "chat-1"), spare]).changes
    assert [c.node for c in changes] == ["c"]


def test_the_extra_one_is_drained_when_the_node_comes_back() -> None:
    nodes = [
        node("a", gpu("a-0", 0), replicas=(replica("chat-1", "a"),)),
        node("b", gpu("b-0", 0), replicas=(replica("chat-2", "b"),)),
    ]
    changes = run([pool(replicas=1)], nodes).changes
    assert len(changes) == 1
    assert isinstance(changes[0], Drain)


def test_a_failed_replica_is_replaced_elsewhere_and_kept_for_the_eye_where_nothing_else_fits() -> None:
    failed = node(
        "a", gpu("a-0", 20 * GIB), replicas=(replica("chat-1", "a", state=ReplicaState.FAILED, message="out of memory"),)
    )
    unfit = pool(unfit=frozenset({"a"}))
    changes = run([unfit], [failed, node("b", gpu("b-0", 20 * GIB))]).changes
    assert [type(c) for c in changes] == [Assign, Remove]
    alone = run([unfit], [failed])
    assert alone.changes == ()
    assert [refusal.cause for refusal in alone.pools[CHAT].refusals] == [Cause.FAILED]


def test_replicas_of_a_deleted_pool_are_drained_and_those_of_an_unreadable_model_kept() -> None:
    nodes = [node("a", gpu("a-0", 0), replicas=(replica("chat-1", "a"),))]
    assert run([], nodes).changes == (Drain("a", "chat-1", "its pool is gone"),)
    assert plan([], nodes, known=frozenset({CHAT})).changes == ()


def test_a_drained_replica_is_taken_away_once_its_engine_has_stopped() -> None:
    stopped = replica("chat-1", "a", desired=Desired.DRAIN, state=ReplicaState.STOPPED)
    busy = replica("chat-2", "a", desired=Desired.DRAIN, state=ReplicaState.DRAINING)
    assert run([pool(replicas=0)], [node("a", replicas=(stopped, busy))]).changes == (Remove("a", "chat-1", "drained"),)


def test_a_new_revision_starts_before_the_old_one_is_drained_where_memory_allows() -> None:
    roomy = [node("a", gpu("a-0", 20 * GIB), replicas=(replica("chat-1", "a", revision="r0"),))]
    first = run([pool()], roomy)
    assert [type(c) for c in first.changes] == [Assign]
    after = [replace(roomy[0], replicas=(*roomy[0].replicas, replica("chat-2", "a")))]
    assert run([pool()], after).changes == (Drain("a", "chat-1", "replaced by another revision"),)


def test_where_memory_is_short_one_old_replica_makes_room_at_a_time() -> None:
    tight = [
        node("a", gpu("a-0", 100), replicas=(replica("chat-1", "a", revision="r0"),)),
        node("b", gpu("b-0", 100), replicas=(replica("chat-2", "b", revision="r0"),)),
    ]
    (change,) = run([pool(replicas=2)], tight).changes
    assert isinstance(change, Drain)
    draining = carry_out(run([pool(replicas=2)], tight), tight, [pool(replicas=2)])
    assert run([pool(replicas=2)], draining).changes == ()


def test_a_failing_roll_out_stops_draining_the_old_revision() -> None:
    broken = replica("chat-9", "a", state=ReplicaState.FAILED)
    nodes = [node("a", gpu("a-0", 100), replicas=(replica("chat-1", "a", revision="r0"), broken))]
    assert run([pool(unfit=frozenset({"a"}))], nodes).changes == ()


def test_scaling_down_takes_those_that_do_not_serve_first() -> None:
    nodes = [node("a", replicas=(replica("chat-1", "a"), replica("chat-2", "a", state=ReplicaState.LOADING)))]
    assert run([pool(replicas=1)], nodes).changes == (Drain("a", "chat-2", "scaled down"),)


def test_the_nearest_ten_nodes_are_named_and_the_rest_counted() -> None:
    refusals = [Refusal(f"n{i:02}", Cause.MEMORY, needed=7000, free=i * 100, total=8000) for i in range(12)]
    refusals.append(Refusal("z", Cause.SELECTOR, "the pool avoids it"))
    text = explain(refusals)
    assert text.startswith("n11: needs 7,000 MiB, 1,100 free of 8,000; n10: ")
    assert text.endswith("; and 1 excluded by the placement, 2 memory")


frees = st.integers(0, 30 * GIB)


@st.composite
def fleets(draw: st.DrawFn) -> list[NodeView]:
    nodes = []
    for number in range(draw(st.integers(0, 5))):
        name = f"n{number}"
        devices = tuple(gpu(f"{name}-{i}", draw(frees), 30 * GIB) for i in range(draw(st.integers(0, 3))))
        nodes.append(node(name, *devices, placeable=draw(st.booleans()) or draw(st.booleans())))
    return nodes


pools = st.lists(
    st.builds(
        lambda n, count, split, strategy, slots: pool(
            key=PoolKey("default", f"p{n}"), order=str(n), replicas=count, slots=slots,
            placement=PlacementSpec(allow_split=split, strategy=strategy),
        ),
        st.integers(0, 4), st.integers(0, 6), st.booleans(), st.sampled_from(Strategy), st.integers(1, 8),
    ),
    max_size=4,
    unique_by=lambda item: item.key,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(pools, fleets())
def test_no_plan_ever_promises_more_memory_than_is_free(wanted: list[PoolView], nodes: list[NodeView]) -> None:
    for item in carry_out(run(wanted, nodes), nodes, wanted):
        promised = {device.uuid: sum(r.devices.get(device.uuid, 0) for r in item.replicas) for device in item.devices}
        assert all(promised[device.uuid] <= device.free for device in item.devices)


@settings(max_examples=150, deadline=None)
@given(pools, fleets())
def test_a_plan_carried_out_leaves_nothing_to_plan(wanted: list[PoolView], nodes: list[NodeView]) -> None:
    after = carry_out(run(wanted, nodes), nodes, wanted)
    assert run(wanted, after).changes == ()


@settings(max_examples=100, deadline=None)
@given(pools, fleets(), st.randoms())
def test_the_order_of_pools_and_nodes_changes_nothing(wanted: list[PoolView], nodes: list[NodeView], random: object) -> None:
    other_pools, other_nodes = wanted[:], nodes[:]
    random.shuffle(other_pools)  # type: ignore[attr-defined]
    random.shuffle(other_nodes)  # type: ignore[attr-defined]
    assert run(wanted, nodes).changes == run(other_pools, other_nodes).changes


@settings(max_examples=100, deadline=None)
@given(pools, fleets())
def test_every_unplaced_replica_has_a_reason_for_each_node(wanted: list[PoolView], nodes: list[NodeView]) -> None:
    for outcome in run(wanted, nodes).pools.values():
        if outcome.unplaced:
            assert {refusal.node for refusal in outcome.refusals} == {item.name for item in nodes}
            assert all(str(refusal) for refusal in outcome.refusals)
