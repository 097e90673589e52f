"""What the gateway counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llorch_web.errors import ApiError

CLIENT_GONE = 499
BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class Outcome:
    """One request while it runs."""

    histogram: Histogram
    started: float
    status: int = 500

    def first_token(self) -> None:
        """The first event of a stream goes to the client."""
        self.histogram.observe(time.monotonic() - self.started)


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
            buckets=BUCKETS,
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
        outcome = Outcome(self._first.labels(pool), time.monotonic())
        in_flight = self._in_flight.labels(pool)
        in_flight.inc()
        try:
            yield outcome
        except ApiError as error:
            outcome.status = error.status
            raise
        except (asyncio.CancelledError, ConnectionError):
            outcome.status = CLIENT_GONE
            raise
        finally:
            in_flight.dec()
            self._requests.labels(pool, str(outcome.status)).inc()

    def refused(self, status: int) -> None:
        """A request that names no pool of ours."""
        self._requests.labels("", str(status)).inc()

    def retry(self, pool: str, reason: str) -> None:
        """A try that failed before its first byte."""
        self._retries.labels(pool, reason).inc()

    def ejection(self, reason: str) -> None:
        """An agent taken out of routing."""
        self._ejections.labels(reason).inc()
