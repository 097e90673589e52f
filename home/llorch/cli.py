"""The `llorch` command."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import click

from . import __version__
from .manifests import ManifestError, kind_of, read

T = TypeVar("T")


class Failure(click.ClickException):
    """One line on stderr, exit code 1."""

    def show(self, file: Any = None) -> None:  # noqa: ARG002 - click's signature
        """Prints it in llorch's form."""
        click.echo(f"llorch: {self.message}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llorch")
def main() -> None:
    """Turns GPU machines into one LLM service."""


def _client() -> Any:
    from llorch_web.settings import load

    from .settings import ClientSettings

    return load(ClientSettings)


def _with_store(work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    from llorch_store import StoreError
    from llorch_store.default import default_store
    from llorch_store.factory import open_store

    settings = _client()

    async def run() -> T:
        async with open_store(settings.store or default_store(os.environ)) as store:
            return await work(store)

    try:
        return asyncio.run(run())
    except (StoreError, ManifestError) as error:
        raise Failure(str(error)) from error


def _kind(word: str) -> Any:
    kind = kind_of(word)
    if kind is None:
        raise Failure(f"{word!r} is not a resource: gpunodes (lgn) or gpupools (lgp)")
    return kind


@main.command()
@click.option("--demo", is_flag=True, help="Serve a tiny built-in model, so that there is something to talk to.")
def home(demo: bool) -> None:
    """Serve on this machine: operator, agent and gateway in one process."""
    from .home import serve

    serve(demo=demo)


@main.command()
def operator() -> None:
    """Run the operator alone."""
    from llorch_operator.main import main as run

    run()


@main.command()
def agent() -> None:
    """Run a node's agent alone."""
    from llorch_agent.main import main as run

    run()


@main.command()
def gateway() -> None:
    """Run a gateway alone."""
    from llorch_gateway.main import main as run

    run()


@main.command()
@click.option("-f", "--filename", "files", multiple=True, required=True, help="YAML file, directory, or - for standard input.")
@click.option("-n", "--namespace", default=None, help="Namespace of pools that name none.")
def apply(files: tuple[str, ...], namespace: str | None) -> None:
    """Create or change pools and nodes from YAML. Nothing is written unless every file is good."""
    from . import commands

    space = namespace or _client().namespace
    try:
        objects = [
            commands.parse_manifest(where, document, space)
            for file in files
            for where, document in read(file, sys.stdin.read() if file == "-" else None)
        ]
    except ManifestError as error:
        raise Failure(str(error)) from error
    if not objects:
        raise Failure(f"{', '.join(files)}: no objects in there")
    for line in _with_store(lambda store: commands.apply(store, objects)):
        click.echo(line)


@main.command()
@click.argument("resource")
@click.argument("names", nargs=-1)
@click.option("-n", "--namespace", default=None, help="Only this namespace.")
@click.option("-o", "--output", type=click.Choice(["table", "wide", "yaml", "json", "name"]), default="table")
def get(resource: str, names: tuple[str, ...], namespace: str | None, output: str) -> None:
    """Show gpunodes or gpupools, with kubectl's columns."""
    from . import commands

    kind = _kind(resource)
    click.echo(_with_store(lambda store: commands.get(store, kind, names, namespace, output)))


@main.command()
@click.argument("resource", required=False)
@click.argument("names", nargs=-1)
@click.option("-f", "--filename", "files", multiple=True, help="Delete what these files name.")
@click.option("-n", "--namespace", default=None, help="Namespace of the pools.")
def delete(resource: str | None, names: tuple[str, ...], files: tuple[str, ...], namespace: str | None) -> None:
    """Delete pools or nodes by name or by file."""
    from . import commands

    space = namespace or _client().namespace
    targets: list[tuple[Any, str, str]] = []
    try:
        for file in files:
            for _, document in read(file, sys.stdin.read() if file == "-" else None):
                targets.append(
                    (_kind(document["kind"]), document["metadata"]["name"], document["metadata"].get("namespace", space))
                )
    except ManifestError as error:
        raise Failure(str(error)) from error
    if resource is not None:
        targets += [(_kind(resource), name, space) for name in names]
    if not targets:
        raise Failure("name what to delete: llorch delete gpupool NAME, or -f FILE")

    async def work(store: Any) -> list[str]:
        return [line for kind, name, where in targets for line in await commands.delete(store, kind, [name], where)]

    for line in _with_store(work):
        click.echo(line)


@main.command()
@click.argument("what", metavar="REPLICA|pool/NAME")
@click.option("-n", "--lines", default=100, show_default=True, type=click.IntRange(0, 10_000), help="How many of the last lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option("--agent", default=None, metavar="URL", help="Agent to ask, instead of the address that the node says.")
def logs(what: str, lines: int, follow: bool, agent: str | None) -> None:
    """Show what the engine of a replica wrote, or the engines of a pool."""
    from . import logs as engine_logs

    def write(text: bytes) -> None:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    async def work(store: Any) -> None:
        sources = await engine_logs.find(store, what, agent)
        await engine_logs.read(sources, lines=lines, follow=follow, token=_client().token, write=write)

    try:
        _with_store(work)
    except engine_logs.LogsError as error:
        raise Failure(str(error)) from error
    except KeyboardInterrupt:
        return


@main.command()
@click.argument("prompt", nargs=-1)
@click.option("-m", "--model", default=None, help="Pool to talk to; the first one that is served by default.")
@click.option("--max-tokens", default=256, show_default=True)
def chat(prompt: tuple[str, ...], model: str | None, max_tokens: int) -> None:
    """Talk to a pool: one question from the arguments, or line by line."""
    from .chat import ChatError, models, stream

    url = _client().url.rstrip("/")

    def ask(work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        try:
            return asyncio.run(run())
        except ChatError as error:
            raise Failure(str(error)) from error

    if model is None:
        served = ask(models(url))
        if not served:
            raise Failure(f"{url} serves no model yet: llorch apply -f pool.yaml")
        model = served[0]
    history: list[dict[str, str]] = []
    while True:
        question = " ".join(prompt) if prompt else click.prompt("you", prompt_suffix="> ", default="", show_default=False)
        if not question:
            return
        history.append({"role": "user", "content": question})
        answer: list[str] = []

        def write(piece: str, into: list[str] = answer) -> None:
            into.append(piece)
            click.echo(piece, nl=False)

        figures = ask(stream(url, model, history, max_tokens, write))
        click.echo(f"\n[{model}: {figures}]", err=True)
        history.append({"role": "assistant", "content": "".join(answer)})
        if prompt:
            return
