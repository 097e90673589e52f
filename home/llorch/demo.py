"""The pool that `llorch home --demo` serves: a tiny model with random weights, made on the spot, that needs no download."""

from __future__ import annotations

from pathlib import Path

from llorch_api import GPUPool, GPUPoolSpec, ModelSpec, ObjectMeta, PlacementSpec
from llorch_model.tiny import write_tiny

POOL = "tiny"


def demo_model(directory: Path) -> Path:
    """The demo GGUF in `directory`, written if it is not there. Its text is random letters: it shows that everything works."""
    path = directory.expanduser().resolve() / "llorch-tiny.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tiny(path)
    return path


def demo_pool(model: Path) -> GPUPool:
    """One replica with four slots, on a GPU or, without one, on the CPU."""
    return GPUPool(
        metadata=ObjectMeta(name=POOL, namespace="default"),
        spec=GPUPoolSpec(
            model=ModelSpec(source=f"file:{model}"),
            replicas=1,
            slots=4,
            context_tokens=2048,
            placement=PlacementSpec(allow_cpu=True),
        ),
    )
