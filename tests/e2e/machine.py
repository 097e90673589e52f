"""What this machine offers the e2e tests: Docker, kind, kubectl and helm, and images of the working tree."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("LLORCH_CACHE", Path.home() / ".cache" / "llorch"))


class CannotRun(Exception):
    """This machine has not what the e2e tests need; the message says what."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the programs are, and which images to start from."""

    path: str
    node_image: str
    base_image: str
    kind_config: Path
    started_dockerd: bool

    def program(self, name: str) -> Path:
        """Full path of a program that `up.sh` vouches for."""
        for directory in self.path.split(os.pathsep):
            if (candidate := Path(directory) / name).is_file():
                return candidate
        raise CannotRun(f"no {name} on PATH")


def ready_machine() -> Machine:
    """Runs tests/cluster/up.sh: a second when everything is there, about 12 minutes on a machine that pulls no images."""
    script = ROOT / "tests" / "cluster" / "up.sh"
    done = subprocess.run(["bash", "-c", f'{script} && echo "#$PATH"'], capture_output=True, text=True, timeout=2400)
    if done.returncode:
        raise CannotRun((done.stderr.strip() or "tests/cluster/up.sh failed").splitlines()[-1])
    shown = subprocess.run(
        ["bash", "-c", f'{done.stdout}\nprintf "%s\\n" "$PATH" "$KIND_IMAGE" "$BASE_IMAGE" "$KIND_CONFIG" "$LLORCH_DOCKERD"'],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.splitlines()
    path, node_image, base_image, config, dockerd = shown
    return Machine(path, node_image, base_image, Path(config), dockerd == "started")


def _sources(dockerfile: Path) -> Iterator[Path]:
    """The files that an image is made of: what .dockerignore lets through, and the Dockerfile."""
    yield dockerfile
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.startswith("!"):
            continue
        entry = ROOT / line[1:]
        files = entry.rglob("*") if entry.is_dir() else [entry]
        yield from (file for file in files if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".gguf")


def _run(*command: str, timeout: float = 900) -> str:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}…: exit {done.returncode}\n" + "\n".join(done.stdout.splitlines()[-30:]))
    return done.stdout


def image(component: str, base: str) -> str:
    """The image of Dockerfile.<component>, built unless one of these very sources is there already. Returns its name."""
    dockerfile = ROOT / f"Dockerfile.{component}"
    digest = hashlib.sha256(_run("docker", "image", "inspect", "-f", "{{.Id}}", base).encode())
    for file in sorted(set(_sources(dockerfile))):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    repository = f"llorch-test/{component}"
    name = f"{repository}:{digest.hexdigest()[:12]}"
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True, timeout=30).returncode == 0:
        return name
    older = _run("docker", "image", "ls", "-q", repository).split()
    _run("docker", "build", "-f", dockerfile.name, "--build-arg", f"BASE={base}", "-t", name, ".")
    if older:
        subprocess.run(["docker", "rmi", *set(older)], capture_output=True, timeout=60)
    return name
