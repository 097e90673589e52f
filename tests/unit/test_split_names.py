"""Split models are told by their names, and their parts must fit together."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from llorch_model.core.gguf import GGUFError, Header, Tensor
from llorch_model.core.identity import stored_name, stored_names
from llorch_model.core.source import parse_source
from llorch_model.core.split import joined, part_name, part_paths, split_digest


def part(number: int, parts: int, tensors: int = 1, total: int | None = None) -> Header:
    kv = {"split.no": number, "split.count": parts, "split.tensors.count": total or parts, "x": number}
    return Header(3, MappingProxyType(kv), tuple(Tensor(f"t{number}.{n}", (32,), 0, 0) for n in range(tensors)), 128)


def test_the_first_part_names_all_others() -> None:
    assert part_paths("/m/q-00001-of-00003.gguf") == tuple(f"/m/q-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    assert part_paths("/m/q.gguf") == ("/m/q.gguf",)


@pytest.mark.parametrize("name", ["q-00001-of-00001.gguf", "q-00000-of-00003.gguf", "q-00004-of-00003.gguf", "q-1-of-3.gguf"])
def test_other_names_are_whole_models(name: str) -> None:
    assert part_name(name) is None


def test_another_part_than_the_first_is_refused_with_the_name_of_the_first() -> None:
    with pytest.raises(GGUFError, match=r"part 2 of 3: name the first, q-00001-of-00003\.gguf"):
        part_paths("dir/q-00002-of-00003.gguf")


def test_joined_parts_have_the_keys_of_the_first_and_the_tensors_of_all() -> None:
    header = joined([part(0, 2), part(1, 2)])

    assert dict(header.kv) == {"x": 0}
    assert [tensor.name for tensor in header.tensors] == ["t0.0", "t1.0"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part(0, 3)], "NAME-00001-of-00003.gguf is needed"),
        ([part(0, 3), part(1, 3)], "tells of 3 parts and its name of 2"),
        ([part(0, 2), part(0, 2)], "part 2 of 2 says it is part 1 of 2"),
        ([part(0, 2), part(1, 2, tensors=2)], "hold 3 tensors and its header tells of 2"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts: list[Header], message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        joined(parts)


def test_stored_parts_keep_the_names_by_which_an_engine_finds_them() -> None:
    source = parse_source("hf:org/repo/q4/big-00001-of-00002.gguf@abc")
    names = stored_names(source, "split:1234+5", 2)

    assert part_paths(names[0]) == names
    assert names[0].startswith("big.split-")
    assert stored_names(source, "etag:x", 1) == (stored_name(source, "etag:x"),)


def test_the_digest_changes_with_any_part() -> None:
    assert split_digest(["etag:a"], 5) == "etag:a"
    found = {split_digest(parts, 5) for parts in (["a", "b"], ["b", "a"], ["a", "c"])}
    assert len(found) == 3
    assert all(len(each) <= 80 and each.startswith("split:") for each in found)
