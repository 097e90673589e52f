"""Models split over several files: `NAME-00001-of-00003.gguf` and so on, as llama-gguf-split writes them.

An engine is given the first file and finds the others beside it by their names, so names are part of the format.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

from .gguf_format import GGUFError, Header

MAX_PARTS = 512
_PART = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class PartName(NamedTuple):
    """What a part's name says. `number` counts from 1, up to `parts`."""

    stem: str
    number: int
    parts: int

    def of(self, number: int) -> str:
        """The name of another part."""
        return f"{self.stem}-{number:05d}-of-{self.parts:05d}.gguf"


def part_name(path: str) -> PartName | None:
    """The path or file name, taken apart; None where it does not name a part of a split model."""
    match = _PART.fullmatch(path)
    if match is None:
        return None
    found = PartName(match["stem"], int(match["index"]), int(match["count"]))
    return found if 1 <= found.number <= found.parts <= MAX_PARTS and found.parts > 1 else None


def part_paths(path: str) -> tuple[str, ...]:
    """The paths of all parts, or just `path` where it names a whole model. Raises GGUFError for a part that is not the first."""
    name = part_name(path)
    if name is None:
        return (path,)
    if name.number != 1:
        raise GGUFError(f"part {name.number} of {name.parts}: name the first, {name.of(1).rpartition('/')[2]}")
    return tuple(name.of(number) for number in range(1, name.parts + 1))


def joined(headers: Sequence[Header]) -> Header:
    """One header for the parts in their order: the keys of the first, the tensors of all. Raises GGUFError where they do not fit.

    Offsets count from the start of each part's data, so `required_size` has a meaning for the parts alone.
    """
    first = headers[0]
    told = max(1, first.integer("split.count", 1))
    if told != len(headers):
        raise GGUFError(
            f"its header tells of {told} parts and its name of {len(headers)}"
            if len(headers) > 1
            else f"the first of {told} parts, without their names: NAME-00001-of-{told:05d}.gguf is needed"
        )
    if told == 1:
        return first
    for index, header in enumerate(headers):
        found = header.integer("split.no", 0), header.integer("split.count", 1)
        if found != (index, told):
            raise GGUFError(f"part {index + 1} of {told} says it is part {found[0] + 1} of {found[1]}")
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    if (total := first.integer("split.tensors.count", len(tensors))) != len(tensors):
        raise GGUFError(f"its parts hold {len(tensors)} tensors and its header tells of {total}")
    keys = {key: value for key, value in first.kv.items() if not key.startswith("split.")}
    return Header(first.version, MappingProxyType(keys), tensors, first.data_offset)


def split_digest(digests: Sequence[str], size_bytes: int) -> str:
    """The digest of parts whose own digests these are; that of a single file is its own."""
    if len(digests) == 1:
        return digests[0]
    return f"split:{hashlib.sha256(chr(10).join(digests).encode()).hexdigest()[:40]}+{size_bytes}"
