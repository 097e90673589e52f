"""Writes the CustomResourceDefinitions: `python -m llorch_api.generate [--check] DIRECTORY…`.

With `--check` nothing is written; the exit code is 1 when a file differs from what the models say.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from .gpunode import GPUNode
from .gpupool import GPUPool
from .meta import GROUP, VERSION
from .schema import Schema, structural

HEADER = "# Generated from crds/llorch_api by `make generate`; edit the models, not this file.\n"


def _part(kind: type[GPUNode] | type[GPUPool], name: str, *, defaults: bool) -> Schema:
    field = kind.model_fields[name]
    model = field.annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return {**structural(model, defaults=defaults), "description": field.description}


def definition(kind: type[GPUNode] | type[GPUPool]) -> dict[str, Any]:
    """The CustomResourceDefinition of `kind`."""
    names = kind.CRD
    spec, status = (_part(kind, part, defaults=kind is GPUPool and part == "spec") for part in ("spec", "status"))
    schema: dict[str, Any] = {
        "type": "object",
        "description": " ".join((kind.__doc__ or "").split()),
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
            "kind": {"type": "string", "description": kind.KIND},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    if kind is GPUPool:
        schema["required"] = ["spec"]
    subresources: dict[str, Any] = {"status": {}}
    if "scale" in names:
        subresources["scale"] = names["scale"]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced" if kind.NAMESPACED else "Cluster",
            "names": {
                "kind": kind.KIND,
                "listKind": f"{kind.KIND}List",
                "plural": kind.PLURAL,
                "singular": names["singular"],
                "shortNames": names["shortNames"],
                "categories": ["llorch"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind_, "jsonPath": path, "priority": priority, "description": text}
                        for name, kind_, path, priority, text in names["columns"]
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def render(kind: type[GPUNode] | type[GPUPool]) -> str:
    """The YAML file of `kind`."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
            return True

    return HEADER + yaml.dump(definition(kind), Dumper=Dumper, sort_keys=False, width=130, allow_unicode=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m llorch_api.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("directories", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    stale = False
    kinds: tuple[type[GPUNode] | type[GPUPool], ...] = (GPUNode, GPUPool)
    for directory in options.directories:
        for kind in kinds:
            path, wanted = directory / f"{kind.PLURAL}.yaml", render(kind)
            found = path.read_text() if path.exists() else ""
            if found == wanted:
                continue
            if options.check:
                stale = True
                sys.stderr.writelines(
                    difflib.unified_diff(found.splitlines(True), wanted.splitlines(True), str(path), "generated")
                )
            else:
                directory.mkdir(parents=True, exist_ok=True)
                path.write_text(wanted)
    if stale:
        print("llorch: the CRDs differ from the models; run `make generate`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
