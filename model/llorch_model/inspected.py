"""What an inspection finds: a model's header and identity, without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from llorch_api import ModelShape, ResolvedModel

from .core.errors import BadModel
from .core.gguf import GGUFError, Header
from .core.shape import MIB, shape_of

MAX_RESOLVED_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Inspected:
    """A model that is there and could be loaded. `resolved` is the source after redirects, without signatures."""

    resolved: str
    digest: str
    size_bytes: int
    header: Header
    shape: ModelShape

    @property
    def size_mib(self) -> int:
        """Size of the file, rounded up."""
        return -(-self.size_bytes // MIB)

    def to_resolved(self) -> ResolvedModel:
        """As it goes into a pool's status."""
        return ResolvedModel(resolved=self.resolved, digest=self.digest, size_mib=self.size_mib, shape=self.shape)


def check_complete(where: str, header: Header, size_bytes: int) -> None:
    """Raises BadModel when the file is shorter than its header says."""
    if size_bytes < header.required_size:
        raise BadModel(f"{where}: truncated, it has {size_bytes:,} bytes and its header tells of {header.required_size:,}")


def usable_shape(where: str, header: Header) -> ModelShape:
    """The shape; raises BadModel for GGUF files that are not a whole model."""
    try:
        return shape_of(header)
    except GGUFError as error:
        raise BadModel(f"{where}: {error}") from error
