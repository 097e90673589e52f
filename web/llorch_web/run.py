"""Runs a component's main coroutine as a program."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from .settings import StartError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs `main()` on uvloop. A StartError, also out of a TaskGroup, is printed as one line and ends with exit code 2."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except StartError as error:
        _fail([error])
    except BaseExceptionGroup as group:
        known, rest = group.split(StartError)
        if known is None or rest is not None:
            raise
        _fail(_leaves(known))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. A SIGINT after it ends the process at once: a person is waiting.

    Another SIGTERM does not: a pod gets one from its preStop hook and one from the kubelet, and neither is in a hurry.
    """
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask(received: signal.Signals) -> None:
        if event.is_set() and received is signal.SIGINT:
            os._exit(130)
        event.set()

    for each in STOP_SIGNALS:
        loop.add_signal_handler(each, ask, each)
    return event


def _leaves(group: BaseExceptionGroup[StartError]) -> list[StartError]:
    return [leaf for each in group.exceptions for leaf in (_leaves(each) if isinstance(each, BaseExceptionGroup) else [each])]


def _fail(errors: list[StartError]) -> None:
    for error in errors:
        print(f"llorch: {error}", file=sys.stderr)
    raise SystemExit(2)
