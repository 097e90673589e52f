"""One task for all who want the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .progress import Progress

T = TypeVar("T")


@dataclass(slots=True)
class _Shared(Generic[T]):
    task: asyncio.Task[T] | None = None
    listeners: dict[object, Progress | None] = field(default_factory=dict)

    def tell(self, done: int, total: int) -> None:
        for listener in tuple(self.listeners.values()):
            if listener is not None:
                listener(done, total)


class SharedTasks(Generic[T]):
    """Runs one task per key. Everybody who waits for it is told its progress and gets its outcome, an error too.

    The waiters own the task: when the last one is cancelled, the task is cancelled and awaited before that waiter leaves.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, _Shared[T]] = {}

    async def run(self, key: Hashable, start: Callable[[Progress], Coroutine[None, None, T]], progress: Progress | None) -> T:
        """The outcome of the task of `key`, which `start` begins where none is running."""
        key = (asyncio.get_running_loop(), key)
        shared = self._running.get(key)
        if shared is None or shared.task is None:
            shared = self._running[key] = _Shared()
            shared.task = asyncio.create_task(start(shared.tell), name=f"shared {key[1]}")
        waiter = object()
        shared.listeners[waiter] = progress
        try:
            return await asyncio.shield(shared.task)
        finally:
            del shared.listeners[waiter]
            if not shared.listeners:
                # Gone from the table first: who comes now must not join a task that is about to be cancelled.
                if self._running.get(key) is shared:
                    del self._running[key]
                await _end(shared.task)


async def _end(task: asyncio.Task[T]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
