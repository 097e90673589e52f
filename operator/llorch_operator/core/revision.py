"""The revision: a hash of what a replica runs. Another hash is another replica."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from llorch_api import GPUPoolSpec, ResolvedModel

MAX_SOURCE = 256
"""Characters that an assignment has for it."""


def model_identity(spec: GPUPoolSpec, resolved: ResolvedModel) -> str:
    """What names the model's content: its sha256 where stated, else what its place says of it."""
    return f"sha256:{spec.model.sha256}" if spec.model.sha256 else resolved.digest or spec.model.source


def assigned_source(spec: GPUPoolSpec, resolved: ResolvedModel) -> str:
    """Where replicas fetch the model. A branch may move between two of them, so an `hf:` source is assigned at its commit."""
    pinned = resolved.resolved
    fits = pinned.startswith("hf:") and len(pinned) <= MAX_SOURCE
    return pinned if spec.model.source.startswith("hf:") and fits else spec.model.source


def revision_of(spec: GPUPoolSpec, resolved: ResolvedModel) -> str:
    """Ten hex digits over model, slots, context, KV type and engine arguments."""
    document = [
        model_identity(spec, resolved),
        spec.slots,
        spec.context_tokens,
        spec.engine.kv_cache_type,
        list(spec.engine.args),
    ]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:10]


def engine_arguments(kv_cache_type: str, args: Sequence[str]) -> list[str]:
    """The llama-server arguments of an assignment out of a pool's kvCacheType and engine.args, beyond model, context, slots and
    devices, which the agent sets."""
    cache = [] if kv_cache_type == "f16" else ["--cache-type-k", kv_cache_type, "--cache-type-v", kv_cache_type]
    return [*cache, *args]
