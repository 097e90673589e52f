"""Merge patches of the operator's own status fields: only what differs, so that a quiet fleet costs no write."""

from __future__ import annotations

from typing import Any

from llorch_api import Condition, GPUNode, GPUPool, GPUPoolStatus, NodePhase
from llorch_api.patch import merge_diff

from .core.conditions import merge

POOL_FIELDS = (
    "model", "endpoints", "desired", "current", "ready", "nodes", "slotsTotal", "unplaced", "selector", "reason", "conditions",
    "observedGeneration",
)  # fmt: skip


def node_patch(node: GPUNode, phase: NodePhase, conditions: list[Condition], now: str) -> dict[str, Any]:
    """Phase, conditions and observedGeneration, where they differ from the node's."""
    wanted = {
        "phase": phase.value,
        "conditions": [item.to_json() for item in merge(node.status.conditions, conditions, now)],
        "observedGeneration": node.metadata.generation,
    }
    have = node.status.to_json()
    return merge_diff({key: have[key] for key in wanted if key in have}, wanted)


def pool_patch(pool: GPUPool, status: GPUPoolStatus) -> dict[str, Any]:
    """The operator's fields, where they differ from the pool's."""
    have, wanted = pool.status.to_json(), status.to_json()
    return merge_diff(
        {key: have[key] for key in POOL_FIELDS if key in have}, {key: wanted[key] for key in POOL_FIELDS if key in wanted}
    )
