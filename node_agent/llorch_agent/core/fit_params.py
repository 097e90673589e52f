"""What llama-fit-params is asked and what it answers. It allocates as llama-server would, without any memory, and prints it."""

from __future__ import annotations

from collections.abc import Sequence

from llorch_api.engine_args import flag_of

from .engine_args import ALL_LAYERS, CACHE_TYPE_ARGS

HOST = "Host"
KEPT = frozenset(
    {
        *CACHE_TYPE_ARGS,
        *("-ub", "--ubatch-size", "-b", "--batch-size", "-fa", "--flash-attn", "--swa-full", "--kv-unified", "--embeddings"),
    }
)
"""Arguments of llama-server that change the memory of its model; the others may be unknown to the tool."""


def arguments(model_path: str, *, slots: int, context_tokens: int, engine_args: Sequence[str]) -> list[str]:
    """The command line, without the program itself. `--no-repack`: on a CPU repacked weights are left out of the sum."""
    return [
        *("-m", model_path),
        *("-c", str(slots * context_tokens)),
        *("-np", str(slots)),
        *("-ngl", str(ALL_LAYERS)),
        *("--fit", "off"),
        *("--fit-print", "on"),
        "--no-repack",
        *_kept(engine_args),
    ]


def total_mib(output: str) -> int | None:
    """MiB over all devices, or None where the output is not what is known of the tool.

    Each line is `DEVICE model context compute`. Where there is a GPU the host's line is not device memory; where there is none
    it holds everything, the input embeddings too, which is more than a GPU would take.
    """
    devices: dict[str, int] = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 4 and all(word.isdigit() for word in words[1:]):
            devices[words[0]] = devices.get(words[0], 0) + sum(map(int, words[1:]))
    gpus = {name: mib for name, mib in devices.items() if name != HOST}
    return sum((gpus or devices).values()) or None


def _kept(engine_args: Sequence[str]) -> list[str]:
    """The arguments that matter, with their values."""
    kept: list[str] = []
    keeping = False
    for argument in engine_args:
        flag = flag_of(argument)
        if flag is not None:
            keeping = flag in KEPT
        if keeping:
            kept.append(argument)
    return kept
