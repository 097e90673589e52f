"""`make smoke`: starts `llorch home` on a free port in a directory of its own, applies the example pool, streams a chat
through the openai SDK, prints tokens and first-token time, stops, and exits 0 only when no engine is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
LLORCH = Path(sys.executable).parent / "llorch"
EXAMPLE = ROOT / "deploy/examples/pool-tiny.yaml"
DEADLINE = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="llorch-smoke-") as directory:
        work, port = Path(directory), free_port()
        environment = {
            **os.environ,
            "ORCHESTRATORD_ADDR": f"127.0.0.1:{port}",
            "LLORCH_URL": f"http://127.0.0.1:{port}",
            "LLORCH_MODEL_DIR": str(work / "models"),
        }
        home = subprocess.Popen([LLORCH, "home"], cwd=work, env=environment, start_new_session=True)
        engines: list[int] = []
        try:
            manifest = work / "pool-tiny.yaml"
            model = work / "tiny.gguf"
            subprocess.run([sys.executable, "-m", "llorch_model.tiny", str(model)], check=True, stdout=subprocess.DEVNULL)
            manifest.write_text(EXAMPLE.read_text().replace("file:/models/tiny.gguf", f"file:{model}"))
            started = time.monotonic()
            run_until_it_works([LLORCH, "apply", "-f", str(manifest)], work, environment)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)
            wait_for_model(client, "tiny")
            print(f"serving tiny {time.monotonic() - started:.2f} s after the pool was applied")
            engines = descendants(home.pid)
            stream_chat(client)
        finally:
            asked = time.monotonic()
            home.send_signal(signal.SIGINT)
            code = home.wait(timeout=15)
            print(f"stopped in {time.monotonic() - asked:.2f} s, exit code {code}")
        left = [pid for pid in engines if alive(pid)]
        if left or code != 0:
            print(f"left behind: {left}", file=sys.stderr)
            return 1
    return 0


def run_until_it_works(command: list[str | Path], work: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            print(done.stdout.strip())
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        time.sleep(0.2)


def wait_for_model(client: OpenAI, name: str) -> None:
    deadline = time.monotonic() + DEADLINE
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=1)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told when the time is up
            last = error
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"{name} did not become ready: {last}")


def stream_chat(client: OpenAI) -> None:
    sent, first, pieces = time.monotonic(), 0.0, 0
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    tokens = 0
    for event in answer:
        if event.usage is not None:
            tokens = event.usage.completion_tokens
        if event.choices and event.choices[0].delta.content:
            first = first or time.monotonic()
            pieces += 1
            print(event.choices[0].delta.content, end="", flush=True)
    figures = f"first after {(first - sent) * 1000:.1f} ms, all after {(time.monotonic() - sent) * 1000:.1f} ms"
    print(f"\n{tokens} tokens in {pieces} pieces, {figures}")
    if tokens != 64 or pieces < 2:
        raise SystemExit("the stream was not whole")


if __name__ == "__main__":
    raise SystemExit(main())
