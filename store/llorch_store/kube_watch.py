"""A watch that does not end: list, follow, and list again where the server has forgotten how to go on."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llorch_api import Resource

from .contract import Event, EventType, Forbidden, NotFound, StoreError, Unavailable
from .core import backoff
from .core.answers import Expired, Unauthenticated, error_of
from .core.watching import Told
from .kube_connection import KubeConnection
from .kube_versions import Versions
from .reading import Reader, key_in

R = TypeVar("R", bound=Resource)
logger = logging.getLogger(__name__)

CHUNK = 500
"""Objects of one list request."""
WATCH_SECONDS = 60
"""After which the server ends a watch, so that each connection is known to be alive at least that often."""
FAILURES_TO_RELIST = 5
"""Failed attempts in a row to go on from a version, after which it is given up: a restored etcd may not have reached it."""
REFUSED_SECONDS = 60.0
"""How long a watch that once worked bears being refused: an API server that starts does not know its roles at once."""
SHORT_SECONDS = 1.0
"""A watch that ended sooner is not followed by the next at once."""


async def list_all(connection: KubeConnection, path: str, query: Mapping[str, str]) -> tuple[list[Mapping[str, Any]], str]:
    """All objects, in chunks, and the version from which a watch goes on.

    Raises Expired where the list took too long, NotFound where the server does not serve the resource.
    """
    documents: list[Mapping[str, Any]] = []
    token = ""
    while True:
        chunk = {"limit": str(CHUNK), **({"continue": token} if token else {})}
        try:
            page = await connection.request("GET", path, query={**query, **chunk})
        except NotFound as error:
            raise NotFound(f"the API server serves no {path}: are the CustomResourceDefinitions installed? ({error})") from error
        documents += page["items"]
        metadata = page["metadata"]
        token = metadata.get("continue", "")
        if not token:
            return documents, metadata["resourceVersion"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a watch's objects come from: a path and a query, and who is to know of them."""

    connection: KubeConnection
    reader: Reader
    versions: Versions
    path: str
    query: Mapping[str, str]


class Reflector(Generic[R]):
    """The objects of `kind` from one source, for one caller."""

    def __init__(self, kind: type[R], source: Source) -> None:
        self._kind, self._source = kind, source
        self._told = Told[R]()
        self._version = ""
        self._failures = 0
        self._refused_since: float | None = None
        self._synced = False

    async def events(self) -> AsyncGenerator[Event[R], None]:
        """The contract's watch. Raises Forbidden at once where nothing was ever listed, later after REFUSED_SECONDS."""
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                if not self._version:
                    documents, version = await self._list()
                    self._version, self._synced = version, True
                    self._worked()
                    for event in self._told.listed(*self._source.reader.read_all(self._kind, documents)):
                        yield event
                async with self._source.connection.lines(self._source.path, query=self._watch_query()) as lines:
                    async for line in lines:
                        for event in self._understood(line):
                            yield event
            except Expired:
                logger.info("watch of %s: version %s is no longer known, listing again", self._kind.PLURAL, self._version)
                self._version = ""
                await self._pause(None)
            except StoreError as error:
                if isinstance(error, Forbidden):
                    self._bear(error, loop.time())
                await self._failed(error)
            else:
                if loop.time() - started < SHORT_SECONDS:
                    await asyncio.sleep(SHORT_SECONDS * random.uniform(0.5, 1.0))

    async def _list(self) -> tuple[list[Mapping[str, Any]], str]:
        documents, version = await list_all(self._source.connection, self._source.path, self._source.query)
        for document in documents:
            self._source.versions.saw(self._kind, document)
        return documents, version

    def _watch_query(self) -> Mapping[str, str]:
        return {
            **self._source.query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
            "resourceVersion": self._version,
        }

    def _understood(self, line: bytes) -> list[Event[R]]:
        """What to tell after one line of the watch. Raises what an ERROR stands for."""
        try:
            change = json.loads(line)
            kind, document = change["type"], change["object"]
            if kind == "ERROR":
                raise error_of(int(document.get("code") or 500), json.dumps(document))
            version = document["metadata"]["resourceVersion"]
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"the API server's event cannot be read: {error!r}") from error
        self._version = version
        self._worked()
        if kind == "BOOKMARK":
            return []
        obj = self._source.reader.read(self._kind, document)
        if kind == EventType.DELETED:
            key = key_in(self._kind, document)
            self._source.versions.forget(self._kind, key)
            return self._told.deleted(key, obj)
        self._source.versions.saw(self._kind, document)
        return [] if obj is None else self._told.changed(obj)

    def _worked(self) -> None:
        if self._failures >= 2:
            logger.info("watch of %s: goes on", self._kind.PLURAL)
        self._failures, self._refused_since = 0, None

    def _bear(self, error: Forbidden, now: float) -> None:
        """Raises `error` unless it may pass."""
        if self._refused_since is None:
            self._refused_since = now
        if not self._synced or now - self._refused_since > REFUSED_SECONDS:
            raise error

    async def _failed(self, error: StoreError) -> None:
        if self._failures == 1:  # one alone is a server that restarts or a connection that was cut: no news
            logger.warning("watch of %s: %s; trying again", self._kind.PLURAL, error)
        if isinstance(error, Unauthenticated):
            await self._source.connection.read_credentials()
        if self._failures + 1 >= FAILURES_TO_RELIST:
            self._version = ""
        await self._pause(error.retry_after if isinstance(error, Unavailable) else None)

    async def _pause(self, retry_after: float | None) -> None:
        self._failures += 1
        await asyncio.sleep(backoff.delay(self._failures, random.random(), retry_after=retry_after))
