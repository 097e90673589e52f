"""The pure part of the stores: merge patch and server-side apply."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_api import GPUNode, GPUPool, Resource
from llorch_api.patch import merge_diff
from llorch_store.core.fields import fields_of
from llorch_store.core.merge import merge_patch
from llorch_store.core.ownership import Operation, Owner, Owners, applied, assembled, patched, values_of

SOURCE = {"source": "hf:org/repo"}


# Merge patch


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_answers_as_rfc_7386_appendix_a(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


names = st.sampled_from("abc")
documents = st.recursive(
    st.integers(0, 3) | st.sampled_from(["x", "y"]) | st.lists(st.integers(0, 3), max_size=2),
    lambda children: st.dictionaries(names, children, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(names, documents, max_size=3)


@given(objects, objects)
def test_the_difference_of_two_documents_is_the_patch_between_them(before: dict[str, Any], after: dict[str, Any]) -> None:
    kept = repr(before)

    patch = merge_diff(before, after)

    assert merge_patch(before, patch) == after
    assert (patch == {}) is (before == after)
    assert repr(before) == kept


# Server-side apply

POOL, NODE = fields_of(GPUPool), fields_of(GPUNode)


def _run(steps: list[tuple[str, str, Any]], kind: type[Resource] = GPUPool) -> Any:
    """The document after `steps` of (apply | patch, manager, content of spec)."""
    known = fields_of(kind)
    document: Any = {}
    current: Owners = {}
    for verb, manager, spec in steps:
        if verb == "apply":
            document, current = applied(known, document, {"spec": spec}, manager, current)
        else:
            after = merge_patch(document, {"spec": spec})
            document, current = after, patched(known, document, after, manager, current)
    return document["spec"]


@pytest.mark.parametrize(
    ("steps", "spec"),
    [
        pytest.param(
            [("apply", "me", {"model": SOURCE, "replicas": 2, "slots": 8}), ("apply", "me", {"model": SOURCE, "replicas": 2})],
            {"model": SOURCE, "replicas": 2},
            id="what I leave out goes",
        ),
        pytest.param(
            [
                ("apply", "me", {"model": SOURCE, "slots": 8}),
                ("apply", "you", {"replicas": 3}),
                ("apply", "me", {"model": SOURCE}),
            ],
            {"model": SOURCE, "replicas": 3},
            id="what another manager set stays",
        ),
        pytest.param(
            [("apply", "me", {"replicas": 3}), ("apply", "you", {"replicas": 3}), ("apply", "me", {"slots": 1})],
            {"replicas": 3, "slots": 1},
            id="what two managers agree on outlives one of them",
        ),
        pytest.param(
            [("apply", "me", {"replicas": 3}), ("apply", "you", {"replicas": 4}), ("apply", "me", {})],
            {"replicas": 4},
            id="what was taken from me is not mine to remove",
        ),
        pytest.param(
            [("apply", "me", {"replicas": 3}), ("patch", "scaler", {"replicas": 5}), ("apply", "me", {"slots": 2})],
            {"replicas": 5, "slots": 2},
            id="a patch takes the field over",
        ),
        pytest.param(
            [("apply", "me", {"replicas": 3}), ("patch", "scaler", {"replicas": 5}), ("apply", "me", {"replicas": 1})],
            {"replicas": 1},
            id="an apply that names it takes it back",
        ),
        pytest.param(
            [("apply", "me", {"slots": 3}), ("patch", "me", {"replicas": 5}), ("apply", "me", {"slots": 3})],
            {"slots": 3, "replicas": 5},
            id="my own patch is another owner than my apply",
        ),
        pytest.param(
            [
                ("apply", "me", {"model": {**SOURCE, "aliases": ["a", "b"]}}),
                ("apply", "you", {"model": {"aliases": ["c"]}}),
                ("apply", "me", {"model": {**SOURCE, "aliases": ["b"]}}),
            ],
            {"model": {**SOURCE, "aliases": ["b", "c"]}},
            id="items of a set have their own owners",
        ),
        pytest.param(
            [
                ("apply", "me", {"placement": {"nodeSelector": {"a": "1", "b": "2"}}}),
                ("apply", "me", {"placement": {"nodeSelector": {"b": "2"}}}),
            ],
            {"placement": {"nodeSelector": {"b": "2"}}},
            id="an atomic map is replaced whole",
        ),
        pytest.param(
            [("apply", "me", {"engine": {"args": ["--temp", "0.1"]}}), ("apply", "me", {"engine": {"args": ["--jinja"]}})],
            {"engine": {"args": ["--jinja"]}},
            id="a list is replaced whole",
        ),
    ],
)
def test_apply_removes_what_its_manager_set_and_nothing_else(steps: list[tuple[str, str, Any]], spec: Any) -> None:
    assert _run(steps) == spec


def test_an_object_that_becomes_empty_goes_unless_it_was_set_empty() -> None:
    assert _run(
        [("apply", "me", {"drain": {"deadlineSeconds": 5}, "unschedulable": True}), ("apply", "me", {"unschedulable": True})],
        GPUNode,
    ) == {"unschedulable": True}
    assert _run([("apply", "me", {"drain": {}})], GPUNode) == {"drain": {}}
    assert _run([("apply", "me", {"drain": {}}), ("apply", "me", {"drain": {"deadlineSeconds": 5}})], GPUNode) == {
        "drain": {"deadlineSeconds": 5}
    }


@given(st.permutations(["a", "b", "c"]), st.booleans())
def test_a_document_is_its_values_put_together_again(names: list[str], unschedulable: bool) -> None:
    document = {
        "metadata": {
            "name": "n",
            "labels": dict.fromkeys(names, "x"),
            "ownerReferences": [{"uid": name, "name": "n"} for name in names],
        },
        "spec": {"unschedulable": unschedulable, "drain": {}},
    }
    again = assembled(NODE, values_of(NODE, document))
    assert again == document
    assert list(again["metadata"]["labels"]) == names


def test_ownership_of_what_no_longer_exists_is_forgotten() -> None:
    before = {"spec": {"replicas": 2, "slots": 4}}
    owners: Owners = {Owner("me", Operation.APPLY): frozenset(values_of(POOL, before))}
    after = {"spec": {"slots": 4}}
    assert patched(POOL, before, after, "you", owners) == {Owner("me", Operation.APPLY): frozenset({("spec", "slots")})}
