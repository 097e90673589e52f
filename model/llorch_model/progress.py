"""How far a long read or download is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all; in all is 0 while unknown."""
