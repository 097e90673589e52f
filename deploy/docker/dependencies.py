"""Prints what `pip install llorch[EXTRA…]` needs besides llorch itself, one requirement per line.

An image installs these before it copies the sources, so that an edit does not install everything again.
    python dependencies.py EXTRA…      reads ./pyproject.toml
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], extras: list[str]) -> Iterator[str]:
    """The base dependencies and those of `extras`; extras of llorch itself (`llorch[web]`) are followed."""
    yield from project["dependencies"]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in project["optional-dependencies"]:
            sys.exit(f"llorch: {extra} — must be one of {', '.join(sorted(project['optional-dependencies']))}")
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[([^]]+)\]", requirement.replace(" ", ""))
            if own:
                waiting.extend(own[1].split(","))
            else:
                yield requirement


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    print("\n".join(sorted(set(requirements(project, sys.argv[1:])))))
