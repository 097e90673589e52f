"""TLS on every listener, by setting; and nobody speaks to whom they cannot verify."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from engine_node import foreign_engine
from programs import clean_environment, free_port, program, until

from llorch_model.tiny import write_tiny
from llorch_web.server import Server
from llorch_web.settings import StartError
from llorch_web.tls import TlsSettings
from llorch_web.upstream import ConnectFailed, Upstream, split_url

pytestmark = pytest.mark.functional


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine that signs itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=llorch-test", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*words, *names, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=20)
    return cert, key


def tls(certificate: tuple[Path, Path], **more: Any) -> TlsSettings:
    return TlsSettings(tls_cert_file=certificate[0], tls_key_file=certificate[1], **more)


async def hello(_: web.Request) -> web.Response:
    return web.Response(body=b"x" * 1_000_000)


async def test_a_listener_speaks_tls_and_the_data_path_s_client_verifies_it(certificate: tuple[Path, Path]) -> None:
    app = web.Application()
    app.add_routes([web.get("/hello", hello)])
    server = Server(app, "127.0.0.1:0", variable="TEST", tls=tls(certificate).server_tls())
    await server.start()
    knows, knows_not = Upstream(tls=tls(certificate, tls_ca_file=certificate[0]).client_tls()), Upstream()
    try:
        assert server.url.startswith("https://127.0.0.1:")
        address, _ = split_url(server.url)
        for _ in range(2):  # the second time over the connection of the first
            async with await knows.send(address, "GET", "/hello") as exchange:
                status = await exchange.head()
                body = b"".join([chunk async for chunk in exchange])
            assert (status, len(body)) == (200, 1_000_000)
        assert knows.open_connections == 1
        with pytest.raises(ConnectFailed):
            await knows_not.send(address, "GET", "/hello")
    finally:
        await knows.close()
        await knows_not.close()
        await server.stop(0.5)


def test_a_certificate_that_cannot_be_used_is_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    (tmp_path / "empty.pem").write_text("")
    cases = [
        (TlsSettings(tls_cert_file=tmp_path / "none.pem"), "LLORCH_TLS_CERT_FILE=", "no such file or directory"),
        (TlsSettings(tls_cert_file=key, tls_key_file=key), "LLORCH_TLS_CERT_FILE=", "cannot be used"),
        (TlsSettings(tls_cert_file=cert), "LLORCH_TLS_CERT_FILE=", "cannot be used"),
        (TlsSettings(tls_key_file=key), "LLORCH_TLS_KEY_FILE=", "needs LLORCH_TLS_CERT_FILE"),
    ]
    for settings, names, says in cases:
        with pytest.raises(StartError, match=names) as caught:
            settings.server_tls()
        assert says in str(caught.value)
    for ca in (tmp_path / "none.pem", tmp_path / "empty.pem"):
        with pytest.raises(StartError, match="LLORCH_TLS_CA_FILE="):
            TlsSettings(tls_ca_file=ca).client_tls()


def module(name: str, cwd: Path, **more: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """`python -m NAME` until the block ends."""
    return program([sys.executable, "-m", name], cwd=cwd, log=f"{name}.log", environment=clean_environment(**more))


async def test_operator_agent_and_gateway_speak_tls_to_one_another(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    control, agent, gateway = (f"127.0.0.1:{free_port()}" for _ in range(3))
    shown = {"LLORCH_TLS_CERT_FILE": cert, "LLORCH_TLS_KEY_FILE": key}
    trusted = {**shown, "LLORCH_TLS_CA_FILE": cert}
    context = ssl.create_default_context(cafile=cert)

    def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        try:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, context=context, timeout=5) as answer:
                return dict(json.loads(answer.read()))
        except OSError:
            return {}

    by_http = {
        "POOL_MANAGERD_CLOUD_PROFILE": "true", "ORCHESTRATORD_URL": f"https://{control}", "POOL_MANAGERD_NODE_ID": "n",
        "POOL_MANAGERD_ADDR": agent, "LLORCH_DEVICES": "cpu", "LLORCH_MODEL_DIR": "models",
    }  # fmt: skip
    api = {"ORCHESTRATORD_CLOUD_PROFILE": "true", "ORCHESTRATORD_ADDR": control}
    asked = {"model": "pool-0", "prompt": "a", "max_tokens": 3}
    with (
        module("llorch_operator", cwd=tmp_path, **trusted, **api),
        module("llorch_gateway", cwd=tmp_path, **trusted, LLORCH_GATEWAY_ADDR=gateway),
    ):
        until(lambda: "nodes" in ask(f"https://{control}/v2/nodes"))
        with module("llorch_agent", cwd=tmp_path, **shown, **by_http) as suspicious:
            until(lambda: "cannot register" in (tmp_path / "llorch_agent.log").read_text())
            assert suspicious.poll() is None
            assert ask(f"https://{control}/v2/nodes")["nodes"] == [], "it does not register with whom it cannot verify"
        async with foreign_engine(write_tiny(tmp_path / "tiny.gguf")) as (_, engine):
            document = {"pool_id": "pool-0", "replica_id": "r0", "engine": "llamacpp", "engine_version": "v1", "url": engine}
            (tmp_path / ".runtime/engines").mkdir(parents=True, exist_ok=True)
            (tmp_path / ".runtime/engines/pool-0_r0.json").write_text(json.dumps(document))
            with module("llorch_agent", cwd=tmp_path, **trusted, **by_http):
                answer = until(lambda: ask(f"https://{gateway}/v1/completions", asked), 30)
                [node] = ask(f"https://{control}/v2/nodes")["nodes"]
        assert answer["usage"]["completion_tokens"] == 3
        assert node["address"] == f"https://{agent}"
