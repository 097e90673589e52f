"""The CRDs are what the models say, in the form that an API server takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from llorch_api import GPUNode, GPUPool
from llorch_api.engine_args import refused_arguments
from llorch_api.generate import definition, main
from llorch_api.patch import merge_diff
from llorch_api.schema import SchemaError, structural


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{path}[]")


def schema_of(kind: Any) -> dict[str, Any]:
    whole: dict[str, Any] = definition(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return whole


@pytest.mark.parametrize("kind", [GPUNode, GPUPool])
def test_every_field_is_documented_and_every_collection_bounded(kind: Any) -> None:
    for part in ("spec", "status"):
        for path, node in walk(schema_of(kind)["properties"][part], part):
            assert node["type"] in ("object", "array", "string", "integer", "boolean"), path
            if not path.endswith("[]"):
                assert node["description"], path
            if node["type"] == "array":
                assert "maxItems" in node, path
            if node["type"] == "object" and "properties" not in node:
                assert "maxProperties" in node, path
            if node["type"] == "string":
                assert {"maxLength", "enum", "format"} & node.keys(), path


@pytest.mark.parametrize("kind", [GPUNode, GPUPool])
def test_nothing_of_pydantics_own_is_left(kind: Any) -> None:
    text = repr(definition(kind))
    for word in ("$ref", "anyOf", "allOf", "'title'", "'const'", "'null'", "None"):
        assert word not in text


def test_the_status_carries_no_defaults_that_would_swell_every_object() -> None:
    for kind in (GPUNode, GPUPool):
        assert not [path for path, node in walk(schema_of(kind)["properties"]["status"]) if "default" in node]


def test_users_see_the_defaults_of_a_pool() -> None:
    spec = schema_of(GPUPool)["properties"]["spec"]["properties"]
    assert (spec["replicas"]["default"], spec["slots"]["default"], spec["contextTokens"]["default"]) == (1, 4, 4096)


def test_an_undocumented_or_unbounded_field_cannot_be_generated() -> None:
    class Bare(BaseModel):
        x: int

    class Unbounded(BaseModel):
        x: dict[str, str] = Field(description="d")

    with pytest.raises(SchemaError, match=r"Bare\.x: every field is documented"):
        structural(Bare, defaults=True)
    with pytest.raises(SchemaError, match=r"Unbounded\.x: a map needs max_length"):
        structural(Unbounded, defaults=True)


def test_one_literal_becomes_an_enumeration() -> None:
    class One(BaseModel):
        x: Literal["a"] = Field("a", description="d")

    assert structural(One, defaults=False)["properties"]["x"]["enum"] == ["a"]


def test_a_stale_file_is_reported_and_not_written(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert main(["--check", str(tmp_path)]) == 0
    (tmp_path / "gpupools.yaml").write_text("old\n")
    assert main(["--check", str(tmp_path)]) == 1
    assert (tmp_path / "gpupools.yaml").read_text() == "old\n"
    assert "run `make generate`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--temp", "0.7"], []),
        (["--temp=0.7", "--seed", "-1"], []),
        (["--port", "1"], ["--port"]),
        (["--host=0.0.0.0"], ["--host"]),
        (["-m", "x"], ["-m"]),
        (["--log-file", "x", "--api-key", "y"], ["--log-file", "--api-key"]),
    ],
)
def test_only_harmless_engine_arguments_pass(arguments: list[str], refused: list[str]) -> None:
    assert refused_arguments(arguments) == refused


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({}, {}, {}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {}, {"a": None}),
        ({}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": [1, 2]}, {"a": [1]}, {"a": [1]}),
        ({"a": {"b": 1}}, {"a": 3}, {"a": 3}),
    ],
)
def test_a_patch_says_what_differs_and_nulls_what_is_gone(
    old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]
) -> None:
    assert merge_diff(old, new) == patch
