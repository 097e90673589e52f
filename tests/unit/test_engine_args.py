"""The command line and the environment that llama-server gets."""

from __future__ import annotations

from dataclasses import replace

from llorch_agent.core.engine_args import RUN_TOKEN, command_line, environment, flags_in, refused_by_agent
from llorch_agent.core.handoff import Launch

ALL = frozenset({"--cache-ram", "--fit", "--no-ui", "--no-webui"})
LAUNCH = Launch(pool="chat", replica="chat-1", model_path="/m/a.gguf", slots=4, context_tokens=2048, devices=(("GPU-a", 9000),))


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_nothing_is_left_to_llama_server_s_defaults() -> None:
    line = command_line(LAUNCH, 4321, ALL)

    assert value(line, "-m") == "/m/a.gguf"
    assert value(line, "-c") == "8192", "the context is per slot, and -c the total"
    assert value(line, "-np") == "4"
    assert value(line, "-ngl") == "999"
    assert (value(line, "--host"), value(line, "--port")) == ("127.0.0.1", "4321")
    assert value(line, "--cache-ram") == "0", "its default takes 8 GiB of host memory"
    assert value(line, "--fit") == "off"
    assert int(value(line, "--threads-http")) >= 4 + 16
    assert value(line, "--alias") == "chat"
    assert "--metrics" in line
    assert line.count("--no-ui") + line.count("--no-webui") == 1
    assert "--tensor-split" not in line


def test_a_llama_server_that_does_not_know_a_flag_is_not_given_it() -> None:
    assert not ALL & set(command_line(LAUNCH, 1, frozenset()))


def test_a_replica_on_the_cpu_offloads_nothing_and_sees_no_gpu() -> None:
    on_cpu = replace(LAUNCH, devices=(("cpu", 500),))

    assert value(command_line(on_cpu, 1, ALL), "-ngl") == "0"
    assert environment({"CUDA_VISIBLE_DEVICES": "0,1"}, on_cpu, "t")["CUDA_VISIBLE_DEVICES"] == ""


def test_several_devices_are_named_and_split_in_the_same_order() -> None:
    split = replace(LAUNCH, devices=(("GPU-b", 6000), ("GPU-a", 2000)))

    assert value(command_line(split, 1, ALL), "--tensor-split") == "6000,2000"
    assert environment({}, split, "t")["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"


def test_a_pool_s_own_arguments_come_last_and_replace_ours() -> None:
    own = replace(LAUNCH, engine_args=("--temp", "0.1", "--cache-ram", "64"))
    line = command_line(own, 1, ALL, cache_ram_mib=512)

    assert line[-4:] == ["--temp", "0.1", "--cache-ram", "64"]
    assert line.count("--cache-ram") == 1


def test_the_kv_cache_s_type_may_be_set_and_a_port_may_not() -> None:
    assert refused_by_agent(["--cache-type-k", "q8_0", "--port", "1", "--seed", "-1"]) == ["--port"]


def test_the_engine_learns_no_secret_and_no_variable_that_changes_its_arguments() -> None:
    result = environment(
        {"PATH": "/bin", "LLORCH_API_TOKEN": "s", "HF_TOKEN": "s", "LLAMA_ARG_HOST": "0.0.0.0", "AWS_SECRET_ACCESS_KEY": "s"},
        LAUNCH,
        "token-1",
    )

    assert result == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        RUN_TOKEN: "token-1",
    }


def test_without_devices_a_mask_counts_and_without_a_mask_what_the_agent_sees() -> None:
    free = replace(LAUNCH, devices=())

    assert environment({"CUDA_VISIBLE_DEVICES": "3"}, free, "t")["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment({}, replace(free, device_mask="0,1"), "t")["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, free, "t")


def test_flags_are_read_from_the_help() -> None:
    text = """
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers
--ui,  --webui, --no-ui, --no-webui     whether to enable the Web UI, see --cache-ram
    """

    assert flags_in(text) >= {"-ngl", "--gpu-layers", "--n-gpu-layers", "--no-ui", "--no-webui"}
    assert "--fit" not in flags_in(text)
