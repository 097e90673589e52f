"""Finds the files of an `hf:` source: revision to commit, the file where none is named, sizes and hashes of LFS.

The Hub is asked through huggingface_hub, with its endpoint, its errors and its offline switch; the bytes come by the same
ranged, resumed and verified requests as those of every other source.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from yarl import URL

from .access import SourceAccess
from .core.errors import BadModel, ModelError, ModelNotAvailable, UnsupportedSource
from .core.source import HfSource
from .core.split import part_name
from .https import Target
from .locate import Remote, RemotePart, parts_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")
ASK_SECONDS = 10.0
"""For each answer of the Hub's API."""
SHOWN_CANDIDATES = 12
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class _Hub:
    endpoint: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def hint(self) -> str:
        return "the token does not open it" if self.token else "no HF_TOKEN is set"


async def locate_hf(source: HfSource, access: SourceAccess) -> Remote:
    """The files of `source` at a commit. Raises ModelError, in one line."""
    endpoint = access.hub_endpoint
    hub = _Hub(str(endpoint).rstrip("/"), access.hub_token())
    return await _in_daemon(lambda: _locate(source, hub, access))


def _locate(source: HfSource, hub: _Hub, access: SourceAccess) -> Remote:
    try:
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise UnsupportedSource(f"{source}: needs the package huggingface_hub: {error}") from error
    token: str | bool = hub.token or False
    pinned = source
    try:
        info = HfApi(endpoint=hub.endpoint, token=token).model_info(
            source.repo, revision=source.revision or None, files_metadata=True, timeout=ASK_SECONDS
        )
        if not info.sha:
            raise ModelNotAvailable(f"{source}: {hub.endpoint} does not say which commit that is")
        siblings = {each.rfilename: each for each in info.siblings or ()}
        pinned = HfSource(source.repo, source.file or _only_model(source, list(siblings)), info.sha)
        names = parts_of(str(source), pinned.file)
        _check_there(source, names, siblings)
        urls = [hf_hub_url(source.repo, name, revision=info.sha, endpoint=hub.endpoint) for name in names]
        # Gated repositories list their files to everybody: whether the file may be read shows only here.
        told = get_hf_file_metadata(urls[0], token=token, timeout=ASK_SECONDS, endpoint=hub.endpoint)
        sha256 = _sha256(siblings[names[0]])
        if sha256 and told.etag and len(told.etag) == 64 and told.etag != sha256:
            raise ModelNotAvailable(f"{pinned}: the Hub tells of two sha256, {sha256} and {told.etag}", retryable=True)
    except (ModelError, ImportError):
        raise
    except HFValidationError as error:
        raise UnsupportedSource(f"{source}: {_line(error)}") from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise _refused(source, pinned, hub, error) from error
    except Exception as error:
        # What its HTTP client raises is another library's with every version.
        raise _unreachable(source, hub, error) from error

    def target(name: str, url: str) -> Target:
        return Target(
            URL(url, encoded=True),
            str(HfSource(source.repo, name, info.sha or "")),
            lambda _: hub.headers,
            plain=hub.endpoint.startswith("http://"),
            guard=access.guard(),
            hint=hub.hint,
        )

    parts = (
        RemotePart(target(name, url), _sha256(siblings[name]), siblings[name].blob_id or "")
        for name, url in zip(names, urls, strict=True)
    )
    return Remote(pinned, tuple(parts))


def _only_model(source: HfSource, names: list[str]) -> str:
    """The one GGUF model of the repository. Raises ModelNotAvailable with the candidates where there are none or several."""
    found = []
    for name in sorted(names):
        base = name.rpartition("/")[2].lower()
        part = part_name(name)
        if base.endswith(".gguf") and "mmproj" not in base and (part is None or part.number == 1):
            found.append(name)
    if len(found) == 1:
        return found[0]
    if not found:
        raise BadModel(f"{source}: there is no GGUF file in it")
    more = f" and {len(found) - SHOWN_CANDIDATES} more" if len(found) > SHOWN_CANDIDATES else ""
    shown = ", ".join(found[:SHOWN_CANDIDATES])
    raise ModelNotAvailable(
        f"{source}: name one of its {len(found)} models, like hf:{source.repo}/{found[0]}: {shown}{more}"[:500]
    )


def _check_there(source: HfSource, names: tuple[str, ...], siblings: dict[str, RepoSibling]) -> None:
    missing = [name for name in names if name not in siblings]
    if not missing:
        return
    if len(names) > 1 and len(missing) < len(names):
        raise BadModel(f"{source}: {len(missing)} of {len(names)} parts are missing, the first is {missing[0]}")
    models = sorted(name for name in siblings if name.lower().endswith(".gguf"))
    there = f"it has {', '.join(models[:SHOWN_CANDIDATES])}" if models else "there is no GGUF file in it"
    raise ModelNotAvailable(f"{source}: no such file: {missing[0]}; {there}"[:500])


def _sha256(sibling: RepoSibling) -> str:
    return sibling.lfs.sha256 if sibling.lfs is not None else ""


def _refused(source: HfSource, pinned: HfSource, hub: _Hub, error: Exception) -> ModelError:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return ModelNotAvailable(
                f"{source}: the repository is gated and {hub.hint}: its terms are accepted at {hub.endpoint}/{source.repo}"
            )
        case errors.RevisionNotFoundError():
            return ModelNotAvailable(f"{source}: no such revision: {source.revision}")
        case errors.RepositoryNotFoundError():
            return ModelNotAvailable(f"{source}: no such repository, or it is private and {hub.hint}")
        case errors.DisabledRepoError():
            return ModelNotAvailable(f"{source}: the repository is disabled")
        case errors.EntryNotFoundError():
            return ModelNotAvailable(f"{source}: no such file: {pinned.file}")
        case errors.HfHubHTTPError():
            status = error.response.status_code if error.response is not None else 0
            return ModelNotAvailable(f"{source}: {hub.endpoint} answers {status}", retryable=status in _BUSY)
    return ModelNotAvailable(f"{source}: {_line(error)}", retryable=True)


def _unreachable(source: HfSource, hub: _Hub, error: Exception) -> ModelError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return ModelNotAvailable(f"{source}: HF_HUB_OFFLINE is set, so the Hub is not asked")
    return ModelNotAvailable(f"{source}: {hub.endpoint} cannot be asked: {_line(error)}", retryable=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


async def _in_daemon(work: Callable[[], T]) -> T:
    """In a thread that nobody waits for when the caller is cancelled: it holds nothing, and its requests are bounded."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(outcome: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(outcome)  # type: ignore[arg-type]

    def run() -> None:
        outcome: T | None = None
        failed: BaseException | None = None
        try:
            outcome = work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            failed = error
        try:
            loop.call_soon_threadsafe(deliver, outcome, failed)
        except RuntimeError:
            pass  # the loop has ended, and with it whoever asked

    threading.Thread(target=run, name="hub", daemon=True).start()
    return await future
