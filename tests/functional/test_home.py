"""Home as a person meets it: a process, its command line, its errors, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, NotFoundError, OpenAI
from programs import free_port

from llorch_model.tiny import write_mid, write_tiny

pytestmark = pytest.mark.functional

LLORCH = Path(sys.executable).parent / "llorch"
BAD_ARGUMENT = """
kind: GPUPool
apiVersion: llorch.dev/v1alpha1
metadata: {name: x}
spec: {model: {source: 'file:/m'}, engine: {args: ['--port', '1']}}
"""
CHAT: list[Any] = [{"role": "user", "content": "hi"}]


def until(check: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return value


class Home:
    """One `llorch home` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("LLORCH_", "POOL_", "ORCH"))},
            "ORCHESTRATORD_ADDR": f"127.0.0.1:{self.port}",
            "LLORCH_URL": self.url,
            "LLORCH_MODEL_DIR": str(directory / "models"),
            "POOL_MANAGERD_NODE_ID": "desk",
        }
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)
        self.process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.directory / "home.log").open("ab") as log:
            child = subprocess.Popen([LLORCH, "home", *words], cwd=self.directory, env=self.environment, stdout=log, stderr=log)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
            print((self.directory / "home.log").read_text())

    def cli(self, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [LLORCH, *words],
            cwd=self.directory,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def apply(self, name: str, source: str, **spec: Any) -> subprocess.CompletedProcess[str]:
        body = {
            "apiVersion": "llorch.dev/v1alpha1",
            "kind": "GPUPool",
            "metadata": {"name": name},
            "spec": {
                "model": {"source": source, **spec.pop("model", {})},
                "placement": {"allowCPU": True},
                "contextTokens": 512,
                **spec,
            },
        }
        file = self.directory / f"{name}.yaml"
        file.write_text(json.dumps(body))
        return self.cli("apply", "-f", str(file))

    def pool(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cli("get", "gpupool", name, "-o", "json").stdout)
        return found

    def condition(self, name: str, type_: str) -> dict[str, str]:
        conditions = self.pool(name).get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == type_), {"reason": "", "message": "", "status": ""})

    def ready(self, name: str) -> bool:
        return self.pool(name).get("status", {}).get("ready", 0) > 0

    def served(self) -> list[str]:
        try:
            return [model.id for model in self.client.models.list()]
        except Exception:  # noqa: BLE001 - not up yet
            return []

    def ask(self, model: str, tokens: int = 8) -> str:
        pieces = self.client.chat.completions.create(model=model, messages=CHAT, max_tokens=tokens, stream=True)
        return "".join(event.choices[0].delta.content or "" for event in pieces if event.choices)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    found = Home(tmp_path)
    with found.client:
        yield found


def engines_below(directory: Path) -> list[int]:
    """Processes whose command line names a file of this test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(directory) in words and "-m\0" in words and "--port" in words:
                found.append(int(entry.name))
    return found


def test_from_nothing_to_a_streamed_answer_and_gone_on_ctrl_c(home: Home) -> None:
    with home.running("--demo") as child:
        until(lambda: "tiny" in home.served())
        until(lambda: home.ready("tiny"))
        assert len(home.ask("tiny", 16)) >= 16
        answer = home.client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=5)
        assert answer.model == "tiny"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        completion = home.client.completions.create(model="tiny", prompt="once", max_tokens=4)
        assert completion.choices[0].text
        assert engines_below(home.directory)
        stopped = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 0
        assert time.monotonic() - stopped < 5
    assert engines_below(home.directory) == []


def test_a_second_start_serves_again_within_five_seconds(home: Home) -> None:
    with home.running("--demo"):
        until(lambda: "tiny" in home.served())
        until(lambda: home.ready("tiny"))
    started = time.monotonic()
    with home.running("--demo"):
        until(lambda: home.served() and home.ready("tiny") and answers(home, "tiny"), 5)
        assert time.monotonic() - started < 5
        assert len(engines_below(home.directory)) == 1


def answers(home: Home, model: str) -> bool:
    try:
        return bool(home.ask(model, 1))
    except APIStatusError:
        return False


def test_ctrl_c_ends_a_running_stream_with_an_error_and_takes_at_most_five_seconds(home: Home) -> None:
    write_mid(home.directory / "mid.gguf")
    ended: list[str] = []

    def talk() -> None:
        try:
            home.ask("slow", 400_000)
            ended.append("whole")
        except Exception as error:  # noqa: BLE001 - its name is what is asserted
            ended.append(type(error).__name__)

    with home.running() as child:
        until(lambda: home.cli("get", "gpunodes", check=False).returncode == 0)
        home.apply("slow", f"file:{home.directory}/mid.gguf", contextTokens=1 << 19, slots=1)
        until(lambda: home.ready("slow"))
        thread = threading.Thread(target=talk)
        thread.start()
        time.sleep(1)
        stopped = time.monotonic()
        child.send_signal(signal.SIGINT)
        child.wait(8)
        assert time.monotonic() - stopped < 5.5
        thread.join(5)
        assert ended
        assert ended != ["whole"]
    assert engines_below(home.directory) == []


def test_a_killed_home_leaves_no_engine(home: Home) -> None:
    with home.running("--demo") as child:
        until(lambda: "tiny" in home.served())
        until(lambda: home.ready("tiny"))
        child.kill()
        child.wait()
        until(lambda: engines_below(home.directory) == [], 10)


@contextmanager
def an_engine(directory: Path) -> Iterator[str]:
    """Somebody else's llama-server, already running."""
    port = free_port()
    words = [
        "-m",
        str(write_tiny(directory / "theirs.gguf")),
        "-c",
        "2048",
        "-np",
        "4",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    engine = subprocess.Popen([sys.executable, "-m", "llorch_agent.engine_shim", *words], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        engine.kill()
        engine.wait()


def test_a_handoff_file_is_served_within_two_seconds_and_gone_with_the_file(home: Home) -> None:
    with an_engine(home.directory) as url, home.running():
        until(lambda: is_up(url))
        until(lambda: "listening" in (home.directory / "home.log").read_text())
        handoff = {"pool_id": "pool-0", "replica_id": "r0", "engine": "llamacpp", "url": url, "engine_version": "b1", "slots": 4}
        file = home.directory / ".runtime/engines/pool-0_r0.json"
        until(file.parent.is_dir)
        file.with_suffix(".tmp").write_text(json.dumps(handoff))
        dropped = time.monotonic()
        file.with_suffix(".tmp").rename(file)
        until(lambda: "pool-0" in home.served() and answers(home, "pool-0"), 5)
        assert time.monotonic() - dropped < 2.5
        assert home.client.chat.completions.create(model="pool-0", messages=CHAT, max_tokens=2).model == "pool-0"
        file.unlink()
        until(lambda: "pool-0" not in home.served())
        assert is_up(url)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_apply_get_and_delete_speak_kubectls_language(home: Home) -> None:
    write_tiny(home.directory / "m.gguf")
    with home.running():
        until(lambda: "desk" in home.cli("get", "gpunodes", check=False).stdout)
        assert home.apply("chat", f"file:{home.directory}/m.gguf").stdout == "gpupool.llorch.dev/chat created\n"
        assert home.apply("chat", f"file:{home.directory}/m.gguf").stdout == "gpupool.llorch.dev/chat unchanged\n"
        assert home.apply("chat", f"file:{home.directory}/m.gguf", replicas=2).stdout == "gpupool.llorch.dev/chat configured\n"
        until(lambda: home.pool("chat").get("status", {}).get("ready") == 2)
        header, row = home.cli("get", "gpupools").stdout.splitlines()
        assert header.split() == ["NAME", "MODEL", "DESIRED", "READY", "SLOTS", "NODES", "STATUS", "AGE"]
        assert row.split()[2:7] == ["2", "2", "8", "1", "AllReady"]
        node = home.cli("get", "gpunodes", "-o", "wide").stdout.splitlines()[1].split()
        assert node[:3] == ["desk", "Online", "cpu"]
        talk = home.cli("chat", "-m", "chat", "--max-tokens", "6", "hello", "there")
        assert talk.stdout
        assert "6 tokens" in talk.stderr
        assert home.cli("delete", "gpupool", "chat").stdout == 'gpupool.llorch.dev "chat" deleted\n'
        until(lambda: engines_below(home.directory) == [])
        assert home.cli("get", "gpupools").stdout.strip() == "No gpupools found."


def test_unknown_models_and_pools_without_replicas_are_told_apart(home: Home) -> None:
    with home.running():
        until(lambda: "desk" in home.cli("get", "gpunodes", check=False).stdout)
        with pytest.raises(NotFoundError, match="nothing"):
            home.ask("nothing")
        home.apply("waiting", f"file:{home.directory}/missing.gguf")
        until(lambda: "waiting" in home.served())
        with pytest.raises(APIStatusError) as caught:
            home.ask("waiting")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["Retry-After"]


def test_a_model_that_cannot_be_had_is_one_line_in_the_pools_status(home: Home) -> None:
    good = home.directory / "m.gguf"
    write_tiny(good)
    (home.directory / "cut.gguf").write_bytes(good.read_bytes()[:100_000])
    (home.directory / "text.gguf").write_text("hello")
    cases = {
        "missing": ({}, f"file:{home.directory}/nowhere.gguf", "Placed", "nowhere.gguf: no such file"),
        "cut": ({}, f"file:{home.directory}/cut.gguf", "Placed", "cut.gguf"),
        "text": ({}, f"file:{home.directory}/text.gguf", "Placed", "text.gguf"),
        "wrong": ({"sha256": "0" * 64}, f"file:{good}", "Available", "expected " + "0" * 64),
        "offline": ({}, "hf:org/repo", "Placed", "hf:org/repo: HF_HUB_OFFLINE is set"),
        "away": ({}, "s3://bucket/m.gguf", "Placed", "s3://bucket/m.gguf: cannot connect"),
    }
    home.environment |= {"HF_HUB_OFFLINE": "1", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    with home.running():
        until(lambda: "desk" in home.cli("get", "gpunodes", check=False).stdout)
        for name, (model, source, _, _) in cases.items():
            home.apply(name, source, model=model)
        for name, (_, _, condition, said) in cases.items():
            message = until(lambda n=name, c=condition, s=said: s in (m := home.condition(n, c)["message"]) and m)
            assert "\n" not in message
        home.apply("fine", f"file:{good}")
        until(lambda: home.ready("fine"))
        assert len(home.ask("fine")) > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1, column 6: not YAML"),
        ("- 1\n", "holds list, and must hold objects"),
        ("kind: Pod\napiVersion: v1\nmetadata: {name: x}\n", "kind 'Pod' is not one of GPUNode, GPUPool"),
        ("kind: GPUPool\napiVersion: v1\nmetadata: {name: x}\n", "apiVersion 'v1' must be llorch.dev/v1alpha1"),
        ("kind: GPUPool\napiVersion: llorch.dev/v1alpha1\nspec: {}\n", "metadata.name is missing"),
        ("kind: GPUPool\napiVersion: llorch.dev/v1alpha1\nmetadata: {name: x}\nspec: {}\n", "spec.model: is required"),
        (
            "kind: GPUPool\napiVersion: llorch.dev/v1alpha1\nmetadata: {name: x}\nspec: {model: {source: 'file:/m'}, slots: 0}\n",
            "spec.slots: 0 — must be at least 1",
        ),
        (
            "kind: GPUPool\napiVersion: llorch.dev/v1alpha1\nmetadata: {name: x}\nspec: {model: {source: 'file:/m'}, slotz: 1}\n",
            "unknown field spec.slotz",
        ),
        (BAD_ARGUMENT, "--port"),
    ],
)
def test_a_bad_manifest_is_one_line_and_nothing_is_written(home: Home, text: str, said: str) -> None:
    (home.directory / "bad.yaml").write_text(text)
    done = home.cli("apply", "-f", "bad.yaml", check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("llorch: bad.yaml: ")
    assert done.stderr.count("\n") == 1
    assert home.cli("get", "gpupools").stdout.strip() == "No gpupools found."


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "0", "must be 1 to 60 (seconds)"),
        ("ORCHESTRATORD_NODE_TIMEOUT_MS", "soon", "must be 5000 to 300000 (ms)"),
        ("ORCHESTRATORD_ADDR", "nonsense", "must be host:port"),
        ("LLORCH_STORE", "postgres:x", "must be"),
        ("LLORCH_LOG_LEVEL", "loud", "must be debug, info, warning or error"),
    ],
)
def test_a_bad_variable_is_one_line_that_names_it(home: Home, variable: str, value: str, said: str) -> None:
    done = home.cli("home", check=False, **{variable: value})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"llorch: {variable}={value} — ")
    assert said in line


def test_a_taken_port_and_a_second_home_are_one_line_each(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", home.port))
        taken.listen()
        done = home.cli("home", check=False)
        assert done.returncode == 2
        said = "the port is taken by another process; choose another or stop it"
        assert done.stderr == f"llorch: ORCHESTRATORD_ADDR=127.0.0.1:{home.port} — {said}\n"
    with home.running():
        until(lambda: home.cli("get", "gpunodes", check=False).returncode == 0 and home.served() is not None)
        until(lambda: (home.directory / ".runtime/home.lock").exists())
        until(lambda: "listening" in (home.directory / "home.log").read_text())
        done = home.cli("home", check=False, ORCHESTRATORD_ADDR="127.0.0.1:0")
        assert done.returncode == 2
        assert done.stderr == "llorch: another llorch home runs on .runtime: stop it, or set POOL_MANAGERD_RUNTIME_DIR\n"


def test_without_an_engine_the_pool_says_how_to_get_one(home: Home) -> None:
    write_tiny(home.directory / "m.gguf")
    home.environment["LLORCH_ENGINE"] = "/nonexistent/llama-server"
    with home.running():
        until(lambda: "desk" in home.cli("get", "gpunodes", check=False).stdout)
        home.apply("chat", f"file:{home.directory}/m.gguf")
        until(lambda: "LLORCH_ENGINE" in home.condition("chat", "Available")["message"])


def test_the_node_api_says_that_the_cloud_profile_is_off(home: Home) -> None:
    with home.running():
        until(lambda: "listening" in (home.directory / "home.log").read_text())
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{home.url}/v2/nodes", timeout=5)
        with caught.value as answer:
            assert answer.code == 503
            assert "ORCHESTRATORD_CLOUD_PROFILE=true" in json.loads(answer.read())["message"]


def test_with_the_cloud_profile_on_home_takes_agents_from_elsewhere_in(home: Home) -> None:
    home.environment["ORCHESTRATORD_CLOUD_PROFILE"] = "true"
    body = {"node_id": "rack-7", "address": "http://127.0.0.1:9", "pools": [], "capabilities": {"gpus": []}}
    request = urllib.request.Request(f"{home.url}/v2/nodes/register", json.dumps(body).encode(), method="POST")
    with home.running():
        until(lambda: "desk" in home.cli("get", "gpunodes", check=False).stdout)
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert json.loads(answer.read())["success"]
        with urllib.request.urlopen(f"{home.url}/v2/nodes", timeout=5) as answer:
            found = {node["node_id"]: node["status"] for node in json.loads(answer.read())["nodes"]}
        assert found == {"desk": "Online", "rack-7": "Registering"}
        assert "rack-7" in home.cli("get", "gpunodes").stdout
