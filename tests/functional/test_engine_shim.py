"""llama-server out of the xllamacpp wheel takes llama-server's arguments."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_node import alive

from llorch_agent.core.engine_args import CACHE_TYPE_ARGS, command_line
from llorch_agent.core.handoff import Launch
from llorch_agent.engine import free_port
from llorch_agent.engine_shim import FLAGS, parse
from llorch_api.engine_args import ALLOWED_ENGINE_ARGS
from llorch_model.tiny import write_tiny

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")

pytestmark = pytest.mark.functional


def test_it_takes_every_argument_that_a_pool_may_set() -> None:
    assert {*ALLOWED_ENGINE_ARGS, *CACHE_TYPE_ARGS} <= FLAGS


def test_the_agent_s_command_line_reaches_the_server_s_parameters() -> None:
    launch = Launch(
        pool="chat",
        replica="r0",
        model_path="/m/a.gguf",
        slots=3,
        context_tokens=100,
        devices=(("GPU-a", 3000), ("GPU-b", 1000)),
        engine_args=(
            *("--temp", "0.25", "--seed", "-1", "--flash-attn", "on", "--cache-type-k", "q8_0", "--no-mmap", "--jinja"),
            *("--pooling", "mean", "--rope-scaling", "yarn", "--rope-scale", "4", "--split-mode", "row", "--embeddings"),
            *("--reasoning-format", "none", "--reasoning-budget", "0", "--threads=1", "--n-cpu-moe", "2", "--no-cache-prompt"),
        ),
    )

    params = parse(command_line(launch, 4321, FLAGS, cache_ram_mib=7), xllamacpp)

    assert (params.model.path, params.n_ctx, params.n_parallel, params.port) == ("/m/a.gguf", 300, 3, 4321)
    assert (params.n_gpu_layers, params.hostnames, params.model_alias) == (999, ["127.0.0.1"], {"chat"})
    assert (params.endpoint_metrics, params.ui, params.fit_params, params.cache_ram_mib) == (True, False, False, 7)
    assert params.n_threads_http == 19
    assert list(params.tensor_split)[:3] == [3000, 1000, 0]
    assert params.sampling.temp == 0.25
    assert params.sampling.seed == 0xFFFFFFFF
    assert params.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert params.cache_type_k == xllamacpp.ggml_type.GGML_TYPE_Q8_0
    assert params.load_mode == xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    assert params.pooling_type == xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    assert params.rope_scaling_type == xllamacpp.llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_YARN
    assert params.split_mode == xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_ROW
    assert params.reasoning_format == xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    assert (params.rope_freq_scale, params.embedding, params.use_jinja, params.cache_prompt) == (0.25, True, True, False)
    assert (params.sampling.reasoning_budget_tokens, params.cpuparams.n_threads) == (0, 1)
    assert params.tensor_buft_overrides.startswith("blk\\.0\\.ffn_")


@pytest.mark.parametrize(
    "arguments",
    [["--frobnicate"], ["--temp", "hot"], ["--pooling", "heap"], ["--fit", "maybe"], ["--n-cpu-moe", "x"], ["--temp"]],
)
def test_what_it_does_not_understand_it_refuses_as_llama_server_does(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, xllamacpp)

    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith("error: invalid argument: ")


PARENT = """
import subprocess, sys
shim = subprocess.Popen(sys.argv[1:], stderr=subprocess.STDOUT)
print(shim.pid, flush=True)
shim.wait()
"""


def test_a_model_that_cannot_be_loaded_ends_it_with_code_1(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "llorch_agent.engine_shim", "-m", str(tmp_path / "none.gguf"), "--port", "0"]

    ended = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False)

    assert ended.returncode == 1
    assert b"failed to open GGUF file" in ended.stdout


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")
    line = [sys.executable, "-m", "llorch_agent.engine_shim", "-m", str(model), "--port", str(free_port())]
    with subprocess.Popen([sys.executable, "-c", PARENT, *line], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        for text in parent.stdout:
            if b"listening" in text:
                break
        assert alive(pid)

        parent.kill()

    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
