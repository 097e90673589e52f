"""What engines were seen to take, and what the next one like it needs. All sizes in MiB.

A header cannot know all of it (MLA, recurrent state, the driver's own share), so the sum over the devices of a running engine is
kept, per model and settings, and counts from then on wherever the estimate says less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .vram import MemoryNeed

MEASURED_MARGIN_MIB = 256
"""On each device, above what was measured: the CUDA context is in that figure, and what grows under load is not quite."""
KEPT = 32
"""Measurements that are kept; the oldest go first."""


def measurement_key(digest: str, *, slots: int, context_tokens: int, engine_args: Sequence[str], devices: int) -> str:
    """Twelve hex digits over the model's content and everything that changes what an engine takes of it on GPUs."""
    document = [digest, slots, context_tokens, list(engine_args), devices]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:12]


def noted(known: Mapping[str, int], key: str, mib: int) -> dict[str, int]:
    """`known` with one more measurement: the most that was ever seen counts, and the newest key is last."""
    most = max(mib, known.get(key, 0))
    kept = [(each, size) for each, size in known.items() if each != key]
    return dict([*kept, (key, most)][-KEPT:])


def merged(reports: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The most that any of several nodes saw, by key."""
    result: dict[str, int] = {}
    for report in reports:
        for key, mib in report.items():
            result[key] = max(mib, result.get(key, 0))
    return result


def corrected(
    need: MemoryNeed, *, trusted: bool, measured_mib: int = 0, fitted_mib: int = 0, stated_mib: int = 0
) -> MemoryNeed | None:
    """The need of a replica, out of the header's estimate and what else is known; 0 is not known. None: nobody knows.

    `trusted` says that the header decides the need. Else llama-fit-params' figure takes its place, or what was measured. The
    user's own figure replaces both, margins included; but no figure ever goes below what an engine really took.
    """
    seen = measured_mib + need.devices * MEASURED_MARGIN_MIB if measured_mib else 0
    if stated_mib:
        return _of_size(need, max(stated_mib, measured_mib))
    if trusted:
        return _raised(need, seen)
    if fitted_mib:
        return _of_size(need, max(fitted_mib + need.devices * need.margin_mib, seen))
    return _of_size(need, seen) if seen else None


def _raised(need: MemoryNeed, least: int) -> MemoryNeed:
    missing = max(0, least - need.total_mib)
    return replace(need, margin_mib=need.margin_mib + -(-missing // need.devices))


def _of_size(need: MemoryNeed, total: int) -> MemoryNeed:
    """`total` as one piece that is split as the weights are; the largest layer stays what the header says."""
    return replace(need, weights_mib=total, kv_mib=0, compute_mib=0, margin_mib=0)
