"""Which replica gets a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .pools import EndpointView


@dataclass(frozen=True, slots=True)
class SlotReport:
    """What an agent said of one replica."""

    free: int
    total: int
    ready: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take a request."""

    endpoint: EndpointView
    free: int
    """Slots that should be free, as far as this gateway knows; other gateways send too, so the agent has the last word."""
    ejected: bool


def candidate(
    endpoint: EndpointView, report: SlotReport | None, *, own: int, unreported: int, ejected: bool, kept: bool
) -> Candidate | None:
    """The endpoint as a candidate, or None where its agent says that it is not ready.

    `own` are this gateway's requests there, `unreported` those of them sent since the agent's last message. An agent that has
    not said anything yet is believed to be as the pool's status says, unless that is only the last known (`kept`).
    """
    if report is None:
        return None if kept else Candidate(endpoint, endpoint.slots - own, ejected)
    if not report.ready or (kept and ejected):
        return None
    return Candidate(endpoint, min(report.total - own, report.free - unreported), ejected)


def in_order(candidates: Iterable[Candidate], draw: Callable[[], float]) -> list[Candidate]:
    """Best first: agents that are alive before ejected ones, then the most free slots, ties by `draw`."""
    return sorted(candidates, key=lambda each: (each.ejected, -max(0, each.free), draw()))
