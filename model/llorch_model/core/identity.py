"""What makes two files the same model: digests, and the names that files get where models are kept.

A digest is `sha256:…` where somebody stated one. Else it is what identifies the content best: `etag:…` or `url:…` of a web
server, `sample:…` of a local file. All of them fit into the 80 characters that the API gives them.
"""

from __future__ import annotations

import hashlib
import re

from .errors import DigestMismatch
from .source import Source, file_name
from .split import PartName, part_name

MAX_DIGEST_LENGTH = 80
MODEL_SUFFIX = ".gguf"
PARTIAL_SUFFIX = ".partial"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def normal_sha256(sha256: str | None) -> str:
    """64 lower-case hex digits, or empty where none was given. Raises DigestMismatch for anything else."""
    value = (sha256 or "").strip().lower().removeprefix("sha256:")
    if value and not _SHA256.fullmatch(value):
        raise DigestMismatch("the expected sha256 must be 64 hex digits")
    return value


def sha256_digest(sha256: str) -> str:
    """The digest of a file whose sha256 is known."""
    return f"sha256:{sha256}"


def remote_digest(*, url: str, size_bytes: int, etag: str, last_modified: str) -> str:
    """The digest of a file of which a web server told that much; `etag` and `last_modified` may be empty."""
    if etag:
        digest = f"etag:{etag.strip()}+{size_bytes}".replace('"', "")
        if len(digest) <= MAX_DIGEST_LENGTH and digest.isascii() and digest.isprintable():
            return digest
        return f"etag:{_hash(etag)[:40]}+{size_bytes}"
    return f"url:{_hash(url, str(size_bytes), last_modified)[:40]}+{size_bytes}"


def stored_name(source: Source, digest: str) -> str:
    """The file name of that content: readable, and different for different contents of the same source."""
    plain = file_name(source)
    part = part_name(plain)
    stem = part.stem if part is not None else plain.removesuffix(MODEL_SUFFIX)
    kind, _, value = digest.partition(":")
    mark = value if kind == "sha256" else _hash(digest)[:32]
    return f"{stem}.{kind}-{mark}{MODEL_SUFFIX}"


def stored_names(source: Source, digest: str, parts: int) -> tuple[str, ...]:
    """The names of all its files, which tell an engine that they belong together where there are several."""
    name = stored_name(source, digest)
    if parts == 1:
        return (name,)
    first = PartName(name.removesuffix(MODEL_SUFFIX), 1, parts)
    return tuple(first.of(number) for number in range(1, parts + 1))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
