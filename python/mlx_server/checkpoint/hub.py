"""Models from the Hugging Face Hub, in the cache that all of its users share (HF_HOME, HF_HUB_CACHE).

huggingface-hub knows the hub's interface, tokens, endpoints, offline mode and the cache. But it does not check the
content of what it downloads, does not go on where another process was interrupted, and waits for ever on a hub that
stalls. So the bytes are fetched here, into the cache's blobs; a blob gets its name only after its hash was checked.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx2
import msgspec
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but not as mypy wants it
    WeakFileLock,
    build_hf_headers,
    filter_repo_objects,
    hf_raise_for_status,
)

from mlx_server import __version__
from mlx_server.checkpoint.json_file import read_json
from mlx_server.checkpoint.model_config import check_model_type
from mlx_server.checkpoint.progress import Advance, Progress
from mlx_server.errors import ModelLoadError

WANTED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "modules.json",  # of models for embeddings
    "1_Pooling/config.json",
)
UNWANTED = ("*/*.safetensors", "consolidated*")  # other forms of the same weights

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
RETRY_STATUS_CODES = (408, 429, 500, 502, 503, 504)
SPACE_MARGIN = 1.05
PARTIAL_CONTENT = 206
_CHUNK_BYTES = 1 << 20
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")

# Without this the library looks for signs of coding agents, asks the hub for a list of them, and reports what it found.
constants.HF_HUB_DISABLE_TELEMETRY = True

_USER_AGENT = f"mlx-server/{__version__}"
_T = TypeVar("_T")


class _File(msgspec.Struct, frozen=True):
    """A file of a repository."""

    name: str
    size_bytes: int
    blob_id: str  # its name among the cache's blobs: the SHA-256 of an LFS file, else Git's hash
    blob: Path
    url: str

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.blob_id}.mlx-server.incomplete")

    def partial_bytes(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0


class _CutError(Exception):
    """A download ended before the file did."""


_Transient = (httpx2.RequestError, HfHubHTTPError, _CutError)


def fetch_from_hub(model_id: str, progress: Progress) -> Path:
    """The directory with a model's files, downloaded as far as they are not in the cache.

    If the hub can't be reached, a copy in the cache will do. ModelLoadError is one sentence on what went wrong.
    """
    try:
        commit, files = _ask(model_id)
        _download(model_id, files, progress)
        return _link(model_id, commit, files)
    except (*_Transient, OfflineModeIsEnabled) as error:
        return _from_cache(model_id, error)
    except OSError as error:
        fault = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or "unknown error"
        raise ModelLoadError(f"{model_id} can't be stored in {constants.HF_HUB_CACHE}: {fault}") from error


def _ask(model_id: str) -> tuple[str, list[_File]]:
    """The commit that `main` is now, and its files that are needed."""
    api = HfApi(user_agent=_USER_AGENT)
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = _retry(lambda: api.model_info(model_id, files_metadata=True, timeout=timeout_s))
        commit = _checked_hash(info.sha)
        return commit, _needed_files(model_id, commit, info.siblings or [])
    except HFValidationError:
        raise ModelLoadError(f"{model_id!r} is no Hugging Face id") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(
            f"{constants.ENDPOINT} does not answer as the Hugging Face Hub does; is a login page or a proxy in between?"
        ) from error


def _needed_files(model_id: str, commit: str, repo_files: list[RepoSibling]) -> list[_File]:
    """What is needed of a repository. ModelLoadError if there are no weights among it."""
    siblings = {sibling.rfilename: sibling for sibling in repo_files}
    names = list(filter_repo_objects(siblings, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelLoadError(f"{model_id} has no *.safetensors weights; huggingface.co/mlx-community has MLX models")
    files = []
    for name in names:
        sibling = siblings[name]
        blob_id = _checked_hash(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        size_bytes = int(sibling.size or 0)
        url = hf_hub_url(model_id, name, revision=commit)
        files.append(_File(name, size_bytes, blob_id, _folder(model_id) / "blobs" / blob_id, url))
    return files


def _checked_hash(value: object) -> str:
    """What names a file or folder of the cache must not be a path."""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(value)
    return value


def _download(model_id: str, files: list[_File], progress: Progress) -> None:
    """Bring all files into the cache's blobs, first the one that tells whether the model can be served."""
    missing = [file for file in files if not file.blob.exists()]
    if not missing:
        return
    _check_space(model_id, missing)
    total_bytes, done_bytes = sum(file.size_bytes for file in missing), sum(file.partial_bytes() for file in missing)
    with progress.task(f"Downloading {model_id}", total_bytes, done_bytes) as advance:
        for file in sorted(files, key=lambda file: file.name != "config.json"):
            if file in missing:
                _fetch_blob(model_id, file, advance)
            if file.name == "config.json":
                check_model_type(read_json(file.blob), model_id)


def _check_space(model_id: str, files: list[_File]) -> None:
    needed = int(sum(file.size_bytes - file.partial_bytes() for file in files) * SPACE_MARGIN)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise ModelLoadError(
            f"{model_id} needs {needed / 1e9:.2f} GB in {cache}, but only {free / 1e9:.2f} GB are free; "
            "make room, or set HF_HUB_CACHE to a folder on another disk"
        )


def _fetch_blob(model_id: str, file: _File, advance: Advance) -> None:
    """Download a file, going on where an earlier attempt ended, check its hash, and give it its name in the cache."""
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / _folder(model_id).name / f"{file.blob_id}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if file.blob.exists():  # another process was faster
            return
        _retry(lambda: _append(file, advance), file.partial_bytes)
        if _hash(file) != file.blob_id:
            file.partial.unlink()
            raise ModelLoadError(f"{file.name} of {model_id} arrived damaged (wrong hash); try again")
        file.partial.replace(file.blob)


def _append(file: _File, advance: Advance) -> None:
    """Download what the partial file lacks."""
    with file.partial.open("ab") as target:
        if target.tell() < file.size_bytes:
            _stream(file, target, advance)
        target.flush()
        os.fsync(target.fileno())
        if target.tell() < file.size_bytes:
            raise _CutError(file.url)


def _stream(file: _File, target: BinaryIO, advance: Advance) -> None:
    have = target.tell()
    headers = build_hf_headers(user_agent=_USER_AGENT) | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without a byte
    with get_session().stream("GET", file.url, headers=headers, timeout=timeout_s) as response:
        _raise_for_status(response)
        if have and response.status_code != PARTIAL_CONTENT:  # the whole file once more
            target.seek(0)
            target.truncate()
            advance(-have)
        for chunk in response.iter_bytes():  # as they come, so that a cut loses none
            target.write(chunk)
            advance(len(chunk))
            if target.tell() > file.size_bytes:  # its hash will be wrong
                break


def _raise_for_status(response: httpx2.Response) -> None:
    if response.is_error:
        response.read()  # the error's text is in the body
    hf_raise_for_status(response)


def _git_hash(size_bytes: int) -> "hashlib._Hash":
    return hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)


def _hash(file: _File) -> str:
    """The hash that names a blob: SHA-256 for LFS files, for others Git's SHA-1 with the size before the content."""
    digest = hashlib.sha256() if len(file.blob_id) == 64 else _git_hash(file.size_bytes)
    with file.partial.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _link(model_id: str, commit: str, files: list[_File]) -> Path:
    """The snapshot's folder with a link to each blob, and the note that it is what `main` means."""
    snapshot = _folder(model_id) / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = snapshot / file.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(file.blob, link.parent))
    ref = _folder(model_id) / "refs" / "main"
    if not ref.exists() or ref.read_text() != commit:
        ref.parent.mkdir(exist_ok=True)
        new = ref.with_name(f"main.{os.getpid()}.incomplete")
        new.write_text(commit)
        new.replace(ref)
    return snapshot


def _from_cache(model_id: str, error: Exception) -> Path:
    """The copy in the cache, when the hub can't be asked; ModelLoadError if it says no or there is no copy."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRY_STATUS_CODES:
        raise ModelLoadError(_refusal(model_id, error)) from error
    try:
        return Path(
            snapshot_download(
                model_id, local_files_only=True, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
            )
        )
    except LocalEntryNotFoundError:
        if isinstance(error, OfflineModeIsEnabled):
            fault = "HF_HUB_OFFLINE forbids to download it"
        elif isinstance(error, HfHubHTTPError):
            fault = f"{constants.ENDPOINT} answers with status {error.response.status_code}; try again later"
        else:
            fault = f"{constants.ENDPOINT} can't be reached or breaks off; try again, and the download goes on"
        raise ModelLoadError(f"{model_id} is not complete in the cache, and {fault}") from error


def _refusal(model_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{model_id} is gated: accept its terms at {constants.ENDPOINT}/{model_id} and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{model_id} is not on {constants.ENDPOINT}, or it is private: check the name, or set HF_TOKEN"
    if status in (401, 403):
        return f"{constants.ENDPOINT} refuses access to {model_id} (status {status}); check HF_TOKEN"
    return f"{constants.ENDPOINT} answers with status {status} when asked for {model_id}"


def _folder(model_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model_id, repo_type="model")


def _retry(action: Callable[[], _T], done_bytes: Callable[[], int] = lambda: 0) -> _T:
    """What `action` returns. If it fails for a reason that may pass, it is tried again, later each time, and given up
    after as many failures without a byte of progress as there are delays."""
    failures, last_bytes = 0, done_bytes()
    while True:
        try:
            return action()
        except _Transient as error:
            if done_bytes() > last_bytes:
                failures, last_bytes = 0, done_bytes()
            if failures == len(RETRY_DELAYS_S) or not _may_pass(error):
                raise
        time.sleep(RETRY_DELAYS_S[failures])
        failures += 1


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRY_STATUS_CODES
    return not isinstance(error, httpx2.ConnectError)  # no network, or nobody listens: say so at once
