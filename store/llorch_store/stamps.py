"""The uid and the time of a write to a local store."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from .core.records import Stamp


def stamp(version: int) -> Stamp:
    """A stamp for the write that makes `version`."""
    return Stamp(version, str(uuid.uuid4()), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
