"""Wakes the watchers of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Signal:
    """Something changed: whoever subscribed looks again. Notifications that nobody has seen yet count as one."""

    def __init__(self) -> None:
        self._events: set[asyncio.Event] = set()
        self.wanted = asyncio.Event()
        """Set while there are subscribers."""

    @contextmanager
    def subscription(self) -> Iterator[asyncio.Event]:
        """An event that `notify` sets; the subscriber clears it before it looks."""
        event = asyncio.Event()
        self._events.add(event)
        self.wanted.set()
        try:
            yield event
        finally:
            self._events.discard(event)
            if not self._events:
                self.wanted.clear()

    def notify(self) -> None:
        """Wakes every subscriber."""
        for event in self._events:
            event.set()
