"""Every task has an owner that notices its death."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any


async def until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until `stop` is set. When the work ends first, with an error or without, that is what comes out here."""
    task, waiter = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for pending in (task, waiter):
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pending


class Companion:
    """A task that lives beside a framework's own: its death sets `stop`, and its error is not lost."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
        self._work = work
        self._stop = stop
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the work, in the context of the caller."""
        self._task = asyncio.create_task(self._work())
        self._task.add_done_callback(lambda _: self._stop.set())

    async def end(self) -> None:
        """Cancels the work and waits for it. Does not raise."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def raise_what_killed_it(self) -> None:
        """Raises the error that the work ended with; nothing when it was cancelled or never began."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()
