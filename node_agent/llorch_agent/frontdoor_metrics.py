"""What the front door counts."""

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


class FrontDoorMetrics:
    """Series of one node's front door; without a registry they are counted and shown nowhere."""

    def __init__(self, node_id: str, registry: CollectorRegistry | None) -> None:
        self._node_id = node_id
        labels = ("node_id", "pool")
        self._requests = Counter(
            "llorch_agent_requests",
            "Requests to engines, by status; 499 is a client that left.",
            (*labels, "status"),
            registry=registry,
        )
        self._first = Histogram(
            "llorch_agent_first_token_seconds",
            "From a request's arrival to the first event of its stream.",
            labels,
            buckets=BUCKETS,
            registry=registry,
        )
        self._leaving = Gauge(
            "llorch_agent_leaving_requests",
            "Requests whose client left while the engine still holds their slot.",
            ("node_id",),
            registry=registry,
        ).labels(node_id)

    @contextmanager
    def request(self, pool: str) -> Iterator[Outcome]:
        """Counts a request by how it ends."""
        outcome = Outcome(self._first.labels(self._node_id, pool), time.monotonic())
        try:
            yield outcome
        except ApiError as error:
            outcome.status = error.status
            raise
        except (asyncio.CancelledError, ConnectionError):
            outcome.status = CLIENT_GONE
            raise
        finally:
            self._requests.labels(self._node_id, pool, str(outcome.status)).inc()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Counts a request whose client left, as long as the engine holds on to it."""
        self._leaving.inc()
        try:
            yield
        finally:
            self._leaving.dec()
