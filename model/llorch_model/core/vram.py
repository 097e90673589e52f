"""How much memory an engine will take, before it is started. All sizes in MiB, rounded up; all estimates on the safe side.

The formula is llama.cpp's own allocation, read from its source and compared with its figures (`llama-fit-params`) over llama,
gemma3, qwen2, qwen3moe in 25 settings: weights and KV cache equal to the MiB, compute buffers 4 to 17 % above, totals 0.1 to
1.6 % above.

- weights: every tensor but the input embeddings; a tied output is a second copy of them.
- KV cache (llama-kv-cache.cpp): cells x KV heads x (key + value width) x bytes of the type. Cells are the context of a slot,
  padded to 256, times the slots; sliding layers keep `window + ubatch` instead (llama-kv-cache-iswa.cpp).
- compute: one micro-batch's logits and a few activations, and the attention mask (f16 beside f32).
- margin: the CUDA context, 300 to 500 MiB per process and device, which no header tells of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from llorch_api import ModelShape

MIB = 1 << 20
MARGIN_MIB = 512
DEFAULT_BATCH = 2048
DEFAULT_UBATCH = 512
CELL_PADDING = 256
PIPELINE_COPIES = 4
"""GGML_SCHED_MAX_COPIES: inputs are kept this often when layers are split over devices."""
DIMENSIONS_PER_HEAD = 64
"""The narrowest heads of current models. Bounds the number of heads, which the shape does not carry."""

KV_TYPES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "f32": (4, 1),
        "f16": (2, 1),
        "bf16": (2, 1),
        "q8_0": (34, 32),
        "q5_1": (24, 32),
        "q5_0": (22, 32),
        "q4_1": (20, 32),
        "q4_0": (18, 32),
        "iq4_nl": (18, 32),
    }
)
"""Bytes per elements of the types that --cache-type-k and -v take."""


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What engine arguments say about memory, with llama-server's defaults."""

    ubatch: int = DEFAULT_UBATCH
    """Tokens of a micro-batch."""
    swa_full: bool = False
    """True keeps the whole context in sliding layers too."""
    flash_attention: bool = True
    """False when switched off: attention scores are then kept for every head."""
    cache_ram_mib: int = 0
    """Host memory for prompt caches that --cache-ram allows; 0 where it is not given."""
    kv_cache_type: str = "f16"
    """Of the keys; an assignment's are the same for both."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What one replica takes, in MiB. `compute_mib` and `margin_mib` are needed on each device, weights and KV once."""

    weights_mib: int
    kv_mib: int
    compute_mib: int
    margin_mib: int
    devices: int
    step_mib: int
    """The largest piece that is not split any further: a layer, or the output."""

    @property
    def overhead_mib(self) -> int:
        """Needed on every device beside its share of weights and KV."""
        return self.compute_mib + self.margin_mib

    @property
    def total_mib(self) -> int:
        """Over all devices."""
        return self.weights_mib + self.kv_mib + self.devices * self.overhead_mib

    def __str__(self) -> str:
        parts = f"weights {self.weights_mib:,} + KV {self.kv_mib:,} + compute {self.compute_mib:,} + margin {self.margin_mib:,}"
        return f"{self.total_mib:,} MiB ({parts}{f', {self.devices} devices' if self.devices > 1 else ''})"


def estimate(
    shape: ModelShape,
    *,
    slots: int,
    context_tokens: int,
    kv_cache_type: str = "f16",
    ubatch: int = DEFAULT_UBATCH,
    swa_full: bool = False,
    flash_attention: bool = True,
    devices: int = 1,
    margin_mib: int = MARGIN_MIB,
) -> MemoryNeed:
    """Device memory of a replica with all layers on `devices` GPUs.

    `context_tokens` is per slot (llama-server's -c is that times `slots`). Raises ValueError for an unknown KV type or counts
    below 1.
    """
    if min(slots, context_tokens, ubatch, devices) < 1:
        raise ValueError("slots, context_tokens, ubatch and devices must be 1 or more")
    per_slot = _pad(context_tokens)
    cells = per_slot * slots
    batch = min(ubatch, cells)
    sliding = cells if swa_full else _pad(min(per_slot, shape.swa_window + batch)) * slots
    full_elements = shape.kv_key_elements + shape.kv_value_elements
    swa_elements = shape.swa_key_elements + shape.swa_value_elements
    kv_bytes = _stored(cells * full_elements + sliding * swa_elements, kv_cache_type)
    kv_mib = _mib(kv_bytes)
    model_mib = shape.weights_mib + kv_mib
    layer_mib = -(-model_mib // (shape.layers + 1))
    return MemoryNeed(
        weights_mib=shape.weights_mib,
        kv_mib=kv_mib,
        compute_mib=_mib(_compute_bytes(shape, batch, per_slot, flash_attention, devices)),
        margin_mib=margin_mib,
        devices=devices,
        step_mib=max(layer_mib, shape.host_mib) if devices > 1 else 0,
    )


def host_need(
    shape: ModelShape,
    *,
    slots: int,
    context_tokens: int,
    kv_cache_type: str = "f16",
    ubatch: int = DEFAULT_UBATCH,
    swa_full: bool = False,
    flash_attention: bool = True,
    cache_ram_mib: int = 0,
    margin_mib: int = MARGIN_MIB,
) -> MemoryNeed:
    """Host memory of a replica on a node without a GPU: the embeddings count too, and so do prompt caches."""
    need = estimate(
        shape,
        slots=slots,
        context_tokens=context_tokens,
        kv_cache_type=kv_cache_type,
        ubatch=ubatch,
        swa_full=swa_full,
        flash_attention=flash_attention,
        margin_mib=margin_mib + max(0, cache_ram_mib),
    )
    return MemoryNeed(shape.weights_mib + shape.host_mib, need.kv_mib, need.compute_mib, need.margin_mib, 1, 0)


def split_need(need: MemoryNeed, free_mib_per_device: Sequence[int]) -> tuple[int, ...] | None:
    """MiB to reserve on each device when the replica is spread over all of them, or None when it does not fit so.

    Weights and KV go in proportion to free memory, as llama.cpp splits by default, in steps of whole layers; compute buffer and
    margin are needed on each. `need` must be an estimate for as many devices (ValueError otherwise).
    """
    if need.devices != len(free_mib_per_device):
        raise ValueError(f"the estimate is for {need.devices} devices, not {len(free_mib_per_device)}")
    total_free = sum(free_mib_per_device)
    if min(free_mib_per_device) <= 0:
        return None
    model = need.weights_mib + need.kv_mib
    shares = tuple(-(-model * free // total_free) + need.step_mib + need.overhead_mib for free in free_mib_per_device)
    return shares if all(share <= free for share, free in zip(shares, free_mib_per_device, strict=True)) else None


def tensor_split(need: MemoryNeed, shares: Sequence[int]) -> tuple[int, ...]:
    """What --tensor-split must say so that the engine keeps to `shares`, whatever is free on the devices when it starts."""
    return tuple(max(0, share - need.step_mib - need.overhead_mib) for share in shares)


def memory_settings(arguments: Sequence[str]) -> MemorySettings:
    """What `arguments` of llama-server change about memory.

    Values that llama-server would refuse count as not given: it will say so itself. `--cpu-moe` and `--n-cpu-moe` are ignored:
    the need then stays that of all experts on the devices, which is more than is used.
    """
    batch, ubatch, cache_ram = DEFAULT_BATCH, DEFAULT_UBATCH, 0
    swa_full, flash_attention, kv_cache_type = False, True, "f16"
    for position, argument in enumerate(arguments):
        flag, _, joined = argument.partition("=")
        value = joined or (arguments[position + 1] if position + 1 < len(arguments) else "")
        if flag in ("--ubatch-size", "-ub"):
            ubatch = _count(value, ubatch)
        elif flag in ("--batch-size", "-b"):
            batch = _count(value, batch)
        elif flag in ("--cache-ram", "-cram"):
            cache_ram = _count(value, cache_ram)
        elif flag in ("--cache-type-k", "-ctk"):
            kv_cache_type = value
        elif flag == "--swa-full":
            swa_full = True
        elif flag in ("--flash-attn", "-fa"):
            flash_attention = value.lower() not in ("off", "false", "disabled", "0")
    least = max(1, min(ubatch, batch)) if ubatch else batch
    return MemorySettings(least, swa_full, flash_attention, cache_ram, kv_cache_type)


def _compute_bytes(shape: ModelShape, batch: int, per_slot: int, flash_attention: bool, devices: int) -> int:
    activations = batch * 4 * (shape.vocab_size + 3 * shape.embedding_length)
    mask = batch * per_slot * 6
    copies = PIPELINE_COPIES - 1 if devices > 1 else 0
    pipeline = copies * batch * 4 * (per_slot + shape.embedding_length)
    scores = 0 if flash_attention else batch * per_slot * 4 * max(1, shape.embedding_length // DIMENSIONS_PER_HEAD)
    return activations + mask + pipeline + scores


def _stored(elements: int, kv_cache_type: str) -> int:
    if kv_cache_type not in KV_TYPES:
        raise ValueError(f"KV cache type {kv_cache_type!r} must be one of {', '.join(KV_TYPES)}")
    size, block = KV_TYPES[kv_cache_type]
    return -(-elements * size // block)


def _count(value: str, default: int) -> int:
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else default


def _pad(tokens: int) -> int:
    return tokens + -tokens % CELL_PADDING


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB)
