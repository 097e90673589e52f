"""The API server's rules for names, labels and annotations, so that a manifest that works at home works in a cluster too."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llorch_api import ObjectMeta

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_ANNOTATIONS_LIMIT = 256 * 1024
"""Bytes of all annotations of an object, keys included."""


def metadata_faults(metadata: ObjectMeta, *, namespaced: bool) -> Iterator[str]:
    """What the API server would refuse in `metadata`, one line each."""
    if fault := name_fault(metadata.name):
        yield f"metadata.name: {fault}"
    if namespaced and not (_LABEL.fullmatch(metadata.namespace) and len(metadata.namespace) <= 63):
        yield f"metadata.namespace: {metadata.namespace!r} — must be lowercase letters, digits and '-', 1 to 63"
    for key, value in metadata.labels.items():
        if not _qualified(key):
            yield f"metadata.labels: {key!r} — must be [PREFIX/]NAME of letters, digits, '-', '_' and '.', NAME at most 63"
        if value and not (_QUALIFIED.fullmatch(value) and len(value) <= 63):
            yield f"metadata.labels.{key}: {value!r} — must be letters, digits, '-', '_' and '.', at most 63"
    for key in metadata.annotations:
        if not _qualified(key.lower()):
            yield f"metadata.annotations: {key!r} — must be [PREFIX/]NAME of letters, digits, '-', '_' and '.', NAME at most 63"
    if sum(len(key.encode()) + len(value.encode()) for key, value in metadata.annotations.items()) > _ANNOTATIONS_LIMIT:
        yield f"metadata.annotations: more than {_ANNOTATIONS_LIMIT} bytes in all"


def name_fault(name: str) -> str:
    """Why no object can have this name; empty where one can."""
    if _SUBDOMAIN.fullmatch(name) and len(name) <= 253:
        return ""
    return f"{name!r} — must be lowercase letters, digits, '-' and '.', at most 253"


def _qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if slash and not (_SUBDOMAIN.fullmatch(prefix) and len(prefix) <= 253):
        return False
    return bool(_QUALIFIED.fullmatch(name)) and len(name) <= 63
