"""From a GGUF header to the few integers from which memory needs follow.

What counts where is llama.cpp's: input embeddings stay in host memory, everything else goes to the devices; a tied output
is a second copy of the token embedding there; layers that slide keep a window of the context only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from llorch_api import ModelShape

from .gguf_format import GGUFError, Header, LongArray

MIB = 1 << 20
MAX_LAYERS = 1024
HOST_TENSORS = frozenset({"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"})
"""Looked up row by row: llama.cpp leaves them in host memory (LLM_TENSOR_LAYER_INPUT in llama-arch.cpp)."""

PLAIN_ATTENTION = frozenset(
    {
        "llama",
        "deci",
        "falcon",
        "grok",
        "gpt2",
        "gptj",
        "gptneox",
        "mpt",
        "baichuan",
        "starcoder",
        "refact",
        "bloom",
        "stablelm",
        "qwen",
        "qwen2",
        "qwen2moe",
        "qwen2vl",
        "qwen3",
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
        "phi2",
        "phi3",
        "phimoe",
        "plamo",
        "codeshell",
        "orion",
        "internlm2",
        "minicpm",
        "gemma",
        "starcoder2",
        "xverse",
        "command-r",
        "dbrx",
        "olmo",
        "olmoe",
        "openelm",
        "arctic",
        "deepseek",
        "chatglm",
        "glm4",
        "glm4moe",
        "bitnet",
        "jais",
        "jais2",
        "nemotron",
        "exaone",
        "granite",
        "granitemoe",
        "chameleon",
        "bailingmoe",
        "bailingmoe2",
        "dots1",
        "arcee",
        "ernie4_5",
        "ernie4_5-moe",
        "hunyuan-dense",
        "hunyuan-moe",
        "smollm3",
        "seed_oss",
        "grovemoe",
        "apertus",
        "minimax-m2",
        "cogvlm",
        "pangu-embedded",
        "mistral3",
        "paddleocr",
        "maincoder",
    }
)
"""Architectures whose every layer keeps keys and values of the whole context (create_memory in llama-model.cpp)."""


class Sliding(NamedTuple):
    """How layers alternate: of each `period` layers one attends to everything, the last, or the first if `dense_first`.

    `window` is used when the header names none, or always when `fixed`. `period` 0: the header must say it layer by layer.
    """

    period: int
    dense_first: bool = False
    window: int = 0
    fixed: bool = False


SLIDING: Mapping[str, Sliding] = MappingProxyType(
    {
        "afmoe": Sliding(4),
        "cohere2": Sliding(4),
        "cohere2moe": Sliding(4, dense_first=True),
        "exaone-moe": Sliding(4),
        "exaone4": Sliding(4, window=4096),
        "gemma2": Sliding(2, window=4096),
        "gemma3": Sliding(6),
        "gemma4": Sliding(0),
        "gpt-oss": Sliding(2),
        "granite_swa": Sliding(0),
        "llama4": Sliding(4, window=8192, fixed=True),
        "mimo2": Sliding(0),
        "olmo2": Sliding(4),
        "plamo3": Sliding(8),
        "smallthinker": Sliding(4, dense_first=True, window=4096, fixed=True),
        "step35": Sliding(0),
    }
)
"""load_swa_pattern of each file in llama.cpp's src/models. It ignores a `sliding_window` of other architectures (phi3, qwen2)."""

CACHELESS = frozenset(
    {
        "bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "eurobert",
        "modern-bert",
        "gemma-embedding",
        "wavtokenizer-dec",
        "dream",
        "llada",
        "llada-moe",
        "rnd1",
    }
)
"""Encoders and diffusion models: no KV cache at all."""

NOT_A_MODEL: Mapping[str, str] = MappingProxyType(
    {"adapter": "a LoRA adapter", "mmproj": "a multimodal projector", "imatrix": "an importance matrix", "vocab": "a vocabulary"}
)
"""general.type of GGUF files that hold something else."""


def shape_of(header: Header) -> ModelShape:
    """The shape of the model. Raises GGUFError when the header is not one of a whole model.

    `caveat` is set where the header alone does not decide the memory need; the figures are then an estimate to be distrusted.
    """
    architecture = header.architecture
    if not architecture:
        raise GGUFError("general.architecture is missing")
    if (kind := NOT_A_MODEL.get(header.text("general.type"))) or architecture == "clip":
        raise GGUFError(f"this is {kind or 'a multimodal projector'}, not a model")
    if not header.tensors:
        raise GGUFError("there are no tensors in it, only a vocabulary")
    layers = _trunk_layers(header)
    sizes = {tensor.name: tensor.size_bytes for tensor in header.tensors}
    host = sum(size for name, size in sizes.items() if name in HOST_TENSORS)
    embedding = sizes.get("token_embd.weight", 0)
    tied = 0 if "output.weight" in sizes else embedding
    window, full, sliding = _key_value_elements(header, layers)
    return ModelShape(
        architecture=architecture[:64],
        layers=layers,
        embedding_length=header.integer(f"{architecture}.embedding_length", 0),
        vocab_size=_vocabulary(header),
        context_length=header.integer(f"{architecture}.context_length", 0),
        weights_mib=_mib(sum(sizes.values()) - host + tied),
        host_mib=_mib(host),
        kv_key_elements=full[0],
        kv_value_elements=full[1],
        swa_key_elements=sliding[0],
        swa_value_elements=sliding[1],
        swa_window=window,
        caveat=_caveat(header)[:256],
    )


def split_files(header: Header) -> int:
    """Number of files the model is split over; 1 for a whole one."""
    return max(1, header.integer("split.count", 1))


def _trunk_layers(header: Header) -> int:
    """Transformer blocks without those that only predict ahead (multi-token prediction): they have no part in the KV cache."""
    layers = header.integer(f"{header.architecture}.block_count")
    if not 0 < layers <= MAX_LAYERS:
        raise GGUFError(f"{layers:,} layers are implausible")
    return max(1, layers - header.integer(f"{header.architecture}.nextn_predict_layers", 0))


def _vocabulary(header: Header) -> int:
    tokens = header.kv.get("tokenizer.ggml.tokens", ())
    listed = tokens.length if isinstance(tokens, LongArray) else len(tokens) if isinstance(tokens, tuple) else 0
    return header.integer(f"{header.architecture}.vocab_size", listed)


def _per_layer(header: Header, key: str, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """A setting given once for all layers, or layer by layer."""
    value = header.kv.get(f"{header.architecture}.{key}")
    if value is None:
        return default
    if not isinstance(value, tuple):
        return (header.integer(f"{header.architecture}.{key}"),) * layers
    numbers = tuple(item for item in value if isinstance(item, int) and item >= 0)
    if len(numbers) < layers or len(numbers) != len(value):
        raise GGUFError(f"{header.architecture}.{key} does not name {layers} layers")
    return numbers[:layers]


def _key_value_elements(header: Header, layers: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """(window, (keys, values) per token over full layers, the same over sliding layers)."""
    if header.architecture in CACHELESS:
        return 0, (0, 0), (0, 0)
    prefix = f"{header.architecture}.attention"
    heads = _per_layer(header, "attention.head_count", layers, (0,) * layers)
    kv_heads = _per_layer(header, "attention.head_count_kv", layers, heads)
    # Like llama.cpp: the default head width follows from the first layer's heads.
    width = header.integer(f"{header.architecture}.embedding_length", 0) // heads[0] if heads[0] else 0
    keys = header.integer(f"{prefix}.key_length", width)
    values = header.integer(f"{prefix}.value_length", width)
    window, slides = _sliding_layers(header, layers)
    full_heads = sum(count for count, sliding in zip(kv_heads, slides, strict=True) if not sliding)
    swa_heads = sum(kv_heads) - full_heads
    swa_keys = header.integer(f"{prefix}.key_length_swa", keys)
    swa_values = header.integer(f"{prefix}.value_length_swa", values)
    return window, (full_heads * keys, full_heads * values), (swa_heads * swa_keys, swa_heads * swa_values)


def _sliding_layers(header: Header, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The window in tokens, and which layers slide."""
    none = 0, (False,) * layers
    rule = SLIDING.get(header.architecture)
    key = f"{header.architecture}.attention.sliding_window"
    if rule is None or (header.architecture == "exaone4" and layers != 64):
        return none
    window = header.integer(key, rule.window)
    if window == 0:
        return none
    if rule.fixed:
        window = rule.window
    pattern = header.kv.get(f"{key}_pattern")
    if isinstance(pattern, tuple):
        if len(pattern) < layers:
            raise GGUFError(f"{key}_pattern does not name {layers} layers")
        return window, tuple(bool(slides) for slides in pattern[:layers])
    period = header.integer(f"{key}_pattern", rule.period)
    if period == 0:
        return (window, (True,) * layers) if pattern is not None else none
    full = 0 if rule.dense_first else period - 1
    return window, tuple(layer % period != full for layer in range(layers))


def _caveat(header: Header) -> str:
    """Why the figures cannot be trusted; empty where they can."""
    architecture = header.architecture
    keys = [key.removeprefix(f"{architecture}.") for key in header.kv if key.startswith(f"{architecture}.")]
    if (files := split_files(header)) > 1:
        return f"part of a model split over {files} files: weights of the other parts are not counted"
    if any(key.startswith(("ssm.", "wkv.", "kda.", "shortconv.")) for key in keys):
        return f"{architecture} keeps recurrent state, which the header does not size: the KV figure is not exact"
    if any(key.startswith("attention.kv_lora_rank") for key in keys):
        return f"{architecture} uses latent attention (MLA): the KV figure is not exact"
    if any(key.startswith(("attention.indexer.", "attention.compress_ratios")) for key in keys):
        return f"{architecture} uses sparse attention with its own caches: the KV figure is not exact"
    if any(key.startswith("attention.shared_kv_layers") for key in keys) or architecture == "gemma3n":
        return f"{architecture} shares its KV cache between layers: the KV figure is an upper bound"
    if architecture in CACHELESS:
        return f"{architecture} keeps no KV cache: it embeds or denoises, and may not serve chats"
    if architecture not in PLAIN_ATTENTION and architecture not in SLIDING:
        return f"architecture {architecture} is not known here: the memory figures may be wrong"
    return ""


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB)
