"""What a gateway serves: pools by the names that clients ask for, and the replicas behind each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

from llorch_api import Endpoint, GPUPool, ReplicaState
from llorch_api.gpupool import HANDOFF_SOURCE


class PoolKey(NamedTuple):
    """Names a GPUPool."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class EndpointView:
    """A replica in routing."""

    id: str
    """Its id in the pool's status, unique over all nodes."""
    replica: str
    """Its id on its agent: another one where a handoff file brought it."""
    node: str
    agent: str
    """Base URL of its agent."""
    url: str
    """Its own base URL; /v1 is appended."""
    slots: int


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool as the gateway sees it."""

    key: PoolKey
    name: str
    """The name clients ask for."""
    created: int
    """Seconds since the epoch; 0 where unknown."""
    endpoints: tuple[EndpointView, ...]
    kept: bool
    """The endpoints are the last known ones: none are published now, though the pool is still wanted. Such a replica gets
    requests only while its own agent says that it is ready."""
    reason: str
    """The one reason that matters, out of the pool's status."""
    replicas: tuple[tuple[str, str, str, int], ...]
    """(replica, node, state, percent of its download) as the agents report them."""


@dataclass(frozen=True, slots=True)
class NameConflict:
    """An alias that an older pool has already."""

    alias: str
    owner: PoolKey
    loser: PoolKey


class PoolTable:
    """All pools by name and alias. Immutable: a change makes a new table."""

    def __init__(self, pools: Mapping[str, PoolView], aliases: Mapping[str, str], conflicts: Iterable[NameConflict]) -> None:
        self._pools = dict(sorted(pools.items()))
        self._aliases = dict(sorted(aliases.items()))
        self.conflicts = tuple(conflicts)

    def resolve(self, model: str) -> PoolView | None:
        """The pool that answers to `model`, by its name or by an alias."""
        return self._pools.get(model) or self._pools.get(self._aliases.get(model, ""))

    def models(self) -> list[tuple[str, PoolView]]:
        """Every name that is answered to, with its pool."""
        return [*self._pools.items(), *((alias, self._pools[name]) for alias, name in self._aliases.items())]

    def pools(self) -> Iterable[PoolView]:
        """Every pool once."""
        return self._pools.values()

    def agents(self) -> set[str]:
        """Base URLs of all agents that hold a replica."""
        return {endpoint.agent for pool in self._pools.values() for endpoint in pool.endpoints}


EMPTY = PoolTable({}, {}, ())


def build(objects: Iterable[GPUPool], previous: PoolTable, *, qualified: bool) -> PoolTable:
    """The table for `objects`. `qualified` names pools `namespace/name`, for gateways that serve several namespaces."""
    last_known = {pool.key: pool for pool in previous.pools()}
    oldest_first = sorted(objects, key=lambda each: (_created(each), each.metadata.namespace, each.metadata.name))
    pools: dict[str, PoolView] = {}
    for each in oldest_first:
        view = _view(each, last_known.get(PoolKey(each.metadata.namespace, each.metadata.name)), qualified)
        pools[view.name] = view
    aliases: dict[str, str] = {}
    conflicts: list[NameConflict] = []
    for each in oldest_first:
        name = _served_name(each, qualified)
        for plain in each.spec.model.aliases:
            alias = f"{each.metadata.namespace}/{plain}" if qualified else plain
            if alias in (name, ""):
                continue
            taken_by = alias if alias in pools else aliases.setdefault(alias, name)
            if taken_by != name:
                conflicts.append(NameConflict(alias, pools[taken_by].key, pools[name].key))
    return PoolTable(pools, aliases, conflicts)


def load_state(pool: PoolView) -> str:
    """Why the pool does not answer, for people: `NotReady; chat-x2b4d on gpu-1 is Fetching (40 %)`."""
    shown = [
        f"{replica} on {node} is {state}" + (f" ({percent} %)" if state == ReplicaState.FETCHING else "")
        for replica, node, state, percent in pool.replicas[:5]
        if state != ReplicaState.READY
    ]
    return "; ".join([pool.reason or "its replicas are not placed yet", *shown])


def _served_name(pool: GPUPool, qualified: bool) -> str:
    return f"{pool.metadata.namespace}/{pool.metadata.name}" if qualified else pool.metadata.name


def _endpoint(id_: str, endpoint: Endpoint) -> EndpointView | None:
    url = endpoint.url.rstrip("/")
    agent, _, replica = url.rpartition("/replicas/")
    return EndpointView(id_, replica, endpoint.node, agent, url, endpoint.slots_total) if agent and replica else None


def _view(pool: GPUPool, before: PoolView | None, qualified: bool) -> PoolView:
    view = PoolView(
        key=PoolKey(pool.metadata.namespace, pool.metadata.name),
        name=_served_name(pool, qualified),
        created=_created(pool),
        endpoints=tuple(
            view
            for id_, endpoint in sorted(pool.status.endpoints.items())
            if endpoint.state is ReplicaState.READY and (view := _endpoint(id_, endpoint)) is not None
        ),
        kept=False,
        reason=pool.status.reason,
        replicas=tuple(
            (replica, each.node, each.state.value, each.progress_percent)
            for replica, each in sorted(pool.status.replicas.items())
        ),
    )
    wanted = pool.spec.replicas > 0 or pool.spec.model.source == HANDOFF_SOURCE
    if not view.endpoints and wanted and before is not None and before.endpoints:
        return replace(view, endpoints=before.endpoints, kept=True)
    return view


def _created(pool: GPUPool) -> int:
    try:
        return int(datetime.fromisoformat(pool.metadata.creation_timestamp).timestamp())
    except ValueError:
        return 0
