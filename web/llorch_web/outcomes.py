"""How a request ends, for the servers that count it: its status, and when its first event left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from .errors import ApiError

CLIENT_GONE = 499
FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Seconds."""


@dataclass(slots=True)
class Outcome:
    """One request while it runs."""

    histogram: Histogram
    started: float
    status: int = 500

    def first_token(self) -> None:
        """The first event of a stream goes to the client."""
        self.histogram.observe(time.monotonic() - self.started)


@contextmanager
def counted(requests: Counter, first: Histogram, *labels: str) -> Iterator[Outcome]:
    """Counts a request by how it ends: `requests` has `labels` and the status, `first` has `labels`."""
    outcome = Outcome(first.labels(*labels), time.monotonic())
    try:
        yield outcome
    except ApiError as error:
        outcome.status = error.status
        raise
    except (asyncio.CancelledError, ConnectionError):
        outcome.status = CLIENT_GONE
        raise
    finally:
        requests.labels(*labels, str(outcome.status)).inc()
