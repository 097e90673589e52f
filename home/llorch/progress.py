"""What a person in front of `llorch home` sees: what happens, since when, and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import aclosing

from llorch_api import GPUPool
from llorch_store import EventType, Store


class Progress:
    """Lines on stdout, each with the seconds since the start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._last: dict[str, str] = {}

    def say(self, text: str) -> None:
        """One line."""
        print(f"[{self._clock() - self._started:5.1f} s] {text}", flush=True)

    async def follow(self, store: Store, url: str) -> None:
        """Tells of every pool's state as it changes; the first one that serves gets the commands to try. Until cancelled."""
        async with aclosing(store.watch(GPUPool)) as events:
            async for event in events:
                if event.object is not None:
                    self._tell(event.type, event.object, url)

    def _tell(self, type_: EventType, pool: GPUPool, url: str) -> None:
        name = pool.metadata.name
        if type_ is EventType.DELETED:
            self._last.pop(name, None)
            self.say(f"pool {name}: deleted")
            return
        line = _state(pool)
        if not line or self._last.get(name) == line:
            return
        first = pool.status.ready > 0 and not any(" serving" in before for before in self._last.values())
        self._last[name] = line
        self.say(f"pool {name}: {line}")
        if first:
            self._invite(name, url)

    def _invite(self, pool: str, url: str) -> None:
        port = url.rsplit(":", 1)[-1]
        prefix = "" if port == "8080" else f"LLORCH_URL={url} "
        body = f'{{"model": "{pool}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32, "stream": true}}'
        print(
            f"\n  serving {pool} at {url}/v1 — try, from another terminal:\n\n"
            f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'\n"
            f"  {prefix}{sys.argv[0]} chat Hello\n  {sys.argv[0]} get gpunodes\n",
            flush=True,
        )


def _state(pool: GPUPool) -> str:
    status = pool.status
    if not status.conditions:
        return ""
    if status.ready:
        return f"{status.ready} of {max(status.desired, status.ready)} replicas serving, {status.slots_total} slots"
    held = next((item for item in status.conditions if item.type == "Placed" and item.status != "True"), None)
    told = held or next((item for item in status.conditions if item.type == "Available"), None)
    states = ", ".join(f"{rid} {entry.state.value}" for rid, entry in sorted(status.replicas.items()))
    text = f"{told.reason}: {told.message}" if told else status.reason
    return f"{text} ({states})" if states and held is None else text
