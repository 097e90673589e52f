"""Where replicas go: `plan(pools, nodes) -> Plan`. Pure, of one total order, idempotent, stable under the order of its input.

The plan of a plan's outcome is empty: what it assigned is seen as assigned, and what it drains as draining.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llorch_api import Desired, ReplicaState, Strategy

from .fit import Fit, fit, occupied
from .liveness import Liveness
from .refusal import Refusal
from .views import NodeView, PoolKey, PoolView, ReplicaView


@dataclass(frozen=True, slots=True)
class Assign:
    """Run one more replica of `pool` on `node`; the caller names it."""

    pool: PoolKey
    node: str
    devices: dict[str, int]


@dataclass(frozen=True, slots=True)
class Drain:
    """No new requests for the replica; its engine ends with its last request or at the deadline."""

    node: str
    replica: str
    why: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Take the assignment away; an engine that still runs is stopped."""

    node: str
    replica: str
    why: str


Change = Assign | Drain | Remove


@dataclass(frozen=True, slots=True)
class PoolOutcome:
    """What the plan means for one pool."""

    unplaced: int = 0
    refusals: tuple[Refusal, ...] = ()
    rolling: bool = False
    """Replicas of another revision still run."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes in the order in which they are to be made, and the outcome per pool."""

    changes: tuple[Change, ...] = ()
    pools: dict[PoolKey, PoolOutcome] = field(default_factory=dict)


def plan(pools: Iterable[PoolView], nodes: Iterable[NodeView], *, known: frozenset[PoolKey]) -> Plan:
    """Changes that bring `nodes` nearer to what `pools` want.

    `pools` are those whose model is resolved; `known` are all that exist, so that a pool whose model cannot be read at the
    moment keeps its replicas, and only replicas of pools that are gone are ended.
    """
    board = {node.name: node for node in sorted(nodes, key=lambda node: node.name)}
    changes: list[Change] = []
    outcomes: dict[PoolKey, PoolOutcome] = {}
    for node in board.values():
        changes += _tidy(node, known)
    for pool in sorted(pools, key=lambda pool: (pool.order, pool.key)):
        outcomes[pool.key] = _plan_pool(pool, board, changes)
    return Plan(tuple(changes), outcomes)


def _tidy(node: NodeView, known: frozenset[PoolKey]) -> list[Change]:
    """Replicas whose end is due whatever their pool wants."""
    changes: list[Change] = []
    for replica in sorted(node.replicas, key=lambda replica: replica.id):
        if node.liveness is Liveness.LOST:
            changes.append(Remove(node.name, replica.id, "its node is lost"))
        elif replica.desired is not Desired.RUN:
            never_started = replica.state is None and node.liveness is Liveness.FRESH
            if never_started or replica.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
                changes.append(Remove(node.name, replica.id, "drained"))
        elif replica.pool not in known:
            changes.append(Drain(node.name, replica.id, "its pool is gone"))
    return changes


def _plan_pool(pool: PoolView, board: dict[str, NodeView], changes: list[Change]) -> PoolOutcome:
    mine = [(board[name], replica) for name in board for replica in board[name].replicas if replica.pool == pool.key]
    living = [(node, replica) for node, replica in mine if node.liveness is not Liveness.LOST and replica.desired is Desired.RUN]
    current = [(n, r) for n, r in living if r.revision == pool.revision and not r.broken and not n.leaving]
    broken = [(n, r) for n, r in living if r.revision == pool.revision and r.broken]
    old = [(n, r) for n, r in living if r.revision != pool.revision or (n.leaving and not r.broken)]
    reachable = [(n, r) for n, r in current if n.liveness is not Liveness.OFFLINE]

    missing = pool.replicas - len(current)
    if pool.replicas and current and not reachable:
        missing += 1  # nothing left to serve: one extra now, drained again if its node comes back
    refusals: tuple[Refusal, ...] = ()
    unplaced = max(0, missing)
    for number in range(missing):
        placed, refusals = _place(pool, board)
        if placed is None:
            break
        board[placed.node] = occupied(board[placed.node], pool, placed, f"~{pool.key}~{number}")
        changes.append(Assign(pool.key, placed.node, placed.devices))
        unplaced -= 1

    # A broken replica goes when its successor has a place, or when the pool no longer wants it.
    for position, (node, replica) in enumerate(sorted(broken, key=lambda item: item[1].id)):
        if position < len(broken) - unplaced or missing <= 0:
            changes.append(Remove(node.name, replica.id, f"replaced: {replica.message or 'not ready in time'}"))

    surplus = len(reachable) - pool.replicas
    changes += [Drain(node.name, replica.id, "scaled down") for node, replica in _least_wanted(reachable)[: max(0, surplus)]]
    changes += _retire_old(pool, old, current, blocked=unplaced > 0, failing=bool(broken), draining=_draining(mine))
    return PoolOutcome(unplaced, refusals, rolling=bool(old))


def _place(pool: PoolView, board: dict[str, NodeView]) -> tuple[Fit | None, tuple[Refusal, ...]]:
    fits: list[Fit] = []
    refusals: list[Refusal] = []
    for node in board.values():
        result = fit(pool, node)
        if isinstance(result, Fit):
            fits.append(result)
        else:
            refusals.append(result)
    if not fits:
        return None, tuple(refusals)
    return min(fits, key=lambda candidate: _score(pool, board[candidate.node])), tuple(refusals)


def _score(pool: PoolView, node: NodeView) -> tuple[int, int, int, int, int, str]:
    """Lower is better. Spreading comes before the model's place: two copies on one node die together."""
    of_pool = sum(replica.pool == pool.key and replica.desired is Desired.RUN for replica in node.replicas)
    free = sum(device.free for device in node.devices if device.healthy)
    absent = int(pool.digest not in node.models)
    if pool.placement.strategy is Strategy.SPREAD:
        return (of_pool, absent, -free, node.slots_in_use, 0, node.name)
    return (0, absent, free, node.slots_in_use, -of_pool, node.name)


def _least_wanted(replicas: Sequence[tuple[NodeView, ReplicaView]]) -> list[tuple[NodeView, ReplicaView]]:
    """First to go: not ready, on a node that is not fresh, on the node with most of them, busiest last."""
    per_node: dict[str, int] = {}
    for node, _ in replicas:
        per_node[node.name] = per_node.get(node.name, 0) + 1
    return sorted(
        replicas,
        key=lambda item: (
            item[1].ready,
            -item[0].liveness,
            -per_node[item[0].name],
            item[1].slots - item[1].slots_free,
            item[1].id,
        ),
    )


def _draining(mine: Sequence[tuple[NodeView, ReplicaView]]) -> bool:
    return any(replica.desired is not Desired.RUN and node.liveness is Liveness.FRESH for node, replica in mine)


def _retire_old(
    pool: PoolView,
    old: Sequence[tuple[NodeView, ReplicaView]],
    current: Sequence[tuple[NodeView, ReplicaView]],
    *,
    blocked: bool,
    failing: bool,
    draining: bool,
) -> list[Change]:
    """Old replicas go as new ones become ready; where the new ones find no room, one old one makes it. Failures stop the roll."""
    ordered = _least_wanted(old)
    ready = sum(replica.ready for _, replica in current)
    keep = max(0, pool.replicas - ready)
    retire = ordered[: max(0, len(ordered) - keep)]
    if not retire and blocked and ordered and not failing and not draining:
        retire = ordered[:1]
    return [Drain(node.name, replica.id, "replaced by another revision") for node, replica in retire]
