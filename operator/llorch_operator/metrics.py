"""Prometheus metrics of the operator, read from its state at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .core.liveness import Liveness
from .fleet import Fleet


class OperatorMetrics(Collector):
    """Nodes by liveness, replicas per pool, and how many writes it took."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Called by each scrape."""
        tracker = self._fleet.tracker
        by_state = Counter(tracker.state(name) for name in self._fleet.nodes)
        nodes = GaugeMetricFamily("llorch_nodes", "GPUNodes by liveness", labels=["liveness"])
        for state in Liveness:
            nodes.add_metric([state.name.lower()], by_state[state])
        yield nodes
        yield GaugeMetricFamily(
            "orchd_nodes_online", "GPUNodes that are not Offline", value=sum(map(self._fleet.live, self._fleet.nodes))
        )
        pools = GaugeMetricFamily("llorch_pool_replicas", "Replicas of a pool", labels=["namespace", "pool", "which"])
        available = GaugeMetricFamily("orchd_pools_available", "1 while the pool serves", labels=["pool_id"])
        for key, pool in sorted(self._fleet.pools.items()):
            status = pool.status
            for which, count in (("desired", status.desired), ("placed", status.current), ("ready", status.ready)):
                pools.add_metric([key.namespace, key.name, which], count)
            available.add_metric([str(key)], int(status.ready > 0))
        yield pools
        yield available
        yield GaugeMetricFamily(
            "llorch_storm_guard_holds", "1 while most of the fleet is silent and nothing is moved", value=tracker.storm_held
        )
        yield CounterMetricFamily("llorch_operator_writes", "Writes of the operator to the API", value=self._fleet.writes)
