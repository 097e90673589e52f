"""The way to the API server: credentials, time-outs, connections, and its errors as the contract's.

Requests are raw JSON over the Kubernetes client's transport: its generated models know nothing of our resources. Importing the
client costs 13 MiB of memory over aiohttp and pydantic; a process that patches and watches has 58 MiB in all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from yaml import YAMLError

from .contract import StoreError, Unavailable
from .core.answers import Unauthenticated, error_of

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
"""A request, from its connection to the last byte of its answer."""
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 75.0
"""Longest silence of a watch. Above the 60 s after which the server ends it, so that only a dead connection is that silent."""
FAILURES_TO_DROP = 2
"""Failed requests in a row after which all connections are made anew: one may hang where another would not."""
CREDENTIALS_SECONDS = 10.0
"""Least time between two readings of credentials that the server refused."""
USER_AGENT = "llorch"

Query = Mapping[str, str]


class _Client:
    """The Kubernetes client's connections. Once given up, they close with their last request."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.api = ApiClient(configuration)
        self.api.user_agent = USER_AGENT
        self._requests = 0
        self._given_up = False

    @asynccontextmanager
    async def used(self) -> AsyncIterator[ApiClient]:
        """The client, for one request."""
        self._requests += 1
        try:
            yield self.api
        finally:
            self._requests -= 1
            await self._close_if_done()

    async def give_up(self) -> None:
        """No more requests; those under way go on."""
        self._given_up = True
        await self._close_if_done()

    async def _close_if_done(self) -> None:
        if self._given_up and not self._requests:
            await self.api.close()  # type: ignore[no-untyped-call]


class KubeConnection:
    """The API server that `kubeconfig` or `$KUBECONFIG` names, else the one whose Pod this is, else that of `~/.kube/config`."""

    def __init__(self, kubeconfig: str | Path | None = None) -> None:
        self._kubeconfig = str(kubeconfig or os.environ.get("KUBECONFIG", ""))
        self._client: _Client | None = None
        self._failures = 0
        self._credentials_read = 0.0

    async def __aenter__(self) -> Self:
        self._client = await self._configured()
        return self

    async def __aexit__(self, *_: object) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.api.close()  # type: ignore[no-untyped-call]

    async def request(
        self, method: str, path: str, *, query: Query | None = None, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        """The answer's JSON. Raises the contract's errors."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS)
        for renewed in (False, True):
            try:
                async with self._answer(method, path, query, body, content_type, timeout) as answer:
                    with self._watched():
                        return json.loads(await answer.read())
            except Unauthenticated:
                if renewed or not await self.read_credentials():
                    raise
        raise AssertionError

    @asynccontextmanager
    async def lines(self, path: str, *, query: Query) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of an answer that goes on. Raises the contract's errors, Unavailable after SILENCE_SECONDS."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
        async with self._answer("GET", path, query, None, "application/json", timeout) as answer:
            yield self._lines(answer)

    async def _lines(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        rest = b""
        while True:
            with self._watched():
                chunk = await answer.content.readany()
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, query: Query | None, body: Any, content_type: str, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._client is None:
            raise StoreError("the connection to the API server is not open")
        if self._failures >= FAILURES_TO_DROP:
            await self._replace(_Client(self._client.configuration))
        async with self._client.used() as api:
            target = f"{path}?{urlencode(query)}" if query else path
            headers = {"Accept": "application/json", "Content-Type": content_type}
            with self._watched():
                # Asks the configuration for its token, which reads a service account's again each minute.
                _, url, headers, body, _ = await api.param_serialize(
                    method, target, header_params=headers, body=body, auth_settings=["BearerToken"]
                )
                answer = (await api.call_api(method, url, headers, body, _request_timeout=timeout)).response
            try:
                self._failures = 0
                if answer.status >= 400:
                    with self._watched():
                        raise error_of(answer.status, await answer.read(), retry_after=answer.headers.get("Retry-After"))
                yield answer
            finally:
                answer.close()  # goes back to the pool where it was read to its end

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Counts and translates what goes wrong between here and the server."""
        try:
            yield
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            self._failures += 1
            said = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise Unavailable(f"the API server is not reachable: {said}") from error
        except ValueError as error:
            raise Unavailable(f"the API server's answer is not JSON: {error}") from error
        except ConfigException as error:
            raise Unavailable(f"credentials cannot be read: {error}") from error

    async def read_credentials(self) -> bool:
        """Reads them again after a refusal: they may be short-lived. At most every 10 s; False where it could not."""
        if asyncio.get_running_loop().time() - self._credentials_read < CREDENTIALS_SECONDS:
            return False
        try:
            await self._replace(await self._configured())
        except StoreError as error:
            logger.warning("%s", error)
            return False
        return True

    async def _replace(self, client: _Client) -> None:
        old, self._client, self._failures = self._client, client, 0
        if old is not None:
            await old.give_up()

    async def _configured(self) -> _Client:
        self._credentials_read = asyncio.get_running_loop().time()
        configuration = Configuration()
        try:
            if not self._kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST"):
                load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            else:
                file = self._kubeconfig or str(Path.home() / ".kube" / "config")
                await load_kube_config(file, client_configuration=configuration, persist_config=False)  # type: ignore[no-untyped-call]
            return _Client(configuration)
        except (ConfigException, OSError, YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
            # The loader walks a kubeconfig as it comes: one of another shape ends in any of these.
            raise StoreError(f"no way to a Kubernetes API server: {' '.join(str(error).split())}") from error
