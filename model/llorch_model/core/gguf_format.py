"""What a GGUF header is made of: value types, tensor types, tensors. Format: ggml's docs/gguf.md, ggml.h and ggml-common.h."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32


class GGUFError(Exception):
    """The bytes are not the header of a GGUF that llama.cpp would load. One line, without the file's name."""


class ValueType(IntEnum):
    """Types of values in the header."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS: Mapping[ValueType, str] = MappingProxyType(
    {
        ValueType.UINT8: "B",
        ValueType.INT8: "b",
        ValueType.UINT16: "H",
        ValueType.INT16: "h",
        ValueType.UINT32: "I",
        ValueType.INT32: "i",
        ValueType.FLOAT32: "f",
        ValueType.BOOL: "?",
        ValueType.UINT64: "Q",
        ValueType.INT64: "q",
        ValueType.FLOAT64: "d",
    }
)
"""Format characters of `struct`."""


class TensorType(NamedTuple):
    """How a type stores its elements: `block` elements in `size` bytes."""

    name: str
    block: int
    size: int


TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        0: TensorType("F32", 1, 4),
        1: TensorType("F16", 1, 2),
        2: TensorType("Q4_0", 32, 18),
        3: TensorType("Q4_1", 32, 20),
        6: TensorType("Q5_0", 32, 22),
        7: TensorType("Q5_1", 32, 24),
        8: TensorType("Q8_0", 32, 34),
        9: TensorType("Q8_1", 32, 36),
        10: TensorType("Q2_K", 256, 84),
        11: TensorType("Q3_K", 256, 110),
        12: TensorType("Q4_K", 256, 144),
        13: TensorType("Q5_K", 256, 176),
        14: TensorType("Q6_K", 256, 210),
        15: TensorType("Q8_K", 256, 292),
        16: TensorType("IQ2_XXS", 256, 66),
        17: TensorType("IQ2_XS", 256, 74),
        18: TensorType("IQ3_XXS", 256, 98),
        19: TensorType("IQ1_S", 256, 50),
        20: TensorType("IQ4_NL", 32, 18),
        21: TensorType("IQ3_S", 256, 110),
        22: TensorType("IQ2_S", 256, 82),
        23: TensorType("IQ4_XS", 256, 136),
        24: TensorType("I8", 1, 1),
        25: TensorType("I16", 1, 2),
        26: TensorType("I32", 1, 4),
        27: TensorType("I64", 1, 8),
        28: TensorType("F64", 1, 8),
        29: TensorType("IQ1_M", 256, 56),
        30: TensorType("BF16", 1, 2),
        34: TensorType("TQ1_0", 256, 54),
        35: TensorType("TQ2_0", 256, 66),
        39: TensorType("MXFP4", 32, 17),
        40: TensorType("NVFP4", 64, 36),
        41: TensorType("Q1_0", 128, 18),
        42: TensorType("Q2_0", 64, 18),
    }
)
"""By ggml type id (ggml.h, ggml-common.h)."""


@dataclass(frozen=True, slots=True)
class LongArray:
    """What is kept of an array too long to keep."""

    type: ValueType
    length: int


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | LongArray


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. `dimensions` in ggml order (row length first), `offset` in bytes from the start of the tensor data."""

    name: str
    dimensions: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for dimension in self.dimensions:
            count *= dimension
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes of its data, without padding."""
        kind = TENSOR_TYPES[self.type]
        return self.elements // kind.block * kind.size


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. `data_offset` is where the tensor data starts, in bytes from the start of the file."""

    version: int
    kv: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int

    @property
    def required_size(self) -> int:
        """The least number of bytes the file must have: a shorter one is truncated and no engine will load it."""
        return self.data_offset + max((tensor.offset + tensor.size_bytes for tensor in self.tensors), default=0)

    @property
    def architecture(self) -> str:
        """general.architecture, or empty."""
        return self.text("general.architecture")

    def text(self, key: str, default: str = "") -> str:
        """The string under `key`. Raises GGUFError when it is something else."""
        value = self.kv.get(key, default)
        if not isinstance(value, str):
            raise GGUFError(f"{key} is not a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """The non-negative integer under `key`. Raises GGUFError when it is something else, or missing without a default."""
        value = self.kv.get(key, default)
        if value is None:
            raise GGUFError(f"key {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise GGUFError(f"{key} is not a non-negative integer")
        return value
