"""Whether an engine that answers may be given requests."""

from __future__ import annotations

import pytest

from llorch_agent.core.adoption import Answer, Health, Unusable, Usable, judge
from llorch_agent.core.handoff import Adopt

ENGINE = Adopt(pool="p", replica="r0", url="http://127.0.0.1:1")


def adopt(slots: int | None = None, pid: int = 0, model: str = "") -> Adopt:
    return Adopt(pool="p", replica="r0", url="http://127.0.0.1:1", slots=slots, pid=pid, model_path=model)


@pytest.mark.parametrize(
    ("said", "own", "slots"),
    [(4, 4, 4), (4, None, 4), (None, 8, 8), (8, 4, 4), (2, 4, 2), (None, None, 1)],
)
def test_the_smaller_count_of_slots_holds(said: int | None, own: int | None, slots: int) -> None:
    assert judge(adopt(slots=said), Answer(Health.UP, total_slots=own), pid_alive=False) == Usable(slots)


@pytest.mark.parametrize(
    ("answer", "at_once"),
    [
        (Answer(Health.LOADING), True),
        (Answer(Health.DOWN, "connection refused"), True),
        (Answer(Health.SILENT, "nothing within 3 s"), False),
    ],
)
def test_a_refused_connection_counts_at_once_and_a_slow_answer_only_the_second_time(answer: Answer, at_once: bool) -> None:
    verdict = judge(ENGINE, answer, pid_alive=False)

    assert isinstance(verdict, Unusable)
    assert verdict.at_once is at_once
    assert verdict.reason.startswith(ENGINE.url)


def test_a_port_that_went_to_another_engine_after_its_owner_died_is_not_trusted() -> None:
    another = Answer(Health.UP, total_slots=1, model_path="/m/b.gguf")

    assert isinstance(judge(adopt(pid=7, model="/m/a.gguf"), another, pid_alive=False), Unusable)
    assert isinstance(judge(adopt(pid=7, model="/m/a.gguf"), another, pid_alive=True), Usable)
    assert isinstance(judge(adopt(pid=7, model="/else/b.gguf"), another, pid_alive=False), Usable)


def test_an_engine_of_the_agent_s_own_is_not_adopted_a_second_time() -> None:
    verdict = judge(ENGINE, Answer(Health.UP, total_slots=4), pid_alive=True, taken_by="chat-1")

    assert verdict == Unusable("http://127.0.0.1:1 is now the engine of chat-1", at_once=True)
