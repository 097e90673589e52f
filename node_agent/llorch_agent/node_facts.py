"""What is known of the machine from outside it: labels, zone and cordon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llorch_api import NodeFacts

ZONE_LABEL = "topology.kubernetes.io/zone"
MAX_LABELS = 64
_NOISE = ("feature.node.kubernetes.io/", "beta.kubernetes.io/", "failure-domain.beta.kubernetes.io/", "node-role.kubernetes.io/")


@dataclass(frozen=True, slots=True)
class KnownNode:
    """The facts, and the uid of the Kubernetes Node that owns the GPUNode; empty outside Kubernetes."""

    facts: NodeFacts = field(default_factory=NodeFacts)
    uid: str = ""


class NodeFactsSource(Protocol):
    """Reads them."""

    async def read(self) -> KnownNode | None:
        """The facts now; None where they cannot be read at the moment: what was known goes on to count."""
        ...

    async def close(self) -> None:
        """Lets go of connections."""
        ...


class StaticFacts:
    """Labels from the settings, for machines outside Kubernetes."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._known = KnownNode(facts_of(labels, unschedulable=False))

    async def read(self) -> KnownNode | None:
        """Always the same."""
        return self._known

    async def close(self) -> None:
        """Nothing is held."""


def facts_of(labels: Mapping[str, str], *, unschedulable: bool) -> NodeFacts:
    """The facts in the form of the API. Of more than 64 labels those that discovery tools produce by the dozen go first."""
    wanted = dict(sorted(labels.items()))
    if len(wanted) > MAX_LABELS:
        wanted = {name: value for name, value in wanted.items() if not name.startswith(_NOISE)}
    return NodeFacts(
        labels=dict(list(wanted.items())[:MAX_LABELS]), zone=labels.get(ZONE_LABEL, "")[:64], unschedulable=unschedulable
    )
