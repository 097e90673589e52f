"""The memory estimate beside llama.cpp's own word, over real shapes and settings: `python tests/bench/estimator.py [TOOL]`.

TOOL is llama-fit-params; without it, the one beside llama-server (LLORCH_ENGINE, PATH) or in ~/.cache/llorch/engine. The models
are sparse files with the headers of published ones: no weights, no download. Without a GPU the tool counts the input embeddings
too, so they are added to the estimate, but for tied ones: only a GPU has a second copy of those. Exit code 1 when an estimate is
below the tool's figure, which would be an engine out of memory; estimates too far above it are counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from fixtures.sparse_gguf import PRESETS, header_of, write_sparse
from llorch_agent.core.fit_params import HOST, arguments
from llorch_agent.fit_params import find_tool
from llorch_model.core.gguf import HeaderParser
from llorch_model.core.shape import shape_of
from llorch_model.core.vram import estimate, host_need, memory_settings

MOST = 5.0
"""Per cent that the whole should be above the tool's figure at most."""


class Setting(NamedTuple):
    """A row of the table."""

    name: str
    slots: int
    context_tokens: int
    args: tuple[str, ...] = ()


SETTINGS = (
    Setting("4x4096 f16", 4, 4096),
    Setting("1x32768 f16", 1, 32_768),
    Setting("16x2048 q8_0", 16, 2048, ("--cache-type-k", "q8_0", "--cache-type-v", "q8_0")),
    Setting("4x8192 q4_0", 4, 8192, ("--cache-type-k", "q4_0", "--cache-type-v", "q4_0")),
    Setting("2x4096 ub1024", 2, 4096, ("--batch-size", "2048", "--ubatch-size", "1024")),
)


class Memory(NamedTuple):
    """MiB: weights, KV cache, compute buffers."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return sum(self)


def told(tool: Path, model: Path, setting: Setting) -> tuple[Memory, bool]:
    """The tool's figures, and whether they are a GPU's."""
    words = arguments(str(model), slots=setting.slots, context_tokens=setting.context_tokens, engine_args=setting.args)
    output = subprocess.run([tool, *words], capture_output=True, text=True, check=True, timeout=60).stdout
    rows = [line.split() for line in output.splitlines()]
    sizes = {row[0]: Memory(*map(int, row[1:])) for row in rows if len(row) == 4 and all(word.isdigit() for word in row[1:])}
    gpus = [memory for device, memory in sizes.items() if device != HOST]
    if len(gpus) > 1:
        raise SystemExit("llorch: run it with one GPU: CUDA_VISIBLE_DEVICES=0")
    return (gpus[0], True) if gpus else (sizes[HOST], False)


def estimated(name: str, setting: Setting, *, gpu: bool) -> Memory:
    """Ours, without the margin for what no header tells."""
    parser = HeaderParser()
    parser.feed(header_of(name, tokens=True)[0])
    settings = memory_settings(setting.args)
    need = (estimate if gpu or PRESETS[name].tied else host_need)(
        shape_of(parser.close()),
        slots=setting.slots,
        context_tokens=setting.context_tokens,
        kv_cache_type=settings.kv_cache_type,
        ubatch=settings.ubatch,
        margin_mib=0,
    )
    return Memory(need.weights_mib, need.kv_mib, need.compute_mib)


def find(words: list[str]) -> Path:
    """The tool."""
    if words:
        return Path(words[0])
    built = sorted((Path.home() / ".cache" / "llorch" / "engine").glob("*/llama-fit-params"))
    found = find_tool() or (built[-1] if built else None)
    if found is None:
        raise SystemExit("llorch: no llama-fit-params: node_agent/build-engine.sh builds it, or name one")
    return found


def main() -> int:
    """Prints the table."""
    tool = find(sys.argv[1:])
    errors: list[float] = []
    print("MiB as llama.cpp/llorch")
    print(f"{'model':14} {'setting':14} {'weights':>15} {'KV':>13} {'compute':>11} {'total':>15} {'error':>7}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in PRESETS:
            model = write_sparse(name, Path(scratch) / f"{name}.gguf", tokens=True)
            for setting in SETTINGS:
                theirs, gpu = told(tool, model, setting)
                ours = estimated(name, setting, gpu=gpu)
                error = 100 * (ours.total - theirs.total) / theirs.total
                errors.append(error)
                parts = [f"{a}/{b}" for a, b in zip((*theirs, theirs.total), (*ours, ours.total), strict=True)]
                print(f"{name:14} {setting.name:14} {parts[0]:>15} {parts[1]:>13} {parts[2]:>11} {parts[3]:>15} {error:>+6.1f}%")
    print(f"{len(errors)} settings on {'a GPU' if gpu else 'the CPU'}: error {min(errors):+.1f} to {max(errors):+.1f} %")
    print(f"{sum(error > MOST for error in errors)} above {MOST:g} %, {sum(error < 0 for error in errors)} below 0")
    return 0 if min(errors) >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
