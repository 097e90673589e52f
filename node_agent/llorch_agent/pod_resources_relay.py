"""Passes the kubelet's PodResources socket on to the agent, which may not open it: `python -m llorch_agent.pod_resources_relay`.

The kubelet's directory is root's alone. So a container of its own, root without any capability, does nothing but copy bytes
between the two sockets; the API behind it can only be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

from .pod_resources import KUBELET_SOCKET

CHUNK: Final = 64 << 10
AT_ONCE: Final = 16
"""Connections; the agent has one."""


async def serve(kubelet: Path, socket: Path, stop: asyncio.Event) -> None:
    """Relays until `stop` is set."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            if turn.locked():
                return
            async with turn:
                try:
                    upstream, to_kubelet = await asyncio.open_unix_connection(str(kubelet))
                except OSError as error:
                    print(f"llorch: {kubelet}: {error.strerror or error}", file=sys.stderr, flush=True)
                    return
                with contextlib.closing(to_kubelet):
                    both = [asyncio.create_task(_copy(reader, to_kubelet)), asyncio.create_task(_copy(upstream, writer))]
                    try:
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for task in both:
                            task.cancel()
                        await asyncio.gather(*both, return_exceptions=True)

    socket.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(relay, str(socket))
    socket.chmod(0o666)  # its directory is shared with the agent's container alone
    try:
        await stop.wait()
    finally:
        server.close()
        socket.unlink(missing_ok=True)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(CHUNK):
            target.write(data)
            await target.drain()


async def _main() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kubelet = Path(os.environ.get("LLORCH_KUBELET_SOCKET") or KUBELET_SOCKET)
    await serve(kubelet, Path(os.environ["LLORCH_POD_RESOURCES"]), stop)


if __name__ == "__main__":
    asyncio.run(_main())
