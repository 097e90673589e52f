"""Writes the header of a GGUF file (version 3, little-endian): for the demo model, and for models made of holes in tests."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .gguf_format import DEFAULT_ALIGNMENT, MAGIC, SCALAR_FORMATS, TENSOR_TYPES, Scalar, Tensor, ValueType

VERSION = 3


@dataclass(frozen=True, slots=True)
class Typed:
    """A value with its type in the file. `value` is a scalar, or a sequence of them for an array."""

    type: ValueType
    value: Scalar | Sequence[Scalar]


def u32(value: int) -> Typed:
    """An unsigned 32-bit integer."""
    return Typed(ValueType.UINT32, value)


def f32(value: float) -> Typed:
    """A 32-bit float."""
    return Typed(ValueType.FLOAT32, value)


def text(value: str) -> Typed:
    """A string."""
    return Typed(ValueType.STRING, value)


def boolean(value: bool) -> Typed:
    """A truth value."""
    return Typed(ValueType.BOOL, value)


def encode_header(kv: Mapping[str, Typed], tensors: Iterable[Tensor], *, version: int = VERSION) -> bytes:
    """The bytes up to the tensor data, padding included."""
    listed = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", version, len(listed), len(kv))]
    for key, typed in kv.items():
        parts += [_string(key), _value(typed)]
    for tensor in listed:
        rank = len(tensor.dimensions)
        parts += [_string(tensor.name), struct.pack(f"<I{rank}QIQ", rank, *tensor.dimensions, tensor.type, tensor.offset)]
    header = b"".join(parts)
    return header + bytes(-len(header) % DEFAULT_ALIGNMENT)


def lay_out(shapes: Iterable[tuple[str, tuple[int, ...], int]]) -> tuple[list[Tensor], int]:
    """Tensors of (name, dimensions in ggml order, ggml type id) one behind the other, and the bytes of all their data."""
    tensors, offset = [], 0
    for name, dimensions, kind in shapes:
        tensor = Tensor(name, dimensions, kind, offset)
        tensors.append(tensor)
        offset += tensor.size_bytes + -tensor.size_bytes % DEFAULT_ALIGNMENT
    return tensors, offset


def type_id(name: str) -> int:
    """The ggml type id of that name, for example Q8_0."""
    return next(number for number, kind in TENSOR_TYPES.items() if kind.name == name)


def _string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(typed: Typed) -> bytes:
    value = typed.value
    if isinstance(value, str) or not isinstance(value, Sequence):
        return struct.pack("<I", typed.type) + _scalars(typed.type, [value])
    return struct.pack("<IIQ", ValueType.ARRAY, typed.type, len(value)) + _scalars(typed.type, value)


def _scalars(kind: ValueType, values: Sequence[Scalar]) -> bytes:
    if kind is ValueType.STRING:
        return b"".join(_string(str(value)) for value in values)
    return struct.pack(f"<{len(values)}{SCALAR_FORMATS[kind]}", *values)
