"""Writes a tiny llama-architecture GGUF with random weights, for the demo and for tests. Deterministic, standard library only.

The weights are noise, yet the text that comes out is usable, by two tricks:

- Dimension 0 of every embedding is 1 and no layer writes to it (row 0 of attn_output and ffn_down is zero). So after the last
  norm it is positive for every token, and column 0 of the output matrix acts as a bias on the logits.
- Byte, control and unused tokens get a bias no sampler overcomes. What is left is printable ASCII, so every chunk of a stream
  is valid UTF-8, and the end of text is never sampled: a request always runs to max_tokens.

All matrices are Q8_0 (blocks of an f16 scale and 32 signed bytes), so random bytes are weights, and even the larger model is
written in well under a second.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from .core.gguf_format import ValueType
from .core.gguf_write import Typed, boolean, encode_header, f32, lay_out, text, type_id, u32

BLOCK = 32
BLOCK_BYTES = 34
RMS_OF_BYTE = 73.9
"""Root mean square of a uniform signed byte: a scale of s / this gives weights of deviation s."""
BIAS = 120.0
"""The last norm leaves dimension 0 at about 0.3 to 1, so this lowers a logit by 36 at least."""
NO_MINUS_128 = bytes(range(128)) + bytes([129]) + bytes(range(129, 256))
"""Q8_0 is symmetric: -128 does not occur in it, and some kernels take the absolute value in a byte."""

SPACE = "\u2581"
SYLLABLES = ("an", "er", "in", "on", "re", "th", "the", "and", "ing", "ion", "to", "of", "st", "en", "al", "it")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TokenType(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    score: float
    type: TokenType

    @property
    def may_be_sampled(self) -> bool:
        return self.type is TokenType.NORMAL


def write_tiny(
    path: str | os.PathLike[str],
    *,
    layers: int = 2,
    embd: int = 64,
    ff: int = 192,
    heads: int = 4,
    kv_heads: int = 2,
    ctx: int = 32_768,
    seed: int = 1,
    name: str = "llorch-tiny",
) -> Path:
    """Writes the model to `path` atomically and returns the path. 0.2 MB by default; equal arguments give equal bytes.

    `embd` and `ff` must be multiples of 32, `embd` of `heads`, `heads` of `kv_heads`, KV width too (ValueError).
    """
    if embd % heads or heads % kv_heads or embd % BLOCK or ff % BLOCK or (embd // heads) % 2:
        raise ValueError("embd and ff must be multiples of 32, embd of twice the heads, heads of kv_heads")
    tokens = _vocabulary()
    width = embd // heads
    shapes = list(_tensor_shapes(layers, embd, ff, width * kv_heads, len(tokens)))
    tensors, _ = lay_out(shapes)
    header = encode_header(_settings(tokens, layers, embd, ff, heads, kv_heads, ctx, name), tensors)
    rng = random.Random(seed)  # noise for a demo, nothing secret
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            for tensor in tensors:
                data = _tensor_data(tensor.name, tensor.dimensions, tokens, rng)
                file.write(data)
                file.write(bytes(-len(data) % BLOCK))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def write_mid(path: str | os.PathLike[str], *, seed: int = 1, name: str = "llorch-mid", ctx: int = 32_768) -> Path:
    """The same at 26 MB: some hundred tokens per second on a core, so that requests last long enough to test slots on."""
    return write_tiny(path, layers=8, embd=512, ff=1536, heads=8, kv_heads=2, ctx=ctx, seed=seed, name=name)


def _vocabulary() -> list[_Token]:
    tokens = [_Token("<unk>", 0, TokenType.UNKNOWN), _Token("<s>", 0, TokenType.CONTROL), _Token("</s>", 0, TokenType.CONTROL)]
    # The SentencePiece tokenizer looks these up for whatever has no token of its own.
    tokens += [_Token(f"<0x{byte:02X}>", 0, TokenType.BYTE) for byte in range(256)]
    tokens += [_Token("<|im_start|>", 0, TokenType.CONTROL), _Token("<|im_end|>", 0, TokenType.CONTROL)]
    words = [SPACE, *(chr(code) for code in range(0x21, 0x7F)), *SYLLABLES]
    words += [SPACE + syllable for syllable in SYLLABLES] + [SPACE + letter for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens += [_Token(word, -rank, TokenType.NORMAL) for rank, word in enumerate(dict.fromkeys(words), start=1)]
    while len(tokens) % BLOCK:
        tokens.append(_Token(f"<|pad{len(tokens)}|>", 0, TokenType.UNUSED))
    return tokens


def _settings(
    tokens: list[_Token], layers: int, embd: int, ff: int, heads: int, kv_heads: int, ctx: int, name: str
) -> dict[str, Typed]:
    index = {token.text: number for number, token in enumerate(tokens)}
    return {
        "general.architecture": text("llama"),
        "general.type": text("model"),
        "general.name": text(name),
        "general.file_type": u32(7),
        "llama.context_length": u32(ctx),
        "llama.embedding_length": u32(embd),
        "llama.block_count": u32(layers),
        "llama.feed_forward_length": u32(ff),
        "llama.attention.head_count": u32(heads),
        "llama.attention.head_count_kv": u32(kv_heads),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.dimension_count": u32(embd // heads),
        "llama.rope.freq_base": f32(10_000.0),
        "llama.vocab_size": u32(len(tokens)),
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": Typed(ValueType.STRING, [token.text for token in tokens]),
        "tokenizer.ggml.scores": Typed(ValueType.FLOAT32, [token.score for token in tokens]),
        "tokenizer.ggml.token_type": Typed(ValueType.INT32, [int(token.type) for token in tokens]),
        "tokenizer.ggml.bos_token_id": u32(index["<s>"]),
        "tokenizer.ggml.eos_token_id": u32(index["</s>"]),
        "tokenizer.ggml.unknown_token_id": u32(index["<unk>"]),
        "tokenizer.ggml.eot_token_id": u32(index["<|im_end|>"]),
        "tokenizer.ggml.add_bos_token": boolean(True),
        "tokenizer.ggml.add_space_prefix": boolean(True),
        "tokenizer.chat_template": text(CHAT_TEMPLATE),
    }


def _tensor_shapes(layers: int, embd: int, ff: int, kv: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    matrix, vector = type_id("Q8_0"), type_id("F32")
    yield "token_embd.weight", (embd, vocabulary), matrix
    for layer in range(layers):
        prefix = f"blk.{layer}."
        yield prefix + "attn_norm.weight", (embd,), vector
        yield prefix + "attn_q.weight", (embd, embd), matrix
        yield prefix + "attn_k.weight", (embd, kv), matrix
        yield prefix + "attn_v.weight", (embd, kv), matrix
        yield prefix + "attn_output.weight", (embd, embd), matrix
        yield prefix + "ffn_norm.weight", (embd,), vector
        yield prefix + "ffn_gate.weight", (embd, ff), matrix
        yield prefix + "ffn_up.weight", (embd, ff), matrix
        yield prefix + "ffn_down.weight", (ff, embd), matrix
    yield "output_norm.weight", (embd,), vector
    yield "output.weight", (embd, vocabulary), matrix


def _tensor_data(name: str, dimensions: tuple[int, ...], tokens: list[_Token], rng: random.Random) -> bytes | bytearray:
    if len(dimensions) == 1:
        return struct.pack(f"<{dimensions[0]}f", *[1.0] * dimensions[0])
    columns, rows = dimensions
    row_bytes = columns // BLOCK * BLOCK_BYTES
    embeddings = name == "token_embd.weight"
    data = _noise(rows * columns // BLOCK, 1.0 if embeddings else columns**-0.5, rng)
    if embeddings:
        # The byte that stands for 1.0 at this scale.
        data[2::row_bytes] = bytes([round(RMS_OF_BYTE)]) * rows
    elif name == "output.weight":
        data[2::row_bytes] = bytes(rows)
        barred = struct.pack("<eb", BIAS / 127, -127) + bytes(BLOCK - 1)
        for row, token in enumerate(tokens):
            if not token.may_be_sampled:
                data[row * row_bytes : row * row_bytes + BLOCK_BYTES] = barred
    elif name.endswith(("attn_output.weight", "ffn_down.weight")):
        data[:row_bytes] = bytes(row_bytes)
    return data


def _noise(blocks: int, deviation: float, rng: random.Random) -> bytearray:
    """Q8_0 blocks of weights with mean 0 and that standard deviation."""
    data = bytearray(rng.randbytes(blocks * BLOCK_BYTES).translate(NO_MINUS_128))
    low, high = struct.pack("<e", deviation / RMS_OF_BYTE)
    data[0::BLOCK_BYTES] = bytes([low]) * blocks
    data[1::BLOCK_BYTES] = bytes([high]) * blocks
    return data


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 2:
        sys.exit("usage: python -m llorch_model.tiny PATH")
    print(write_tiny(Path(sys.argv[1])))
