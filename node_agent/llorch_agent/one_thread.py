"""One daemon thread for calls that may block for ever, such as those into a device driver."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OneThread:
    """Runs calls one after the other. Unlike a ThreadPoolExecutor's, its thread never keeps the process from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: asyncio.Future[None] | None = None

    async def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """The result of `function`, which waits its turn. Raises TimeoutError; a call that hangs is not interrupted."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            while self._last is not None and not self._last.done():
                await asyncio.wait({self._last})
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            outcome: _Outcome[T] = _Outcome(function)
            self._last = over = loop.create_future()

            def job() -> None:
                outcome.fill()
                try:
                    loop.call_soon_threadsafe(over.set_result, None)
                except RuntimeError:  # the loop has closed while the driver thought about it
                    return

            self._jobs.put(job)
            await asyncio.shield(over)
        return outcome.get()

    def close(self) -> None:
        """Ends the thread once it comes back from what it does."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class _Outcome(Generic[T]):
    """What a call returned or raised on the other thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._values: list[T] = []
        self._error: Exception | None = None

    def fill(self) -> None:
        try:
            self._values.append(self._function())
        except Exception as error:  # noqa: BLE001 - raised again where it was asked for
            self._error = error

    def get(self) -> T:
        if self._error is not None:
            raise self._error
        return self._values[0]
