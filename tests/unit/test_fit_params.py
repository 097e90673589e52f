"""What llama-fit-params is asked, and how its answer is read."""

from __future__ import annotations

import pytest

from llorch_agent.core.fit_params import arguments, total_mib


@pytest.mark.parametrize(
    ("output", "mib"),
    [
        ("CUDA0 4403 2048 258 \nHost 282 0 40 \n", 6_709),
        ("CUDA0 19353 2560 266\nCUDA1 19353 2560 700\nHost 563 0 40\n", 44_792),
        ("Host 4685 2048 266 \n", 6_999),
        ("a warning with four words\nHost 1 2 3\n", 6),
        ("", None),
        ("-c 16384 -ngl 33\n", None),
        ("Host 0 0 0\n", None),
    ],
)
def test_the_devices_are_summed_and_the_host_counts_where_there_is_no_other(output: str, mib: int | None):
    assert total_mib(output) == mib


def test_only_arguments_that_change_memory_are_passed_on():
    args = ["--temp", "0.7", "--cache-type-k", "q8_0", "--jinja", "-ub=256", "--swa-full", "--top-k", "-1"]
    line = arguments("/m.gguf", slots=4, context_tokens=4096, engine_args=args)
    assert line[line.index("-c") + 1] == "16384"
    assert line[line.index("-np") + 1] == "4"
    assert line[line.index("--no-repack") + 1 :] == ["--cache-type-k", "q8_0", "-ub=256", "--swa-full"]
