"""The demo model: the same bytes everywhere, complete, and of a known shape."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llorch_model.core.gguf import HeaderParser
from llorch_model.core.shape import shape_of
from llorch_model.tiny import write_mid, write_tiny


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "a.gguf").read_bytes()

    assert write_tiny(tmp_path / "b.gguf").read_bytes() == first
    assert write_tiny(tmp_path / "c.gguf", seed=2).read_bytes() != first
    assert hashlib.sha256(first).hexdigest() == "b5757d5b3e8852bc4204ac51e7d1e290ca6ef657339670dcd0a18e64cb15fea8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf"], "nothing half-written is left"


@pytest.mark.parametrize(("write", "layers", "elements"), [(write_tiny, 2, 64), (write_mid, 8, 1024)])
def test_the_file_is_complete_and_of_its_shape(tmp_path: Path, write, layers: int, elements: int) -> None:
    data = write(tmp_path / "models" / "m.gguf").read_bytes()
    parser = HeaderParser()
    header = parser.feed(data)

    assert header is not None
    assert header.required_size == len(data)
    shape = shape_of(header)
    assert (shape.layers, shape.kv_key_elements, shape.vocab_size, shape.caveat) == (layers, elements, 416, "")


def test_sizes_that_no_block_holds_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        write_tiny(tmp_path / "m.gguf", embd=100)

    assert not list(tmp_path.iterdir())
