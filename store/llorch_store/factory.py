"""Opens a store by what `LLORCH_STORE` says."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from .contract import Store, StoreError

ALLOWED = "must be kubernetes, sqlite:PATH or memory:"


def open_store(spec: str) -> AbstractAsyncContextManager[Store]:
    """The store that `spec` names: `kubernetes`, `sqlite:PATH`, or `memory:` (a new, empty one).

    Raises StoreError for any other spec, and on entering where the store cannot be opened. What a store is made of is
    imported only when that store is asked for.
    """
    scheme, _, rest = spec.partition(":")
    match scheme, rest:
        case "kubernetes", "":
            try:
                from .kubernetes import KubernetesStore
            except ModuleNotFoundError as error:
                raise StoreError(f"store 'kubernetes' needs the package {error.name}: install llorch[kubernetes]") from None
            return KubernetesStore()
        case "sqlite", path if path:
            try:
                from .sqlite import SQLiteStore
            except ModuleNotFoundError as error:
                raise StoreError(f"store 'sqlite' needs the package {error.name}: install llorch[sqlite]") from None
            return SQLiteStore(path)
        case "memory", "":
            from .memory import MemoryStore

            return MemoryStore()
        case _:
            raise StoreError(f"store {spec!r} — {ALLOWED}")
