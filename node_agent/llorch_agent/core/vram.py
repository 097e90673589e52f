"""Whose device memory is it? Splits what a device has in use between this node's replicas and everybody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .readings import DeviceReading


@dataclass(frozen=True, slots=True)
class Tenant:
    """A replica whose engine may hold device memory."""

    replica: str
    promised: Mapping[str, int]
    """MiB by device uuid."""
    measured: Mapping[str, int] = field(default_factory=dict)
    """MiB by device uuid, where the driver's process list names its engine."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The split. `used[replica][uuid]` and `foreign[uuid]` are MiB."""

    used: Mapping[str, Mapping[str, int]]
    foreign: Mapping[str, int]


class Attribution:
    """Remembers, per device, what was in use before this node's engines came.

    Where the driver's process list names our engines (the agent shares the host's PID namespace) the split is exact. Else the
    pids match nothing, and an engine is taken to hold what came on top of the baseline since no engine was there, up to what
    it was promised; what exceeds all promises is foreign. The blind spot of that: a stranger that arrives while an engine is
    still below its promise counts as the engine.
    """

    def __init__(self) -> None:
        self._baseline: dict[str, int] = {}
        self._pids_match: set[str] = set()

    def split(self, devices: Sequence[DeviceReading], tenants: Sequence[Tenant]) -> Shares:
        """The split for these readings; call it with every new reading."""
        self._pids_match |= {uuid for tenant in tenants for uuid in tenant.measured}
        used: dict[str, dict[str, int]] = {tenant.replica: dict(tenant.measured) for tenant in tenants}
        foreign: dict[str, int] = {}
        for device in devices:
            rest = max(0, device.used - sum(tenant.measured.get(device.uuid, 0) for tenant in tenants))
            unseen = device.uuid not in self._pids_match
            guests = [tenant for tenant in tenants if unseen and tenant.promised.get(device.uuid, 0) > 0]
            if not guests:
                self._baseline[device.uuid] = foreign[device.uuid] = rest
                continue
            baseline = self._baseline[device.uuid] = min(rest, self._baseline.get(device.uuid, 0))
            promised = sum(tenant.promised[device.uuid] for tenant in guests)
            ours = min(rest - baseline, promised)
            foreign[device.uuid] = rest - ours
            for tenant in guests:
                used[tenant.replica][device.uuid] = ours * tenant.promised[device.uuid] // promised
        return Shares(used, foreign)
