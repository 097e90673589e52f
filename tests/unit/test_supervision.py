"""When an engine that ended is started again."""

from __future__ import annotations

import pytest

from llorch_agent.core.endings import Ending, EndKind
from llorch_agent.core.supervision import LIMITS, GiveUp, Record, Restart, after_end

CRASH = Ending(EndKind.EXITED, "exited with code 1")


def end(
    record: Record, ending: Ending = CRASH, ready_for: float | None = None, spread: float = 0.0
) -> tuple[Record, Restart | GiveUp]:
    now = 1000.0
    return after_end(record, ending, None if ready_for is None else now - ready_for, now, spread)


def test_the_wait_doubles_with_every_failure_in_a_row_until_the_fifth_is_the_last() -> None:
    record, delays = Record(), []
    while True:
        record, decision = end(record)
        if isinstance(decision, GiveUp):
            break
        delays.append(decision.delay_s)

    assert delays == [1, 2, 4, 8]
    assert record.failures == LIMITS.breaker
    assert decision.message == "failed 5 times in a row: exited with code 1"


def test_the_wait_never_exceeds_a_minute() -> None:
    limits = type(LIMITS)(breaker=100)
    _, decision = after_end(Record(failures=50), CRASH, None, 0, 0.0, limits)

    assert isinstance(decision, Restart)
    assert decision.delay_s == 60


@pytest.mark.parametrize(("spread", "delay"), [(-1, 0.9), (0, 1.0), (1, 1.1)])
def test_the_wait_varies_by_a_tenth(spread: float, delay: float) -> None:
    _, decision = end(Record(), spread=spread)

    assert isinstance(decision, Restart)
    assert decision.delay_s == pytest.approx(delay)


@pytest.mark.parametrize("kind", [EndKind.CUDA, EndKind.OUT_OF_MEMORY])
def test_after_trouble_with_the_device_the_wait_is_twice_as_long(kind: EndKind) -> None:
    _, decision = end(Record(failures=1), Ending(kind, "x"))

    assert isinstance(decision, Restart)
    assert decision.delay_s == 4


def test_five_minutes_of_service_clear_the_record() -> None:
    record, decision = end(Record(failures=4, restarts=9), ready_for=300)

    assert record == Record(failures=1, restarts=10)
    assert isinstance(decision, Restart)


def test_shorter_service_does_not() -> None:
    _, decision = end(Record(failures=4), ready_for=299)

    assert isinstance(decision, GiveUp)


def test_an_engine_that_somebody_ended_on_purpose_comes_back_without_a_mark() -> None:
    clean = Ending(EndKind.CLEAN, "ended by itself with exit code 0")

    record, decision = end(Record(failures=2), clean, ready_for=61)
    assert (record.failures, isinstance(decision, Restart)) == (2, True)
    record, _ = end(Record(failures=2), clean, ready_for=None)
    assert record.failures == 3, "exit code 0 before it was ever ready is a failure like any other"


@pytest.mark.parametrize("kind", [EndKind.BAD_MODEL, EndKind.BAD_ARGUMENT])
def test_what_would_end_the_same_way_again_is_not_tried_again(kind: EndKind) -> None:
    _, decision = end(Record(), Ending(kind, "cannot be loaded"))

    assert decision == GiveUp("cannot be loaded")
