"""The tables of `llorch get`: the CRDs' own printer columns, as kubectl shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from llorch_api import GPUNode, GPUPool

_STEP = re.compile(r"""\.(?P<name>\w+)|\[\?\(@\.(?P<key>\w+)=="(?P<value>[^"]*)"\)\]""")


def lookup(document: Any, path: str) -> Any:
    """The value at one of our column paths (`.status.phase`, `.status.conditions[?(@.type=="Ready")].reason`); None if absent."""
    for step in _STEP.finditer(path):
        if step["name"]:
            document = document.get(step["name"]) if isinstance(document, dict) else None
        else:
            items = document if isinstance(document, list) else []
            document = next((item for item in items if item.get(step["key"]) == step["value"]), None)
    return document


def age(timestamp: str, now: datetime) -> str:
    """How long ago, in kubectl's manner: 12s, 5m, 3h, 2d. Not a time: as it is."""
    try:
        seconds = int((now - datetime.fromisoformat(timestamp)).total_seconds())
    except (ValueError, TypeError):
        return timestamp
    seconds = max(0, seconds)
    if seconds < 120:
        return f"{seconds}s"
    if seconds < 7200:
        return f"{seconds // 60}m"
    return f"{seconds // 3600}h" if seconds < 172_800 else f"{seconds // 86_400}d"


def rows(objects: Iterable[GPUNode | GPUPool], *, wide: bool, now: datetime | None = None) -> list[list[str]]:
    """Header and one row per object."""
    now = now or datetime.now(UTC)
    lines: list[list[str]] = []
    for item in objects:
        columns = [column for column in item.CRD["columns"] if wide or column[3] == 0]
        if not lines:
            lines.append(["NAME", *(column[0].upper() for column in columns)])
        document = item.to_json()
        cells = [item.metadata.name]
        for _, kind, path, _, _ in columns:
            value = lookup(document, path)
            cells.append("" if value is None else age(value, now) if kind == "date" else str(value))
        lines.append(cells)
    return lines


def layout(lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces."""
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
