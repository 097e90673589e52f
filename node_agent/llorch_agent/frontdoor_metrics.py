"""What the front door counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llorch_web.outcomes import FIRST_TOKEN_BUCKETS, Outcome, counted


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
            buckets=FIRST_TOKEN_BUCKETS,
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
        with counted(self._requests, self._first, self._node_id, pool) as outcome:
            yield outcome

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Counts a request whose client left, as long as the engine holds on to it."""
        with self._leaving.track_inprogress():
            yield
