"""What every test needs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def main_thread_loop() -> Iterator[None]:
    """pytest-asyncio asks for the main thread's loop to put it back later; Python 3.11 then makes one that nobody closes, and the
    warning about it comes after the last test."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()
