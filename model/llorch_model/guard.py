"""Keeps sources away from private addresses: a pool's YAML must not make a node read what only the node can reach.

Names are checked when they are resolved for a connection, with the very addresses that are then used, so neither a redirect
nor a name that changes its mind gets around it. A proxy resolves names itself: behind one, its own rules count.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit
from urllib.request import getproxies

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

SETTING = "LLORCH_ALLOW_PRIVATE_SOURCES"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class PrivateAddress(OSError):
    """A host of a source is, or resolves to, an address that is not public."""

    def __init__(self, host: str, address: str) -> None:
        where = host if host == address else f"{host} ({address})"
        super().__init__(f"{where} is not a public address, and {SETTING} is false")


def is_public(address: str) -> bool:
    """False for private, shared, loopback, link-local, multicast and reserved addresses, also those that IPv6 wraps."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


class Guard:
    """What may be connected to. `trusted` are hosts that the node's administrator named: endpoints and proxies."""

    def __init__(self, *, allow_private: bool, trusted: Iterable[str] = ()) -> None:
        self._allow_private = allow_private
        self._trusted = {host.lower() for host in trusted}

    def allows(self, host: str) -> bool:
        """True where no address of the host need be looked at."""
        return self._allow_private or host.lower() in self._trusted

    def check(self, url: URL) -> None:
        """Raises PrivateAddress for a URL that names such an address itself: those are never resolved."""
        host = url.host or ""
        try:
            public = is_public(host)
        except ValueError:
            return
        if not public and not self.allows(host):
            raise PrivateAddress(host, host)

    def resolver(self) -> AbstractResolver:
        """For a connector."""
        return _PublicOnly(self)


class _PublicOnly(AbstractResolver):
    """Drops addresses that are not public; a host that has no other is refused."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._resolver = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if self._guard.allows(host):
            return found
        public = [each for each in found if is_public(each["host"])]
        if found and not public:
            raise PrivateAddress(host, found[0]["host"])
        return public

    async def close(self) -> None:
        await self._resolver.close()


def proxy_hosts() -> set[str]:
    """Hosts of the proxies that the environment names."""
    hosts = (urlsplit(url if "//" in url else f"//{url}").hostname for scheme, url in getproxies().items() if scheme != "no")
    return {host for host in hosts if host}
