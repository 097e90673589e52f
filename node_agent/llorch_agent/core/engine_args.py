"""The command line and the environment of llama-server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llorch_api.engine_args import flag_of, refused_arguments

if TYPE_CHECKING:
    from .handoff import Launch

CACHE_TYPE_ARGS = ("--cache-type-k", "--cache-type-v")
"""Set by the operator out of a pool's kvCacheType, hence not in the pool's own list."""

CPU_DEVICE = "cpu"
"""Devices whose id begins so are the machine's own memory."""

ALL_LAYERS = 999
"""For -ngl: more than any model has. Versions before `-ngl all` take a number only."""

_HIDDEN_PREFIXES = ("LLORCH_", "POOL_MANAGERD_", "ORCHESTRATORD_", "LLAMA_", "AWS_", "KUBERNETES_")
_HIDDEN = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CUDA_VISIBLE_DEVICES", "PYTHONSTARTUP"})

RUN_TOKEN = "LLORCH_RUN_TOKEN"
"""Environment variable by which an engine and all its children are found again."""

_FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][a-zA-Z0-9-]*")


def refused_by_agent(arguments: Sequence[str]) -> list[str]:
    """The flags among `arguments` that nobody may set through a handoff file or an assignment."""
    return [flag for flag in refused_arguments(list(arguments)) if flag not in CACHE_TYPE_ARGS]


def flags_in(help_text: str) -> frozenset[str]:
    """The flags that `llama-server --help` names."""
    return frozenset(_FLAG.findall(help_text))


def on_cpu(launch: Launch) -> bool:
    """True when the engine is to use no GPU."""
    return bool(launch.devices) and all(uuid.startswith(CPU_DEVICE) for uuid, _ in launch.devices)


def command_line(launch: Launch, port: int, supported: frozenset[str], cache_ram_mib: int = 0) -> list[str]:
    """Arguments of llama-server, without the program itself.

    `-c` is the total over all slots. What its defaults would decide by the machine (context, layers, slots, 8 GiB of host
    memory as prompt cache, HTTP threads) is always said. `supported` are the flags this llama-server knows; an empty set
    means that it would not say, and leaves out what only some versions have.
    """
    own = {flag for flag in map(flag_of, launch.engine_args) if flag is not None}
    arguments = [
        *("-m", launch.model_path),
        *("-c", str(launch.slots * launch.context_tokens)),
        *("-np", str(launch.slots)),
        *("-ngl", "0" if on_cpu(launch) else str(ALL_LAYERS)),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--alias", launch.pool),
        "--metrics",
        # Fewer, and a full engine does not answer /health in time.
        *("--threads-http", str(launch.slots + 16)),
    ]
    gpus = [mib for _, mib in launch.gpus]
    if len(gpus) > 1:
        split = launch.tensor_split if len(launch.tensor_split) == len(gpus) else gpus
        arguments += ["--tensor-split", ",".join(str(max(1, mib)) for mib in split)]
    if "--cache-ram" in supported and "--cache-ram" not in own:
        arguments += ["--cache-ram", str(cache_ram_mib)]
    if "--fit" in supported:
        arguments += ["--fit", "off"]
    for flag in ("--no-ui", "--no-webui"):
        if flag in supported:
            arguments.append(flag)
            break
    return [*arguments, *launch.engine_args]


def environment(inherited: Mapping[str, str], launch: Launch, token: str) -> dict[str, str]:
    """The engine's environment: the agent's, without its secrets and without variables that would change the command line."""
    result = {name: value for name, value in inherited.items() if name not in _HIDDEN and not name.startswith(_HIDDEN_PREFIXES)}
    if launch.devices:
        result["CUDA_VISIBLE_DEVICES"] = ",".join(uuid for uuid, _ in launch.devices if not uuid.startswith(CPU_DEVICE))
    elif launch.device_mask:
        result["CUDA_VISIBLE_DEVICES"] = launch.device_mask
    elif "CUDA_VISIBLE_DEVICES" in inherited:
        result["CUDA_VISIBLE_DEVICES"] = inherited["CUDA_VISIBLE_DEVICES"]
    # CUDA orders by speed by default, NVML by bus: indexes in a mask mean the latter.
    result["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    result[RUN_TOKEN] = token
    return result
