"""llama-server out of the xllamacpp wheel: the same C++ server, started with llama-server's arguments.

`python -m llorch_agent.engine_shim -m MODEL --port PORT ...` serves until it is told to stop or its parent dies. It runs as a
process of its own because a crash in C++ takes its process along.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

_PR_SET_PDEATHSIG = 1
_ON_OFF = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class _Option:
    """One flag with a value, and the parameter it sets."""

    names: tuple[str, ...]
    field: str
    """Dotted path below CommonParams."""
    convert: Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class _Switch:
    """One flag without a value."""

    names: tuple[str, ...]
    field: str
    value: Any = True


@dataclass(frozen=True, slots=True)
class _Enum:
    """One flag whose value names a member of an enum of xllamacpp."""

    names: tuple[str, ...]
    field: str
    enum: str
    prefix: str
    synonyms: tuple[tuple[str, str], ...] = ()
    """(value as users write it, member without its prefix)."""


_OPTIONS: tuple[_Option, ...] = (
    _Option(("-m", "--model"), "model.path", str),
    _Option(("-c", "--ctx-size"), "n_ctx", int),
    _Option(("-np", "--parallel"), "n_parallel", int),
    _Option(
        ("-ngl", "--gpu-layers", "--n-gpu-layers"), "n_gpu_layers", lambda text: {"all": -2, "auto": -1}.get(text) or int(text)
    ),
    _Option(("--host",), "hostnames", lambda text: [text]),
    _Option(("--port",), "port", int),
    _Option(("-a", "--alias"), "model_alias", lambda text: {name.strip() for name in text.split(",") if name.strip()}),
    _Option(("--threads-http",), "n_threads_http", int),
    _Option(("-cram", "--cache-ram"), "cache_ram_mib", int),
    _Option(("-fit", "--fit"), "fit_params", lambda text: _ON_OFF[text]),
    _Option(("-b", "--batch-size"), "n_batch", int),
    _Option(("-ub", "--ubatch-size"), "n_ubatch", int),
    _Option(("--cache-reuse",), "n_cache_reuse", int),
    _Option(("--frequency-penalty",), "sampling.penalty_freq", float),
    _Option(("--presence-penalty",), "sampling.penalty_present", float),
    _Option(("--repeat-penalty",), "sampling.penalty_repeat", float),
    _Option(("--min-p",), "sampling.min_p", float),
    _Option(("-n", "--predict", "--n-predict"), "n_predict", int),
    _Option(("--reasoning-budget",), "sampling.reasoning_budget_tokens", int),
    _Option(("--rope-freq-base",), "rope_freq_base", float),
    _Option(("--rope-freq-scale",), "rope_freq_scale", float),
    _Option(("--rope-scale",), "rope_freq_scale", lambda text: 1 / float(text)),
    _Option(("-s", "--seed"), "sampling.seed", lambda text: int(text) & 0xFFFFFFFF),
    _Option(("--temp", "--temperature"), "sampling.temp", float),
    _Option(("-t", "--threads"), "cpuparams.n_threads", int),
    _Option(("-tb", "--threads-batch"), "cpuparams_batch.n_threads", int),
    _Option(("--top-k",), "sampling.top_k", int),
    _Option(("--top-p",), "sampling.top_p", float),
    _Option(("--yarn-attn-factor",), "yarn_attn_factor", float),
    _Option(("--yarn-beta-fast",), "yarn_beta_fast", float),
    _Option(("--yarn-beta-slow",), "yarn_beta_slow", float),
    _Option(("--yarn-ext-factor",), "yarn_ext_factor", float),
    _Option(("--yarn-orig-ctx",), "yarn_orig_ctx", int),
)

_SWITCHES: tuple[_Switch, ...] = (
    _Switch(("--metrics",), "endpoint_metrics"),
    _Switch(("--no-ui", "--no-webui"), "ui", False),
    _Switch(("--cache-prompt",), "cache_prompt"),
    _Switch(("--no-cache-prompt",), "cache_prompt", False),
    _Switch(("--embedding", "--embeddings"), "embedding"),
    _Switch(("--jinja",), "use_jinja"),
    _Switch(("--no-context-shift",), "ctx_shift", False),
    _Switch(("--no-warmup",), "warmup", False),
    _Switch(("--swa-full",), "swa_full"),
)

_ENUMS: tuple[_Enum, ...] = (
    _Enum(("-ctk", "--cache-type-k"), "cache_type_k", "ggml_type", "GGML_TYPE_"),
    _Enum(("-ctv", "--cache-type-v"), "cache_type_v", "ggml_type", "GGML_TYPE_"),
    _Enum(
        ("-fa", "--flash-attn"),
        "flash_attn_type",
        "llama_flash_attn_type",
        "LLAMA_FLASH_ATTN_TYPE_",
        (("on", "ENABLED"), ("off", "DISABLED")),
    ),
    _Enum(("--pooling",), "pooling_type", "llama_pooling_type", "LLAMA_POOLING_TYPE_"),
    _Enum(("--rope-scaling",), "rope_scaling_type", "llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_"),
    _Enum(("-sm", "--split-mode"), "split_mode", "llama_split_mode", "LLAMA_SPLIT_MODE_"),
    _Enum(
        ("--reasoning-format",),
        "reasoning_format",
        "common_reasoning_format",
        "COMMON_REASONING_FORMAT_",
        (("deepseek-legacy", "DEEPSEEK_LEGACY"),),
    ),
)

_TENSOR_SPLIT = ("-ts", "--tensor-split")
_NO_MMAP = "--no-mmap"
_CPU_MOE = ("-cmoe", "--cpu-moe")
_N_CPU_MOE = ("-ncmoe", "--n-cpu-moe")
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""Tensors of a mixture's experts, as llama.cpp names them."""

FLAGS: frozenset[str] = frozenset(
    [name for group in (_OPTIONS, _SWITCHES, _ENUMS) for option in group for name in option.names]
    + [*_TENSOR_SPLIT, _NO_MMAP, *_CPU_MOE, *_N_CPU_MOE]
)
"""What the shim accepts."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        print(f"error: invalid argument: {message}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def parse(arguments: Sequence[str], xllamacpp: Any) -> Any:
    """llama-server's arguments as CommonParams of the module `xllamacpp`."""
    parser = _Parser(prog="engine_shim", add_help=False, allow_abbrev=False)
    params = xllamacpp.CommonParams()
    setters: dict[str, Callable[[Any], None]] = {}

    def add(names: Sequence[str], setter: Callable[[Any], None], **how: Any) -> None:
        key = names[-1]
        setters[key] = setter
        parser.add_argument(*names, dest=key, default=argparse.SUPPRESS, **how)

    for option in _OPTIONS:
        add(option.names, partial(_set_option, params, option))
    for switch in _SWITCHES:
        add(switch.names, partial(_set_switch, params, switch), action="store_true")
    for each in _ENUMS:
        add(each.names, partial(_set_enum, params, xllamacpp, each))
    add(_TENSOR_SPLIT, partial(_split, params))
    add((_NO_MMAP,), lambda _: _set(params, "load_mode", xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE), action="store_true")
    add(_CPU_MOE, lambda _: _set(params, "tensor_buft_overrides", f"{_EXPERTS}=CPU"), action="store_true")
    add(_N_CPU_MOE, partial(_experts_of_layers, params))
    try:
        for key, value in vars(parser.parse_args(_joined(arguments))).items():
            setters[key](value)
    except ValueError as error:
        parser.error(str(error))
    return params


def main() -> None:
    """Serves until SIGTERM, SIGINT, or the death of the parent."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    import xllamacpp

    # Blocked before the server starts its threads, so that only sigwait below sees them.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        server = xllamacpp.Server(parse(sys.argv[1:], xllamacpp))
    except RuntimeError as error:
        print(f"engine_shim: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    assert server is not None
    signal.sigwait(signals)
    sys.stderr.flush()
    os._exit(0)  # without waiting for requests: who stops an engine has drained it


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--seed -1` as `--seed=-1`: argparse takes a negative number that follows for a flag."""
    joined: list[str] = []
    for argument in arguments:
        negative = argument[:1] == "-" and argument[1:2].isdigit()
        if negative and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _set(params: Any, field: str, value: Any) -> None:
    *path, name = field.split(".")
    for step in path:
        params = getattr(params, step)
    setattr(params, name, value)


def _set_option(params: Any, option: _Option, text: str) -> None:
    try:
        value = option.convert(text)
    except (ValueError, KeyError, ZeroDivisionError):
        raise ValueError(f"{option.names[-1]} {text}") from None
    _set(params, option.field, value)


def _set_switch(params: Any, switch: _Switch, _: Any) -> None:
    _set(params, switch.field, switch.value)


def _set_enum(params: Any, xllamacpp: Any, option: _Enum, text: str) -> None:
    name = dict(option.synonyms).get(text, text.upper())
    member = getattr(getattr(xllamacpp, option.enum), option.prefix + name, None)
    if member is None:
        raise ValueError(f"{option.names[-1]} {text}")
    _set(params, option.field, member)


def _experts_of_layers(params: Any, text: str) -> None:
    if not text.isdigit():
        raise ValueError(f"--n-cpu-moe {text}")
    params.tensor_buft_overrides = ",".join(rf"blk\.{layer}{_EXPERTS}=CPU" for layer in range(int(text)))


def _split(params: Any, text: str) -> None:
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--tensor-split {text}") from None
    split = list(params.tensor_split)
    split[: len(parts)] = parts
    params.tensor_split = split


if __name__ == "__main__":
    main()
