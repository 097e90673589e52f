"""Wakes those who wait for a node's spec to change."""

from __future__ import annotations

import asyncio


class SpecBell:
    """One event per node that somebody waits for. Between a look at the node and `wait` nothing may be awaited."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}
        self.closed = False
        """Nobody waits any more."""

    def ring(self, node: str) -> None:
        """The node's spec has changed, or the node is gone."""
        if (event := self._events.pop(node, None)) is not None:
            event.set()

    async def wait(self, node: str, seconds: float) -> None:
        """Returns when the bell rings, after `seconds`, or at once when it is closed."""
        if self.closed:
            return
        event = self._events.setdefault(node, asyncio.Event())
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return

    def close(self) -> None:
        """Lets everybody go: the server is about to stop."""
        self.closed = True
        for node in list(self._events):
            self.ring(node)
