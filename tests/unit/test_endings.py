"""One line for every way in which an engine ends."""

from __future__ import annotations

import pytest

from llorch_agent.core.endings import MAX_MESSAGE, EndKind, classify

OPENING = "0.00.008.502 E gguf_init_from_file: failed to open GGUF file '/m/a.gguf' (No such file or directory)"
FOLLOWS = [
    "0.00.008.646 E llama_model_load: error loading model: llama_model_loader: failed to load model from /m/a.gguf",
    "0.00.008.652 E srv    load_model: failed to load model, '/m/a.gguf'",
    "0.00.012.537 E srv          init: exiting due to model loading error",
]


@pytest.mark.parametrize(
    ("status", "log", "kind", "message"),
    [
        (0, [], EndKind.CLEAN, "ended by itself with exit code 0"),
        (1, [OPENING, *FOLLOWS], EndKind.MISSING_MODEL, "model file /m/a.gguf is missing"),
        (
            1,
            ["0.00.01.3 E gguf_init_from_reader: invalid magic characters: 'junk', expected 'GGUF'", *FOLLOWS],
            EndKind.BAD_MODEL,
            "/m/a.gguf cannot be loaded: gguf_init_from_reader: invalid magic characters: 'junk', expected 'GGUF'",
        ),
        (
            1,
            ["0.00.009.174 E llama_model_load: error loading model: tensor 'x' data is not within the file bounds", *FOLLOWS],
            EndKind.BAD_MODEL,
            "/m/a.gguf cannot be loaded: llama_model_load: error loading model: tensor 'x' data is not within the file bounds",
        ),
        (
            1,
            ["0.00.004.651 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18112"],
            EndKind.PORT_TAKEN,
            "port taken: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18112",
        ),
        (
            1,
            [
                "alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory",
                *FOLLOWS,
            ],
            EndKind.OUT_OF_MEMORY,
            "out of memory: alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory",
        ),
        (
            -6,
            ["CUDA error: out of memory", "  current device: 0"],
            EndKind.OUT_OF_MEMORY,
            "out of memory: CUDA error: out of memory",
        ),
        (-6, ["CUDA error: an illegal memory access"], EndKind.CUDA, "CUDA error: an illegal memory access"),
        (1, ["error: invalid argument: --frobnicate"], EndKind.BAD_ARGUMENT, None),
        (-11, ["0.1 I srv: fine"], EndKind.KILLED, "killed by signal 11 (SIGSEGV)"),
        (137, [], EndKind.KILLED, "killed by signal 9 (SIGKILL): by hand, or by the kernel's out-of-memory killer"),
        (-4, [], EndKind.KILLED, "killed by signal 4 (SIGILL): llama-server was built for another CPU"),
        (-64, [], EndKind.KILLED, None),
        (3, ["something", ""], EndKind.EXITED, "exited with code 3: something"),
        (3, [], EndKind.EXITED, "exited with code 3"),
        (
            1,
            ["0.00.01.1 E llama_init_from_model: K cache type q8_0 does not divide", "0.00.01.2 E srv    load_model: no context"],
            EndKind.EXITED,
            "exited with code 1: llama_init_from_model: K cache type q8_0 does not divide",
        ),
    ],
)
def test_the_cause_is_named_and_not_what_followed_from_it(
    status: int, log: list[str], kind: EndKind, message: str | None
) -> None:
    ending = classify(status, log, "/m/a.gguf")

    assert ending.kind is kind
    assert message is None or ending.message == message
    assert "\n" not in ending.message


@pytest.mark.parametrize(
    ("status", "log", "kind", "names"),
    [
        pytest.param(
            1,
            [
                "0.01.204.112 E alloc_buffer: allocating 15317.02 MiB on device 0: cudaMalloc failed: out of memory",
                "0.01.204.131 E alloc_tensor_range: failed to allocate CUDA0 buffer of size 16061022208",
                "0.01.204.890 E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
                "0.01.204.899 E llama_model_load_from_file_impl: failed to load model",
                "0.01.210.004 E srv    load_model: failed to load model, '/m/a.gguf'",
            ],
            EndKind.OUT_OF_MEMORY,
            "15317.02 MiB on device 0",
            id="the weights do not fit",
        ),
        pytest.param(
            1,
            [
                "0.09.001.417 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
                "0.09.001.502 E common_init_result: failed to create context with model '/m/a.gguf'",
            ],
            EndKind.OUT_OF_MEMORY,
            "buffer for kv cache",
            id="the context does not fit",
        ),
        pytest.param(
            -6,
            [
                "0.41.887.210 E CUDA error: out of memory",
                "0.41.887.215 E   current device: 0, in function alloc at ggml-cuda.cu:503",
                "0.41.887.220 E   cuMemCreate(&handle, reserve_size, &prop, 0)",
                "ggml-cuda.cu:90: CUDA error",
                "[New LWP 1211]",
                "#0  0x00007f33ac71e3ea in __GI___wait4 () from /lib/x86_64-linux-gnu/libc.so.6",
            ],
            EndKind.OUT_OF_MEMORY,
            "CUDA error: out of memory",
            id="the pool grows while it computes",
        ),
        pytest.param(
            -6,
            [
                "1.02.113.004 E CUDA error: an illegal memory access was encountered",
                "1.02.113.009 E   current device: 1, in function ggml_backend_cuda_synchronize at ggml-cuda.cu:2981",
                "ggml-cuda.cu:90: CUDA error",
            ],
            EndKind.CUDA,
            "CUDA error: an illegal memory access was encountered",
            id="a kernel fails",
        ),
        pytest.param(
            1,
            ["0.00.120.350 E ggml_cuda_init: CUDA driver version is insufficient for CUDA runtime version"],
            EndKind.CUDA,
            "CUDA driver version is insufficient",
            id="the driver is too old",
        ),
    ],
)
def test_out_of_memory_and_cuda_errors_are_named(status: int, log: list[str], kind: EndKind, names: str) -> None:
    ending = classify(status, log, "/m/a.gguf")

    assert ending.kind is kind
    assert names in ending.message


def test_a_warning_about_memory_is_not_why_an_engine_crashed() -> None:
    log = ["0.00.01.1 W srv         alloc: failed to allocate memory for prompt cache state"]

    assert classify(-11, log, "/m").kind is EndKind.KILLED


def test_a_message_fits_into_a_replica_s_status() -> None:
    assert len(classify(1, ["x" * 1000], "/m").message) == MAX_MESSAGE
