"""Publishing a finished run on the Hub: one commit, nothing private, and a second try that repairs what a first one left.

The files of one run (weights or adapter, processor, card, report, results, pictures) go in a single `create_commit`, on top of the
head that was seen before, so a reader finds either the old state or the whole new one. What is not on the list of public
names stays at home, and what is on it is read once more before it leaves.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import UNSCError, first_line
from .run_folder import PUBLIC, RESULTS, UNFINISHED, WEIGHTS

logger = logging.getLogger(__name__)


# Weights of other runs or formats: left in the repository they would still remember.
_STALE = (*WEIGHTS, "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack")  # fmt: skip


_VOCABULARY = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")


_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")


_TRANSIENT = (408, 429, 500, 502, 503, 504)


_TRIES = 3


_WAIT = 2.0  # seconds before the second try, doubled before each further one


_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")


_HOME = re.compile(rb"(?<![\w.:/+=-])(?:/(?:home|Users|root)/[\w.-]+/|[A-Za-z]:(?:\\\\?|/)Users(?:\\\\?|/))")


@dataclass(frozen=True)
class Publication:
    """What would be uploaded: file names in the repository, and the bytes or files behind them."""

    files: dict[str, Path | bytes]

    def read(self, name: str) -> bytes:
        """Content of a file; of safetensors the header, which alone holds text."""
        source = self.files[name]
        if isinstance(source, bytes):
            return source
        if not name.endswith(".safetensors"):
            return source.read_bytes()
        with source.open("rb") as file:
            return file.read(min(int.from_bytes(file.read(8), "little"), source.stat().st_size))

    def digests(self, name: str) -> tuple[str, str]:
        """SHA-256 of a file, and git's hash of it as a blob."""
        source = self.files[name]
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        plain, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            while chunk := file.read(1 << 20):
                plain.update(chunk)
                git.update(chunk)
        return plain.hexdigest(), git.hexdigest()


def publication(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    include: Sequence[str] = (),
    secrets: Sequence[str] = (),
) -> Publication:
    """The public files of a finished run, checked.

    Args:
        folder: output folder of a run.
        base_model: Hub id to write into an adapter's config, where it names a folder.
        include: further files or folders below `folder`, by name; nothing else leaves. Statistics describe the retained rows.
        secrets: strings that must not leave, such as the token.

    Raises:
        UNSCError: no finished run, a pickle, a token or a path of this machine in a file, metadata that the Hub would refuse.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UNSCError(f"folder: {folder} does not exist; name the output folder of a finished run.")
    names = sorted(path.name for path in root.iterdir() if path.is_file() and not path.is_symlink())
    files: dict[str, Path | bytes] = {name: root / name for name in names if _matches(name, PUBLIC)}
    for name in include:
        files.update(_included(root, name))
    if (root / UNFINISHED).exists() and not (root / RESULTS).exists():
        raise UNSCError(f"folder: {root} holds what a killed run has left; start the run again, it goes on from there.")
    if "README.md" not in files:
        raise UNSCError(f"folder: {root} holds no README.md; name the output folder of a finished run.")
    if not any(_matches(name, ("model*.safetensors", "adapter_model.safetensors")) for name in files):
        raise UNSCError(
            f"folder: {root} holds no weights (model.safetensors or adapter_model.safetensors); was the run finished?"
        )
    if base_model is not None and "adapter_config.json" in files:
        config = json.loads((root / "adapter_config.json").read_text(encoding="utf-8"))
        files["adapter_config.json"] = json.dumps(
            {**config, "base_model_name_or_path": base_model}, indent=2, sort_keys=True
        ).encode()
    found = Publication(files)
    known = [s for s in (*secrets, os.environ.get("HF_TOKEN", "")) if len(s) >= 6]
    for name in files:
        _check_private(name, found, root, known)
    try:
        ModelCard(found.read("README.md").decode("utf-8")).data.to_dict()
    except Exception as error:  # whatever a YAML reader raises
        raise UNSCError(
            f"README.md: its metadata cannot be read ({first_line(error)}); mend the block between the lines `---`."
        ) from error
    return found  # fmt: skip


def _included(root: Path, name: str) -> dict[str, Path | bytes]:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.exists():
        raise UNSCError(f"include: {name!r} is not in {root}; name a file or folder of the run.")
    logger.warning("%s was asked for and will be public: statistics tell about the retained rows.", name)
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(root.resolve())): p for p in found}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_private(name: str, found: Publication, root: Path, secrets: Sequence[str]) -> None:
    """Refuse a file that would give something away."""
    if name.endswith(_PICKLES):
        raise UNSCError(f"{name}: is a pickle or raw array; publish safetensors and text only.")
    content = found.read(name)
    for secret in secrets:
        if secret.encode() in content:
            raise UNSCError(f"{name}: holds the token; take it out, and revoke that token if the file was ever shared.")
    if _matches(name, _VOCABULARY):
        return  # words of a language may look like anything
    if _TOKEN.search(content):
        raise UNSCError(f"{name}: holds what looks like a Hub token; take it out, and revoke it.")
    here = {str(root.resolve()), str(Path.cwd()), str(Path.home()), tempfile.gettempdir()} - {"/"}
    for place in here:
        if place.encode() + b"/" in content or place.encode() + b'"' in content:
            raise UNSCError(_path_found(name, place))
    home = _HOME.search(content)
    if home:
        raise UNSCError(_path_found(name, home.group().decode(errors="replace")))


def _path_found(name: str, place: str) -> str:
    if name == "adapter_config.json":
        return (
            f"{name}: names its base model by a folder of this machine ({place}); give base_model, its id on the Hub."
        )
    return f"{name}: names a folder of this machine ({place}); take it out before publishing."


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Unlearned model",
    base_model: str | None = None,
    include: Sequence[str] = (),
) -> CommitInfo:
    """Publish a finished run in one commit, and go on where an earlier try failed; a second call changes nothing.

    Args:
        folder: output folder of a run.
        repo_id: "user/name", or "name" in the token's own space.
        private: visibility of a repository that is made now; None is the account's default.
        revision: branch, made when it is not there; "main" when None.
        token: with the right to write; the stored one when None.
        message: of the commit.
        base_model, include: see `publication`.

    Raises:
        UNSCError: what must not leave (see `publication`), or a refusal of the Hub, in one line that says what to do.
    """
    api = HfApi(token=token)
    found = publication(folder, base_model=base_model, include=include, secrets=[token] if token else [])
    for attempt in range(_TRIES):
        try:
            return _publish_once(api, found, repo_id, private, revision, message)
        except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            if attempt + 1 == _TRIES or not _is_transient(error):
                raise UNSCError(_explained(error, repo_id, folder)) from error
            logger.warning("Publishing failed (%s); trying again.", first_line(error))
            time.sleep(_WAIT * 2**attempt)
    raise AssertionError


def _publish_once(
    api: HfApi, found: Publication, repo_id: str, private: bool | None, revision: str | None, message: str
) -> CommitInfo:
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision not in (None, "main"):
        api.create_branch(repo, branch=str(revision), exist_ok=True)
    parent = api.model_info(repo, revision=revision).sha
    there = _files(api, repo, revision)
    changed = [name for name in found.files if there.get(name) not in found.digests(name)]
    stale = [name for name in there if name not in found.files and _matches(name, _STALE)]
    if not changed and not stale:  # also when the answer to an earlier commit was lost on its way
        return CommitInfo(f"{api.endpoint}/{repo}/commit/{parent}", message, "", str(parent), _endpoint=api.endpoint)
    if stale:
        logger.warning("Other weights in %s are removed: %s. Its history still holds them.", repo, ", ".join(stale))
    operations: list[Any] = [CommitOperationAdd(name, _source(found.files[name])) for name in changed]
    operations += [CommitOperationDelete(name) for name in stale]
    info: CommitInfo = api.create_commit(
        repo, operations, commit_message=message, revision=revision, parent_commit=parent
    )
    return info


def _source(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _files(api: HfApi, repo: str, revision: str | None) -> dict[str, str]:
    """SHA-256 of each LFS file and git hash of each other one, by name."""
    entries = [e for e in api.list_repo_tree(repo, recursive=True, revision=revision) if isinstance(e, RepoFile)]
    return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries}


def _status(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return int(error.response.status_code)
        error = error.__cause__ or error.__context__
    return None


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        # 412: the head moved, perhaps by our own commit whose answer was lost; 409: another commit at the same time.
        return status in (*_TRANSIENT, 409, 412)
    return isinstance(error, (httpx2.TransportError, ConnectionError, json.JSONDecodeError))


def _explained(error: BaseException, repo_id: str, folder: str | os.PathLike[str]) -> str:
    """One line: what happened, and what to do."""
    status, said = _status(error), first_line(error)
    again = f"the run is complete in {folder}: publish it later with `python recipes/push.py {folder} --hub_model_id {repo_id}`"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return f"hub_token: the Hub does not accept the token, or it may not see {repo_id}; log in with `hf auth login`, or give hub_token."
    if isinstance(error, RevisionNotFoundError):
        return f"hub_revision: {repo_id} has no such branch, and it could not be made; {again}."
    if isinstance(error, HFValidationError):
        return f"hub_model_id: {repo_id!r} is no name of a repository ({said})."
    if status == 402 or status == 507 or "quota" in str(error).lower() or "storage limit" in str(error).lower():
        return f"hub_model_id: the account's storage is full ({said}); make room, then {again}."
    if status == 403:
        return f"hub_token: the token may not write to {repo_id}; give one with the right to write there."
    if status in (409, 412):
        return f"hub_model_id: {repo_id} is being changed by somebody else; look at it, then {again}."
    if status == 429:
        return f"push_to_hub: the Hub asks to slow down; wait, then {again}."
    if isinstance(error, ValueError) and "metadata" in said.lower():
        return f"README.md: the Hub refuses its metadata ({said}); mend the block between the lines `---`."
    if status is not None and status >= 500:
        return f"push_to_hub: the Hub failed ({status}); {again}."
    if isinstance(error, (httpx2.TransportError, ConnectionError)):
        return f"push_to_hub: the Hub cannot be reached ({said}); {again}."
    return f"push_to_hub: {said} {again[0].upper()}{again[1:]}."
