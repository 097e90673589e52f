"""Where GPUNodes and GPUPools live: Kubernetes, SQLite at home, memory in tests; one Protocol."""

from .contract import (
    Conflict,
    Event,
    EventType,
    Forbidden,
    Invalid,
    JsonObject,
    Key,
    Listing,
    NotFound,
    Store,
    StoreError,
    Unavailable,
    key_of,
)

__all__ = [
    "Conflict",
    "Event",
    "EventType",
    "Forbidden",
    "Invalid",
    "JsonObject",
    "Key",
    "Listing",
    "NotFound",
    "Store",
    "StoreError",
    "Unavailable",
    "key_of",
]
