"""What the agent does about the operator's assignments."""

from __future__ import annotations

import pytest

from llorch_agent.core.assignments import Action, Adopt, Drain, Forget, Held, Stage, Start, Stop, decide
from llorch_api import AssignedDevice, AssignedModel, Assignment, Desired


def wanted(desired: Desired = Desired.RUN, revision: str = "r1") -> Assignment:
    return Assignment(
        desired=desired,
        pool="chat",
        namespace="default",
        revision=revision,
        model=AssignedModel(source="file:/m/tiny.gguf"),
        devices={"cpu": AssignedDevice(vram_mib=600)},
        slots=2,
        context_tokens=512,
        drain_deadline_seconds=30,
    )


def held(stage: Stage, revision: str = "r1", uid: str = "u1") -> Held:
    return Held(stage, revision, uid)


RUN, DRAIN, STOP = wanted(), wanted(Desired.DRAIN), wanted(Desired.STOP)

TABLE: list[tuple[str, Assignment | None, Held | None, list[Action]]] = [
    ("a new assignment starts", RUN, None, [Start("a", RUN)]),
    ("one on its way is left alone", RUN, held(Stage.FETCHING), []),
    ("one that runs is left alone", RUN, held(Stage.LAUNCHED), []),
    ("one that failed or ended is not tried again: its id is used up", RUN, held(Stage.OVER), []),
    ("a file deleted by hand is written again", RUN, held(Stage.FILE_GONE), [Start("a", RUN)]),
    ("another revision replaces", wanted(revision="r2"), held(Stage.LAUNCHED), [Forget("a"), Start("a", wanted(revision="r2"))]),
    ("drain drains", DRAIN, held(Stage.LAUNCHED), [Drain("a", 30)]),
    ("drain while draining does nothing", DRAIN, held(Stage.DRAINING), []),
    ("drain before the engine is there stops", DRAIN, held(Stage.FETCHING), [Stop("a", DRAIN)]),
    ("drain of what is unknown reports it stopped", DRAIN, None, [Stop("a", DRAIN)]),
    ("drain of what is over does nothing", DRAIN, held(Stage.OVER), []),
    ("drain ends with the file", DRAIN, held(Stage.FILE_GONE), [Stop("a", DRAIN)]),
    ("stop stops", STOP, held(Stage.LAUNCHED), [Stop("a", STOP)]),
    ("stop beats a drain", STOP, held(Stage.DRAINING), [Stop("a", STOP)]),
    ("stop of what is over does nothing", STOP, held(Stage.OVER), []),
    ("a key that is gone ends it", None, held(Stage.LAUNCHED), [Forget("a")]),
    ("a key that is gone ends the fetch", None, held(Stage.FETCHING), [Forget("a")]),
    ("a key that is gone clears the record", None, held(Stage.OVER), [Forget("a")]),
    ("an engine of an earlier object keeps serving", None, held(Stage.LAUNCHED, uid="u0"), []),
    ("a drain of an earlier object goes on", None, held(Stage.DRAINING, uid="u0"), []),
    ("a fetch of an earlier object serves nobody", None, held(Stage.FETCHING, uid="u0"), [Forget("a")]),
    ("an engine of an earlier object is taken over", RUN, held(Stage.LAUNCHED, uid="u0"), [Adopt("a")]),
    ("an engine of an earlier object can be stopped", STOP, held(Stage.LAUNCHED, uid="u0"), [Stop("a", STOP)]),
]


@pytest.mark.parametrize(("spec", "have", "actions"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_spec_wins(spec: Assignment | None, have: Held | None, actions: list[Action]):
    assert decide("u1", {"a": spec} if spec else {}, {"a": have} if have else {}) == actions


def test_an_empty_spec_on_a_new_object_stops_nothing_that_serves():
    serving = {f"r{n}": held(Stage.LAUNCHED, uid="old") for n in range(5)}
    assert decide("new", {}, serving) == []


def test_replicas_are_handled_in_a_fixed_order():
    names = ["c", "a", "b"]
    assert [action.replica for action in decide("u1", dict.fromkeys(names, RUN), {})] == ["a", "b", "c"]
