"""YAML files of GPUPools and GPUNodes, as kubectl takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llorch_api import GROUP, VERSION, GPUNode, GPUPool, Resource

KINDS: dict[str, type[GPUNode] | type[GPUPool]] = {"GPUNode": GPUNode, "GPUPool": GPUPool}


class ManifestError(Exception):
    """A file that cannot be taken. One line: where, what, and what is allowed."""


def documents(text: str, where: str) -> Iterator[dict[str, Any]]:
    """The objects of a multi-document YAML text, each checked to be one of ours. Lists are opened."""
    try:
        found = list(yaml.safe_load_all(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ManifestError(f"{where}: {place}not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    for document in found:
        if document is None:
            continue
        if isinstance(document, dict) and document.get("kind") == "List":
            for item in document.get("items") or []:
                yield _checked(item, where)
        else:
            yield _checked(document, where)


def _checked(document: Any, where: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: holds {type(document).__name__}, and must hold objects with apiVersion, kind and metadata")
    kind, version = document.get("kind"), document.get("apiVersion")
    if kind not in KINDS:
        raise ManifestError(f"{where}: kind {kind!r} is not one of {', '.join(KINDS)}")
    if version != f"{GROUP}/{VERSION}":
        raise ManifestError(f"{where}: apiVersion {version!r} must be {GROUP}/{VERSION}")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str) or not metadata["name"]:
        raise ManifestError(f"{where}: metadata.name is missing")
    return document


def read(path: str, stdin: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for every object of a file, of each YAML file of a directory, or of `-`."""
    if path == "-":
        for document in documents(stdin or "", "standard input"):
            yield "standard input", document
        return
    source = Path(path)
    files = (
        sorted(file for file in source.iterdir() if file.suffix in (".yaml", ".yml", ".json")) if source.is_dir() else [source]
    )
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ManifestError(f"{file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ManifestError(f"{file}: not UTF-8 text (byte {error.start})") from error
        for document in documents(text, str(file)):
            yield str(file), document


def resource_name(kind: type[Resource]) -> str:
    """`gpupool.llorch.dev`, as kubectl prints it."""
    return f"{kind.KIND.lower()}.{GROUP}"


def kind_of(word: str) -> type[GPUNode] | type[GPUPool] | None:
    """The kind that a user means by gpupools, gpupool, lgp, gpupools.llorch.dev or GPUPool."""
    plain = word.lower().removesuffix(f".{GROUP}")
    for kind in KINDS.values():
        if plain in (kind.PLURAL, kind.CRD["singular"], *kind.CRD["shortNames"]):
            return kind
    return None
