"""What can go wrong between this process and a server that it asks."""

from __future__ import annotations


class UpstreamError(Exception):
    """A request that got no complete answer. The message is one line and names the address."""


class ConnectFailed(UpstreamError):
    """No connection: refused, unreachable, or not made in time. Nothing was sent."""


class ClosedEarly(UpstreamError):
    """The peer closed or reset the connection before its answer was complete."""


class TimedOut(UpstreamError):
    """The peer sent nothing for too long."""


class BadResponse(UpstreamError):
    """What came is not HTTP, or more than is allowed."""


class Abandoned(UpstreamError):
    """Somebody else in this process gave the request up, for example because the peer is taken for dead."""
