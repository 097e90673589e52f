"""What one watcher has been told, and what is still to be told: the same for all stores."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

from llorch_api import Resource
from llorch_store.contract import Event, EventType, Key, key_of

R = TypeVar("R", bound=Resource)


class Told(Generic[R]):
    """The objects a watcher knows. Each method returns the events that bring it up to date and takes them as told.

    An object is never told twice at one version. One that was deleted and created anew is told as DELETED, then ADDED.
    """

    def __init__(self) -> None:
        self._objects: dict[Key, R] = {}

    def listed(self, objects: Iterable[R], unreadable: Collection[Key] = ()) -> list[Event[R]]:
        """After a (re-)list: what is new, what changed, what vanished, SYNCED. `unreadable` ones exist: they did not vanish."""
        events: list[Event[R]] = []
        present = set(unreadable)
        for obj in objects:
            present.add(key_of(obj))
            events += self.changed(obj)
        vanished = [key for key in self._objects if key not in present]
        gone = [event for key in vanished for event in self.deleted(key)]
        return [*gone, *events, Event(EventType.SYNCED)]

    def changed(self, obj: R) -> list[Event[R]]:
        """After a write of `obj`."""
        key = key_of(obj)
        known = self._objects.get(key)
        if known is not None and known.metadata.uid == obj.metadata.uid:
            if known.metadata.resource_version == obj.metadata.resource_version:
                return []
            self._objects[key] = obj
            return [Event(EventType.MODIFIED, obj)]
        gone = self.deleted(key)
        self._objects[key] = obj
        return [*gone, Event(EventType.ADDED, obj)]

    def deleted(self, key: Key, last: R | None = None) -> list[Event[R]]:
        """After the deletion of `key`; `last` is its last state where the store tells it."""
        known = self._objects.pop(key, None)
        return [] if known is None else [Event(EventType.DELETED, last or known)]
