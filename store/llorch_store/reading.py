"""Objects out of stored documents, past those that this version cannot read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from llorch_api import Resource

from .contract import Invalid, Key
from .core.validation import readable

R = TypeVar("R", bound=Resource)
logger = logging.getLogger(__name__)


def key_in(kind: type[Resource], document: Mapping[str, Any]) -> Key:
    """The key of a stored document."""
    metadata = document["metadata"]
    return Key(metadata.get("namespace", "") if kind.NAMESPACED else "", metadata["name"])


class Reader:
    """Reads documents; warns once of each object that it cannot read."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, Key]] = set()

    def read(self, kind: type[R], document: Mapping[str, Any]) -> R | None:
        """The object, or None where this version cannot read it."""
        key = key_in(kind, document)
        try:
            obj = readable(kind, document)
        except Invalid as error:
            if (kind.KIND, key) not in self._warned:
                self._warned.add((kind.KIND, key))
                logger.warning("skipping an object that this version cannot read: %s", error)
            return None
        self._warned.discard((kind.KIND, key))
        return obj

    def read_all(self, kind: type[R], documents: Iterable[Mapping[str, Any]]) -> tuple[list[R], list[Key]]:
        """The objects, and the keys of those that cannot be read."""
        objects: list[R] = []
        unreadable: list[Key] = []
        for document in documents:
            obj = self.read(kind, document)
            if obj is None:
                unreadable.append(key_in(kind, document))
            else:
                objects.append(obj)
        return objects, unreadable
