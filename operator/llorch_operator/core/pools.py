"""The operator's part of a GPUPool's status: endpoints, counts and conditions, from the nodes and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llorch_api import Condition, ConditionReason, Desired, Endpoint, GPUNode, GPUPool, GPUPoolStatus, ReplicaState, ResolvedModel

from .conditions import condition, merge
from .nodes import Pulse, desired_of, handoff_replicas, is_ready, is_serving
from .placement import PoolOutcome
from .refusal import explain
from .views import PoolKey

Reason = ConditionReason


@dataclass(frozen=True, slots=True)
class Seen:
    """A node with its pulse and the base URL that routing may use; empty while no address is known."""

    node: GPUNode
    pulse: Pulse
    base_url: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """What is known of the pool's model: a resolved one, or why there is none."""

    model: ResolvedModel | None
    reason: ConditionReason | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Counted:
    endpoints: dict[str, Endpoint]
    placed: int
    nodes: int
    troubles: tuple[str, ...]


def members(pool: PoolKey, seen: Seen, handoff_namespace: str) -> dict[str, str]:
    """The pool's replicas on a node: endpoint id -> replica id. Ids of handoff files are unique on their node only."""
    node = seen.node
    ids = {rid: rid for rid, wanted in node.spec.replicas.items() if (wanted.namespace, wanted.pool) == pool}
    if pool.namespace == handoff_namespace:
        ids |= {f"{node.metadata.name}.{rid}": rid for rid, name in handoff_replicas(node).items() if name == pool.name}
    return ids


def _count(pool: PoolKey, nodes: Iterable[Seen], handoff_namespace: str) -> _Counted:
    endpoints: dict[str, Endpoint] = {}
    troubles: list[str] = []
    placed, holders = 0, 0
    for seen in sorted(nodes, key=lambda seen: seen.node.metadata.name):
        node = seen.node
        running = {
            eid: rid for eid, rid in members(pool, seen, handoff_namespace).items() if desired_of(node, rid) is Desired.RUN
        }
        placed += len(running)
        holders += bool(running)
        for endpoint_id, replica_id in sorted(running.items()):
            report = node.status.replicas.get(replica_id)
            if report is not None and report.message and report.state is not ReplicaState.READY:
                troubles.append(f"{endpoint_id} on {node.metadata.name}: {report.state.value}: {report.message}")
            if report is not None and seen.base_url and is_ready(node, replica_id) and is_serving(node, seen.pulse):
                endpoints[endpoint_id] = Endpoint(
                    node=node.metadata.name,
                    url=f"{seen.base_url}/replicas/{replica_id}",
                    state=ReplicaState.READY,
                    slots_total=report.slots_total,
                    revision=report.revision,
                )
    return _Counted(endpoints, placed, holders, tuple(troubles))


def status_of(
    pool: GPUPool, nodes: Iterable[Seen], resolution: Resolution, outcome: PoolOutcome | None, *, now: str, handoff_namespace: str
) -> GPUPoolStatus:
    """The operator's fields of the pool's status. `now` is for lastTransitionTime."""
    key = PoolKey(pool.metadata.namespace, pool.metadata.name)
    counted = _count(key, nodes, handoff_namespace)
    wanted, ready = pool.spec.replicas, len(counted.endpoints)
    outcome = outcome or PoolOutcome()
    found = [
        _available(pool, ready, counted),
        _placed(pool, resolution, outcome),
        _progressing(pool, ready, resolution, outcome, counted),
    ]
    return GPUPoolStatus(
        model=resolution.model or pool.status.model,
        endpoints=counted.endpoints,
        desired=wanted,
        current=counted.placed,
        ready=ready,
        nodes=counted.nodes,
        slots_total=sum(endpoint.slots_total for endpoint in counted.endpoints.values()),
        unplaced=outcome.unplaced,
        selector=f"llorch.dev/pool={pool.metadata.name}",
        reason=_headline(found),
        conditions=merge(pool.status.conditions, found, now),
        observed_generation=pool.metadata.generation,
    )


def _available(pool: GPUPool, ready: int, counted: _Counted) -> Condition:
    wanted, generation = pool.spec.replicas, pool.metadata.generation
    text = f"{ready} of {max(wanted, counted.placed)} replicas serve"
    if counted.troubles:
        text += "; " + "; ".join(counted.troubles[:5])
    if ready and ready >= wanted:
        return condition("Available", True, Reason.ALL_READY, text, generation)
    if ready:
        return condition("Available", True, Reason.PARTLY_READY, text, generation)
    if wanted == 0 and not counted.placed:
        return condition("Available", False, Reason.SCALED_TO_ZERO, "no replica is wanted", generation)
    failed = any(f": {ReplicaState.FAILED.value}: " in trouble for trouble in counted.troubles)
    return condition("Available", False, Reason.REPLICA_FAILED if failed else Reason.NOT_READY, text, generation)


def _placed(pool: GPUPool, resolution: Resolution, outcome: PoolOutcome) -> Condition:
    generation = pool.metadata.generation
    if resolution.reason is not None:
        status = None if resolution.reason is Reason.RESOLVING else False
        return condition("Placed", status, resolution.reason, resolution.message, generation)
    if not outcome.unplaced:
        return condition("Placed", True, Reason.ALL_PLACED, "every replica has its place", generation)
    text = f"{outcome.unplaced} of {pool.spec.replicas} replicas fit nowhere: "
    if not outcome.refusals:
        return condition("Placed", False, Reason.NO_NODES, text + "no GPUNode is there", generation)
    return condition("Placed", False, Reason.DOES_NOT_FIT, text + explain(outcome.refusals), generation)


def _progressing(pool: GPUPool, ready: int, resolution: Resolution, outcome: PoolOutcome, counted: _Counted) -> Condition:
    generation = pool.metadata.generation
    if resolution.reason is Reason.RESOLVING:
        return condition("Progressing", True, Reason.RESOLVING, "reading the model's header", generation)
    if outcome.rolling:
        return condition("Progressing", True, Reason.ROLLING_OUT, "replicas of another revision still run", generation)
    if counted.placed > ready:
        return condition("Progressing", True, Reason.NOT_READY, f"{counted.placed - ready} replicas are starting", generation)
    return condition("Progressing", False, Reason.STEADY, "nothing is under way", generation)


def _headline(found: list[Condition]) -> str:
    """The one reason that matters: what keeps it from serving fully, else that all is well."""
    available, placed, progressing = found
    if placed.status != "True":
        return str(placed.reason)
    if available.reason == Reason.ALL_READY and progressing.reason == Reason.ROLLING_OUT:
        return str(progressing.reason)
    return str(available.reason)


def pool_names_without_pool(nodes: Mapping[str, Seen], pools: Iterable[PoolKey], namespace: str) -> set[str]:
    """Names of pools that handoff files speak of and that no GPUPool in `namespace` has."""
    have = {key.name for key in pools if key.namespace == namespace}
    wanted = {name for seen in nodes.values() for name in handoff_replicas(seen.node).values()}
    return wanted - have
