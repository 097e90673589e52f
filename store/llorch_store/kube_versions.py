"""The newest version of each object that passed through a store, so that a write to one uid need not read it first."""

from __future__ import annotations

from llorch_api import Resource

from .contract import JsonObject, Key
from .reading import key_in


class Versions:
    """Versions by object. What it says may be outdated: the server has the last word."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, Key], tuple[str, str]] = {}

    def saw(self, kind: type[Resource], document: JsonObject) -> None:
        """Takes note of an object that the server sent."""
        metadata = document["metadata"]
        self._seen[kind.KIND, key_in(kind, document)] = (metadata["uid"], metadata["resourceVersion"])

    def forget(self, kind: type[Resource], key: Key) -> None:
        """The object is gone, or its version was outdated."""
        self._seen.pop((kind.KIND, key), None)

    def known(self, kind: type[Resource], key: Key, uid: str) -> str:
        """The version of the object; empty where it is not known or has another uid."""
        seen, version = self._seen.get((kind.KIND, key), ("", ""))
        return version if seen == uid else ""
