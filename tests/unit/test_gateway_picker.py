"""Which replica a request goes to, and which agents are taken for dead."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from llorch_gateway.core.health import SILENCE_SECONDS, AgentHealth
from llorch_gateway.core.picker import Candidate, SlotReport, candidate, in_order
from llorch_gateway.core.pools import EndpointView


def endpoint(name: str, slots: int = 4) -> EndpointView:
    return EndpointView(name, name, "node", "http://a", f"http://a/replicas/{name}", slots)


def names(found: list[Candidate]) -> list[str]:
    return [each.endpoint.replica for each in found]


def test_the_replica_with_the_most_free_slots_comes_first_and_ejected_ones_last() -> None:
    candidates = [
        Candidate(endpoint("one"), 1, ejected=False),
        Candidate(endpoint("dead"), 9, ejected=True),
        Candidate(endpoint("three"), 3, ejected=False),
        Candidate(endpoint("full"), -2, ejected=False),
    ]
    assert names(in_order(candidates, random.Random(1).random)) == ["three", "one", "full", "dead"]


def test_ties_are_spread_and_repeatable() -> None:
    candidates = [Candidate(endpoint(name), 2, ejected=False) for name in "abcd"]
    rng, again = random.Random(7), random.Random(7)
    first = [names(in_order(candidates, rng.random))[0] for _ in range(200)]
    assert first == [names(in_order(candidates, again.random))[0] for _ in range(200)]
    assert all(first.count(name) > 25 for name in "abcd")


@given(st.permutations(range(5)))
def test_the_order_of_the_endpoints_does_not_matter(order: list[int]) -> None:
    candidates = [Candidate(endpoint(str(number)), number, ejected=number == 4) for number in range(5)]
    assert names(in_order([candidates[number] for number in order], lambda: 0.0)) == ["3", "2", "1", "0", "4"]


def seen(report: SlotReport | None, own: int = 0, unreported: int = 0, ejected: bool = False, kept: bool = False) -> int | None:
    found = candidate(endpoint("a"), report, own=own, unreported=unreported, ejected=ejected, kept=kept)
    return None if found is None else found.free


def test_free_slots_are_what_the_agent_says_less_what_was_sent_since() -> None:
    assert seen(SlotReport(3, 4, ready=True), own=1) == 3
    assert seen(SlotReport(3, 4, ready=True), own=3, unreported=2) == 1
    assert seen(SlotReport(4, 4, ready=True), own=3) == 1, "what this gateway has in flight there is not free"


def test_a_replica_whose_agent_says_it_is_not_ready_gets_nothing() -> None:
    assert seen(SlotReport(4, 4, ready=False)) is None


def test_before_its_first_message_an_agent_is_believed_to_be_as_published() -> None:
    assert seen(None, own=1) == 3


def test_last_known_replicas_need_a_living_agent_that_vouches_for_them() -> None:
    assert seen(None, kept=True) is None
    assert seen(SlotReport(1, 4, ready=True), kept=True) == 1
    assert seen(SlotReport(1, 4, ready=True), kept=True, ejected=True) is None


def test_a_silent_agent_is_ejected_once_and_back_with_its_next_message() -> None:
    health = AgentHealth(100.0)
    assert not health.look(100.0 + SILENCE_SECONDS)
    assert health.look(100.1 + SILENCE_SECONDS)
    assert health.ejected
    assert not health.look(103.0), "it is out already"
    assert health.ejected_for(104.1 + SILENCE_SECONDS) == 4.0
    assert health.heard(105.0)
    assert not health.ejected
    assert not health.heard(105.5)
    assert health.ejected_for(106.0) == 0.0


def test_an_agent_that_refuses_connections_is_ejected_at_once() -> None:
    health = AgentHealth(0.0)
    assert health.failed(0.1)
    assert not health.failed(0.2)
    assert health.ejected
    assert health.heard(0.3)


def test_the_gateways_own_absence_is_nobodys_silence() -> None:
    health = AgentHealth(0.0)
    health.excuse(5.0)
    assert not health.look(5.5)
    assert health.look(6.2)
