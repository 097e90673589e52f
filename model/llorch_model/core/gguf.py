"""Reads the header of a GGUF file, and nothing behind it: keys, tensor names, shapes and offsets.

Sans-io. `HeaderParser` is fed the front of a file in pieces of any size and says how many bytes it still wants, so that a
local file and HTTP range reads drive the same code. Versions 2 and 3, little-endian; the checks are those of llama.cpp's
loader (gguf.cpp), so that a file it would refuse is refused before anything is downloaded or started.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from types import MappingProxyType
from typing import TypeVar

from .gguf_format import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    SCALAR_FORMATS,
    TENSOR_TYPES,
    GGUFError,
    Header,
    LongArray,
    Scalar,
    Tensor,
    Value,
    ValueType,
)

__all__ = ["GGUFError", "Header", "HeaderParser", "LongArray", "Tensor"]

MAX_HEADER_BYTES = 64 << 20
"""A header with a 256k-token vocabulary takes about 10 MiB; what is larger than this is not a model."""
MAX_KEPT_ITEMS = 1024
"""Arrays up to this length are kept (per-layer settings); of longer ones (vocabularies) type and length only."""
MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_NAME_BYTES = 1 << 16
MAX_STRING_BYTES = 16 << 20
MAX_DIMENSIONS = 4
_INT64_MAX = (1 << 63) - 1

T = TypeVar("T")
_Steps = Generator[int, None, T]
"""Yields the bytes wanted whenever the buffer runs dry, and goes on after the next feed."""


class HeaderParser:
    """Parses a header that comes in pieces.

    Feed it until `header` is there; `wanted` says how many more bytes are needed at least. `close` says that no more will come.
    """

    def __init__(self, max_header_bytes: int = MAX_HEADER_BYTES) -> None:
        self._limit = max_header_bytes
        self._buffer = b""
        self._position = 0
        self._consumed = 0
        """Bytes of the file in front of the buffer."""
        self._header: Header | None = None
        self._steps = self._parse()
        self._wanted = next(self._steps)

    @property
    def header(self) -> Header | None:
        """The header, once it is complete."""
        return self._header

    @property
    def wanted(self) -> int:
        """Bytes needed at least before parsing can go on; 0 when the header is complete."""
        return self._wanted

    def feed(self, data: bytes) -> Header | None:
        """Takes the next bytes of the file; returns the header once complete. Raises GGUFError. Bytes behind it are ignored."""
        if self._header is not None or not data:
            return self._header
        if self._position:
            self._consumed += self._position
            self._buffer = self._buffer[self._position :]
            self._position = 0
        self._buffer = self._buffer + data if self._buffer else data
        try:
            self._wanted = next(self._steps)
        except StopIteration as done:
            self._header, self._buffer, self._wanted = done.value, b"", 0
        return self._header

    def close(self) -> Header:
        """The header; raises GGUFError when the bytes so far do not complete one."""
        if self._header is not None:
            return self._header
        got = self._consumed + len(self._buffer)
        if got == 0:
            raise GGUFError("the file is empty")
        if self._consumed == 0 and not self._buffer.startswith(MAGIC[:got]):
            raise GGUFError("not a GGUF file")
        raise GGUFError(f"the header is cut off after {got:,} bytes")

    def _room(self, size: int) -> _Steps[None]:
        """Waits until `size` more bytes are in the buffer."""
        while (missing := size - (len(self._buffer) - self._position)) > 0:
            self._check_limit(size)
            yield missing

    def _check_limit(self, size: int) -> None:
        if self._consumed + self._position + size > self._limit:
            raise GGUFError(f"the header is larger than {self._limit >> 20} MiB")

    def _unpack(self, layout: str) -> _Steps[tuple[Scalar, ...]]:
        size = struct.calcsize(layout)
        yield from self._room(size)
        values = struct.unpack_from(layout, self._buffer, self._position)
        self._position += size
        return values

    def _integer(self, layout: str) -> _Steps[int]:
        values = yield from self._unpack(layout)
        return int(values[0])

    def _bytes(self, size: int) -> _Steps[bytes]:
        yield from self._room(size)
        data = self._buffer[self._position : self._position + size]
        self._position += size
        return data

    def _string(self, what: str, limit: int) -> _Steps[str]:
        size = yield from self._integer("<Q")
        if size > limit:
            raise GGUFError(f"{what} of {size:,} bytes is implausible")
        data = yield from self._bytes(size)
        return data.decode("utf-8", "replace")

    def _skip(self, size: int) -> _Steps[None]:
        """Drops `size` bytes without ever holding them all."""
        self._check_limit(size)
        while True:
            step = min(size, len(self._buffer) - self._position)
            self._position += step
            size -= step
            if size == 0:
                return
            yield size

    def _skip_strings(self, count: int) -> _Steps[None]:
        """Walks over `count` strings. The hot loop (vocabulary and merges: 400,000 strings), hence the locals."""
        length_at = struct.Struct("<Q").unpack_from
        buffer, position, end = self._buffer, self._position, len(self._buffer)
        for _ in range(count):
            if end - position < 8:
                self._position = position
                yield from self._room(8)
                buffer, position, end = self._buffer, self._position, len(self._buffer)
            size = length_at(buffer, position)[0]
            position += 8
            if end - position < size:
                if size > MAX_STRING_BYTES:
                    raise GGUFError(f"a string of {size:,} bytes is implausible")
                self._position = position
                yield from self._room(size)
                buffer, position, end = self._buffer, self._position, len(self._buffer)
            position += size
        self._position = position

    def _value_type(self, key: str) -> _Steps[ValueType]:
        number = yield from self._integer("<I")
        try:
            return ValueType(number)
        except ValueError:
            raise GGUFError(f"{key} has an unknown value type {number}") from None

    def _value(self, key: str) -> _Steps[Value]:
        key = _shown(key)
        kind = yield from self._value_type(key)
        if kind is ValueType.STRING:
            return (yield from self._string(key, MAX_STRING_BYTES))
        if kind is ValueType.ARRAY:
            return (yield from self._array(key))
        return (yield from self._unpack("<" + SCALAR_FORMATS[kind]))[0]

    def _array(self, key: str) -> _Steps[Value]:
        kind = yield from self._value_type(key)
        if kind is ValueType.ARRAY:
            raise GGUFError(f"{key} is an array of arrays")
        count = yield from self._integer("<Q")
        width = 8 if kind is ValueType.STRING else struct.calcsize("<" + SCALAR_FORMATS[kind])
        if count * width > self._limit:
            raise GGUFError(f"{key} with {count:,} items is implausible")
        if count > MAX_KEPT_ITEMS:
            yield from self._skip_strings(count) if kind is ValueType.STRING else self._skip(count * width)
            return LongArray(kind, count)
        if kind is ValueType.STRING:
            strings: list[Scalar] = [""] * count
            for index in range(count):
                strings[index] = yield from self._string(key, MAX_STRING_BYTES)
            return tuple(strings)
        return (yield from self._unpack(f"<{count}{SCALAR_FORMATS[kind]}"))

    def _tensor(self) -> _Steps[Tensor]:
        name = yield from self._string("a tensor name", MAX_NAME_BYTES)
        rank = yield from self._integer("<I")
        if rank > MAX_DIMENSIONS:
            raise GGUFError(f"tensor {_shown(name)} has {rank:,} dimensions, at most {MAX_DIMENSIONS} are possible")
        fields = yield from self._unpack(f"<{rank}qIQ")
        *dimensions, kind, offset = map(int, fields)
        tensor = Tensor(name, tuple(dimensions), kind, offset)
        _check_tensor(tensor)
        return tensor

    def _parse(self) -> _Steps[Header]:
        if (yield from self._bytes(4)) != MAGIC:
            raise GGUFError("not a GGUF file")
        version = yield from self._integer("<I")
        if version & 0xFFFF == 0 and version:
            raise GGUFError("big-endian GGUF is not supported")
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version} is not supported, only 2 and 3 are")
        tensor_count = yield from self._integer("<Q")
        key_count = yield from self._integer("<Q")
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise GGUFError(f"{tensor_count:,} tensors and {key_count:,} keys are implausible")
        kv: dict[str, Value] = {}
        for _ in range(key_count):
            key = yield from self._string("a key", MAX_NAME_BYTES)
            if not key or key in kv:
                raise GGUFError(f"key {_shown(key)} comes twice" if key else "a key is empty")
            kv[key] = yield from self._value(key)
        alignment = kv.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise GGUFError(f"general.alignment {alignment} is not a power of two")
        tensors: dict[str, Tensor] = {}
        for _ in range(tensor_count):
            tensor = yield from self._tensor()
            if tensor.name in tensors:
                raise GGUFError(f"tensor {_shown(tensor.name)} comes twice")
            tensors[tensor.name] = tensor
        end = self._consumed + self._position
        return Header(version, MappingProxyType(kv), tuple(tensors.values()), end + -end % alignment)


def _shown(name: str) -> str:
    """A name from the file, fit for a one-line message."""
    return name if len(name) <= 64 and name.isprintable() else repr(name[:64])


def _check_tensor(tensor: Tensor) -> None:
    """Raises GGUFError for what llama.cpp refuses: unknown types, rows of broken blocks, sizes past 63 bits."""
    kind = TENSOR_TYPES.get(tensor.type)
    if kind is None:
        raise GGUFError(f"tensor {_shown(tensor.name)} has an unknown type {tensor.type}")
    if any(dimension < 0 for dimension in tensor.dimensions) or tensor.elements > _INT64_MAX:
        raise GGUFError(f"tensor {_shown(tensor.name)} has an implausible shape")
    row = tensor.dimensions[0] if tensor.dimensions else 1
    if row % kind.block:
        raise GGUFError(f"tensor {_shown(tensor.name)} has rows of {row:,} elements, no multiple of {kind.name}'s {kind.block}")
    if tensor.offset + tensor.size_bytes > _INT64_MAX:
        raise GGUFError(f"tensor {_shown(tensor.name)} has an implausible size")
