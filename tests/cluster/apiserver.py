"""A real API server without a cluster: etcd and kube-apiserver on free loopback ports, ready in about a second.

No controllers run: namespaces are not emptied on deletion and nothing is garbage-collected. Authorization is RBAC; the given
token is a cluster administrator's, and `kubectl create token` makes tokens of service accounts.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

HERE = Path(__file__).parent
START_SECONDS = 60.0
"""How long a server may take to be ready; one or two on an idle machine."""
STOP_SECONDS = 10.0
_PDEATHSIG = 1


class CannotStart(RuntimeError):
    """No API server here. Says why."""


@dataclass(slots=True)
class ApiServer:
    """A running API server."""

    directory: Path
    url: str
    token: str
    """A cluster administrator's bearer token."""
    kubeconfig: Path
    """For that administrator."""
    ca: Path
    """The certificate that the server shows, in PEM."""
    _command: Sequence[str | Path] = ()
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:  # noqa: A002
        """Runs kubectl as the administrator. With `check`, a failure raises CalledProcessError and shows what was said."""
        command = [str(binary("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        # Its discovery cache would outlive the server and fill the home directory.
        environment = {**os.environ, "KUBECACHEDIR": str(self.directory / "kubectl")}
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=60, check=False, env=environment)
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done

    def kubeconfig_of(self, name: str, token: str, *, url: str = "") -> Path:
        """A kubeconfig for another token, or to reach the server by way of another URL (a proxy)."""
        path = self.directory / f"kubeconfig-{name}"
        path.write_text(_kubeconfig(url or self.url, self.ca, token))
        path.chmod(0o600)
        return path

    def launch(self) -> None:
        """Starts kube-apiserver on the same etcd. From the main thread: the server ends with the thread that started it."""
        self._process = _spawn(self._command, self._log)

    def wait_until_ready(self) -> None:
        """Returns when it serves. Raises CannotStart."""
        assert self._process is not None
        _wait(self._process, self._log, self._is_ready)

    def stop(self, *, gracefully: bool = False) -> None:
        """Ends kube-apiserver: its connections are cut, unless `gracefully`."""
        if self._process is not None:
            _end(self._process, signal.SIGTERM if gracefully else signal.SIGKILL)
            self._process = None

    @property
    def _log(self) -> Path:
        return self.directory / "kube-apiserver.log"

    def _is_ready(self) -> bool:
        if not self.ca.exists():
            return False
        request = urllib.request.Request(f"{self.url}/readyz", headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=2, context=ssl.create_default_context(cafile=str(self.ca))) as answer:
                return int(answer.status) == 200
        except (OSError, urllib.error.URLError):
            return False


@contextmanager
def start_api_server() -> Iterator[ApiServer]:
    """Starts etcd and kube-apiserver and ends them afterwards. Raises CannotStart."""
    programs = {name: binary(name) for name in ("etcd", "kube-apiserver", "kubectl")}
    with tempfile.TemporaryDirectory(prefix="llorch-api-", ignore_cleanup_errors=True) as made:
        directory = Path(made)
        client, peer, port = _free_ports(3)
        etcd = _start_etcd(programs["etcd"], directory, client, peer)
        try:
            server = _api_server(programs["kube-apiserver"], directory, f"http://127.0.0.1:{client}", port)
            try:
                server.launch()
                server.wait_until_ready()
                yield server
            finally:
                server.stop()
        finally:
            _end(etcd, signal.SIGKILL)


def binary(name: str) -> Path:
    """The program `name`: from the cache, which is filled first where it can be, else from PATH. Raises CannotStart."""
    cached = Path(os.environ.get("LLORCH_CACHE") or Path.home() / ".cache" / "llorch") / "cluster" / "bin" / name
    if cached.exists():
        return cached
    if found := shutil.which(name):
        return Path(found)
    built = subprocess.run([HERE / "tools.sh", "etcd", "kube"], capture_output=True, text=True, check=False)
    if built.returncode or not cached.exists():
        raise CannotStart(f"no {name} in {cached.parent} or on PATH, and it cannot be built: {built.stderr.strip()[-500:]}")
    return cached


def _start_etcd(program: Path, directory: Path, client: int, peer: int) -> subprocess.Popen[bytes]:
    url, peer_url, log = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}", directory / "etcd.log"
    command: list[str | Path] = [program, f"--data-dir={directory / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn"]
    command += [f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
    command += [f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"]
    command += [f"--initial-cluster=default={peer_url}"]
    process = _spawn(command, log)
    _wait(process, log, lambda: _listens(client))
    return process


def _api_server(program: Path, directory: Path, etcd: str, port: int) -> ApiServer:
    token, url, certificates = os.urandom(16).hex(), f"https://127.0.0.1:{port}", directory / "certificates"
    certificates.mkdir()
    key, tokens = directory / "service-account.key", directory / "tokens.csv"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    tokens.write_text(f'{token},admin,admin,"system:masters"\n')
    tokens.chmod(0o600)
    kubeconfig, ca = directory / "kubeconfig", certificates / "apiserver.crt"
    kubeconfig.write_text(_kubeconfig(url, ca, token))
    kubeconfig.chmod(0o600)
    command: list[str | Path] = [program, f"--etcd-servers={etcd}", "--bind-address=127.0.0.1", f"--secure-port={port}"]
    command += [f"--cert-dir={certificates}", f"--token-auth-file={tokens}", "--authorization-mode=RBAC"]
    command += ["--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}"]
    command += [f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.0.0.0/24"]
    command += ["--disable-admission-plugins=ServiceAccount", "--allow-privileged", "--watch-cache-sizes="]
    return ApiServer(directory, url, token, kubeconfig, ca, command)


def _kubeconfig(url: str, ca: Path, token: str) -> str:
    parts = {
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(ca)}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "test", **parts})


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def _spawn(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        # A test run that is killed leaves no server behind.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_die_with_parent)


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            _end(process, signal.SIGKILL)
            raise CannotStart(f"{log.stem} did not start: {log.read_text()[-2000:]}")
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)
