"""`llorch logs`: what engines wrote, read from the agents that run them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import aiohttp

from llorch_api import GPUNode
from llorch_store import Store
from llorch_web.tls import verified

TIMEOUT = aiohttp.ClientTimeout(total=None, connect=5, sock_read=30)
FOLLOW_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=5)


class LogsError(Exception):
    """One line: what went wrong and where."""


class Source(NamedTuple):
    """A replica and the base URL of the agent that has its log."""

    replica: str
    agent: str


async def find(store: Store, what: str, agent: str | None) -> list[Source]:
    """The replicas that `what` names: `REPLICA`, `NODE.REPLICA`, or `pool/NAME` for all of a pool. Raises LogsError.

    `agent` is asked instead of the address that the node says.
    """
    kind, slash, name = what.rpartition("/")
    if slash and kind not in ("pool", "gpupool", "gpupools", "lgp"):
        raise LogsError(f"{what!r} is neither REPLICA nor pool/NAME")
    nodes = (await store.list(GPUNode)).items
    found = [
        Source(replica_id, agent or node.status.agent.address)
        for node in sorted(nodes, key=lambda node: node.metadata.name)
        for replica_id, report in sorted(node.status.replicas.items())
        if (report.pool == name if slash else name in (replica_id, f"{node.metadata.name}.{replica_id}"))
    ]
    if not found and agent and not slash:
        return [Source(name, agent)]  # its log outlives a replica for a while
    if not found:
        raise LogsError(f"no node reports a replica {'of pool ' if slash else ''}{name!r}: llorch get gpunodes -o yaml")
    if silent := next((source for source in found if not source.agent), None):
        raise LogsError(f"the agent of replica {silent.replica} says no address: name it with --agent URL")
    return found


async def read(sources: Sequence[Source], *, lines: int, follow: bool, token: str | None, write: Callable[[bytes], None]) -> None:
    """Writes the logs, whole lines at a time; with several sources each line names its replica. Raises LogsError."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = FOLLOW_TIMEOUT if follow else TIMEOUT
    query = {"lines": str(lines), **({"follow": "true"} if follow else {})}
    async with aiohttp.ClientSession(connector=verified(), headers=headers, timeout=timeout) as session:

        async def one(source: Source) -> None:
            label = f"[{source.replica}] ".encode() if len(sources) > 1 else b""
            url = f"{source.agent.rstrip('/')}/replicas/{source.replica}/log"
            try:
                async with session.get(url, params=query) as response:
                    if response.status != 200:
                        raise LogsError(f"{source.agent}: {await _message(response)}")
                    await _copy(response, label, write)
            except (aiohttp.ClientError, TimeoutError) as error:
                hint = "in a cluster, run this in the agent's pod, or forward port 9200 and name it with --agent URL"
                raise LogsError(f"{source.agent} does not answer ({type(error).__name__}): {hint}") from error

        if follow:
            try:
                async with asyncio.TaskGroup() as group:
                    for source in sources:
                        group.create_task(one(source))
            except ExceptionGroup as problems:
                raise problems.exceptions[0] from None
        else:
            for source in sources:
                await one(source)


async def _copy(response: aiohttp.ClientResponse, label: bytes, write: Callable[[bytes], None]) -> None:
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        if whole:
            write(b"".join(label + line + b"\n" for line in whole))
    if rest:
        write(label + rest + b"\n")


async def _message(response: aiohttp.ClientResponse) -> str:
    if response.status in (401, 403):
        return "the token is refused: set LLORCH_API_TOKEN or LLORCH_API_TOKEN_FILE"
    try:
        return str((await response.json())["error"]["message"])
    except (aiohttp.ContentTypeError, ValueError, KeyError, TypeError):
        return f"answered {response.status}"
