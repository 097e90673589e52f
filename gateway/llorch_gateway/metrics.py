"""What the gateway counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llorch_web.outcomes import FIRST_TOKEN_BUCKETS, Outcome, counted


class GatewayMetrics:
    """Series of one gateway. Labels are names of pools and nodes that exist, never what a client sent."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "llorch_gateway_requests",
            "Requests by pool and status; without a pool for models that do not exist, 499 for clients that left.",
            ("pool", "status"),
            registry=registry,
        )
        self._in_flight = Gauge("llorch_gateway_in_flight_requests", "Requests being answered.", ("pool",), registry=registry)
        self._first = Histogram(
            "llorch_gateway_first_token_seconds",
            "From a request's arrival to the first event of its stream.",
            ("pool",),
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._retries = Counter(
            "llorch_gateway_retries",
            "Tries that failed before their first byte, by reason.",
            ("pool", "reason"),
            registry=registry,
        )
        self._ejections = Counter(
            "llorch_gateway_ejections", "Agents taken out of routing, by reason.", ("reason",), registry=registry
        )
        self.agents = Gauge("llorch_gateway_agents", "Agents by health.", ("state",), registry=registry)

    @contextmanager
    def request(self, pool: str) -> Iterator[Outcome]:
        """Counts a request by how it ends."""
        with self._in_flight.labels(pool).track_inprogress(), counted(self._requests, self._first, pool) as outcome:
            yield outcome

    def refused(self, status: int) -> None:
        """A request that names no pool of ours."""
        self._requests.labels("", str(status)).inc()

    def retry(self, pool: str, reason: str) -> None:
        """A try that failed before its first byte."""
        self._retries.labels(pool, reason).inc()

    def ejection(self, reason: str) -> None:
        """An agent taken out of routing."""
        self._ejections.labels(reason).inc()
