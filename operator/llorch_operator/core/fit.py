"""Whether and how a replica fits on a node, by live free memory minus what is promised already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from llorch_api import Desired, Strategy
from llorch_api.gpunode import MAX_ASSIGNED_DEVICES
from llorch_model.core.measured import corrected, measurement_key
from llorch_model.core.vram import MemoryNeed, estimate, host_need, memory_settings, split_need

from .refusal import Cause, Refusal
from .revision import engine_arguments
from .views import DeviceView, NodeView, PoolView, ReplicaView


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a replica would go on a node: MiB per device."""

    node: str
    devices: dict[str, int]


def need_of(pool: PoolView, kind: str, devices: int = 1) -> MemoryNeed | None:
    """Memory that one replica of `pool` takes over `devices` devices of `kind` (gpu or cpu); None where nobody knows."""
    return corrected(
        _estimate(pool, kind, devices),
        trusted=not pool.shape.caveat,
        # What an engine takes of host memory is no measure: weights that are mapped from their file are not counted.
        measured_mib=pool.measured.get(_key(pool, devices), 0) if kind == "gpu" else 0,
        fitted_mib=pool.fitted_mib,
        stated_mib=pool.stated_mib,
    )


def _key(pool: PoolView, devices: int) -> str:
    return measurement_key(
        pool.digest,
        slots=pool.slots,
        context_tokens=pool.context_tokens,
        engine_args=engine_arguments(pool.kv_cache_type, pool.engine_args),
        devices=devices,
    )


def _estimate(pool: PoolView, kind: str, devices: int) -> MemoryNeed:
    settings = memory_settings(pool.engine_args)
    calculate = partial(host_need, cache_ram_mib=settings.cache_ram_mib) if kind == "cpu" else partial(estimate, devices=devices)
    return calculate(
        pool.shape,
        slots=pool.slots,
        context_tokens=pool.context_tokens,
        kv_cache_type=pool.kv_cache_type,
        ubatch=settings.ubatch,
        swa_full=settings.swa_full,
        flash_attention=settings.flash_attention,
    )


def available(node: NodeView) -> dict[str, int]:
    """Free MiB per device once every promise is kept."""
    free = {device.uuid: device.free for device in node.devices}
    for replica in node.replicas:
        promised = sum(replica.devices.values())
        for uuid, share in replica.devices.items():
            if uuid in free and promised:
                free[uuid] -= -(-replica.reserved * share // promised)
    return {uuid: max(0, mib) for uuid, mib in free.items()}


def fit(pool: PoolView, node: NodeView) -> Fit | Refusal:
    """A place for one more replica of `pool` on `node`, or why there is none. One device first, then a split if allowed."""
    if refusal := _excluded(pool, node):
        return refusal
    devices = [device for device in node.devices if device.kind == "gpu" or pool.placement.allow_cpu]
    if not devices:
        return Refusal(node.name, Cause.NO_GPU, "has no GPU, and the pool does not allow the CPU (placement.allowCPU)")
    if any(device.kind == "gpu" for device in devices):
        devices = [device for device in devices if device.kind == "gpu"]
    matching = [device for device in devices if device.usable and _matches(pool, device)]
    if not matching:
        return _no_device(pool, node, devices)
    return _by_memory(pool, node, matching)


def _excluded(pool: PoolView, node: NodeView) -> Refusal | None:
    wanted = pool.placement
    if not node.placeable:
        return Refusal(node.name, Cause.NOT_PLACEABLE, node.why_not or node.liveness.name.capitalize())
    if wanted.pin is not None and wanted.pin != node.name:
        return Refusal(node.name, Cause.SELECTOR, f"the pool is pinned to {wanted.pin}")
    if node.name in wanted.avoid:
        return Refusal(node.name, Cause.SELECTOR, "the pool avoids it")
    for label, value in sorted(wanted.node_selector.items()):
        if node.labels.get(label) != value:
            return Refusal(node.name, Cause.SELECTOR, f"label {label} is {node.labels.get(label, 'not set')}, not {value}")
    if pool.present_on is not None and node.name not in pool.present_on:
        return Refusal(node.name, Cause.MODEL, pool.missing_because or "MODEL_NOT_AVAILABLE: the model is not on this node")
    if node.name in pool.unfit:
        return Refusal(node.name, Cause.FAILED, "this revision failed here within the last 10 minutes")
    if pool.must_fetch and pool.digest not in node.models and pool.model_size > node.disk_free:
        return Refusal(node.name, Cause.DISK, needed=pool.model_size, free=node.disk_free)
    return None


def _no_device(pool: PoolView, node: NodeView, devices: list[DeviceView]) -> Refusal:
    sick = sum(not device.healthy for device in devices)
    held = [device for device in devices if device.healthy and _matches(pool, device)]
    if held:  # they are right but for that
        holders = ", ".join(sorted({device.held_by for device in held}))
        text = f"{len(held)} of {len(devices)} devices match, held by another pod: {holders}"
        return Refusal(node.name, Cause.HELD, text + (f"; {sick} unhealthy" if sick else ""))
    return Refusal(node.name, Cause.DEVICE, f"none of {len(devices)} devices matches" + (f", {sick} unhealthy" if sick else ""))


def _matches(pool: PoolView, device: DeviceView) -> bool:
    wanted = pool.placement.gpu_selector
    if wanted.get("name", "").lower() not in device.name.lower():
        return False
    if device.total < int(wanted.get("minVramMiB", 0)):
        return False
    major, _, minor = wanted.get("minComputeCapability", "0").partition(".")
    return device.compute_capability >= (int(major), int(minor or 0))


def _by_memory(pool: PoolView, node: NodeView, devices: list[DeviceView]) -> Fit | Refusal:
    free = available(node)
    need = need_of(pool, devices[0].kind)
    if need is None:
        text = (
            f"{pool.shape.caveat}; nothing has measured it yet: state engine.vramMiB, or put llama-fit-params beside llama-server"
        )
        return Refusal(node.name, Cause.UNSIZED, text)
    roomy = [device for device in devices if free[device.uuid] >= need.total_mib]
    if roomy:
        most = pool.placement.strategy is Strategy.SPREAD
        best = min(roomy, key=lambda device: (-free[device.uuid] if most else free[device.uuid], device.uuid))
        return Fit(node.name, {best.uuid: need.total_mib})
    ordered = sorted(devices, key=lambda device: (-free[device.uuid], device.uuid))
    if pool.placement.allow_split:
        whole = [device for device in ordered if device.splits][:MAX_ASSIGNED_DEVICES]
        for count in range(2, len(whole) + 1):
            chosen = whole[:count]
            spread = need_of(pool, "gpu", count)
            shares = split_need(spread, [free[device.uuid] for device in chosen]) if spread is not None else None
            if shares is not None:
                return Fit(node.name, {device.uuid: share for device, share in zip(chosen, shares, strict=True)})
    nearest = ordered[0]
    detail = ""
    if len(ordered) > 1:
        detail = f" on the roomiest of {len(ordered)} devices"
        if pool.placement.allow_split:
            detail += f", {sum(free[device.uuid] for device in ordered):,} over all of them"
    return Refusal(node.name, Cause.MEMORY, detail, need.total_mib, free[nearest.uuid], nearest.total, nearest.foreign)


def occupied(node: NodeView, pool: PoolView, placed: Fit, replica_id: str) -> NodeView:
    """`node` with the new replica on it, its whole estimate reserved."""
    replica = ReplicaView(
        id=replica_id,
        pool=pool.key,
        node=node.name,
        revision=pool.revision,
        desired=Desired.RUN,
        devices=placed.devices,
        slots=pool.slots,
        reserved=sum(placed.devices.values()),
        slots_free=pool.slots,
    )
    return replace(node, replicas=(*node.replicas, replica))
