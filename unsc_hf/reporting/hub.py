"""Publish a finished run on the Hub: one commit, and nothing private.

The commit holds weights or adapter, processor, card, report, results and pictures. It names the head that was read
before as its parent, so it can never overwrite another writer's commit. Only files with public names leave, and each is
searched for tokens and local paths first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError

from ..errors import UNSCError, first_line
from .run_folder import PUBLIC, RESULTS, UNFINISHED, WEIGHTS, matches

logger = logging.getLogger(__name__)

# Other weights in the repository would still remember what this run forgot.
_STALE = (
    *WEIGHTS, "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "tf_model.h5",
    "flax_model.msgpack",
)  # fmt: skip

# The words of a vocabulary may look like a token or a path.
_VOCABULARY = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")
_HOME = re.compile(rb"(?<![\w.:/+=-])(?:/(?:home|Users|root)/[\w.-]+/|[A-Za-z]:(?:\\\\?|/)Users(?:\\\\?|/))")


def public_files(
    folder: str | os.PathLike[str], *, base_model: str | None = None, secrets: Sequence[str] = ()
) -> dict[str, Path | bytes]:
    """The files of a finished run that may be published, by name: a path, or the content that replaces a file.

    Args:
        base_model: Hub id to write into an adapter's config, where it names a local folder.
        secrets: strings that must not leave, such as the token.

    Raises:
        UNSCError: the folder holds no finished run, a file holds a token or a local path, or the card's metadata cannot
            be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UNSCError(f"folder: {folder} does not exist; name the output folder of a finished run.")
    paths = sorted(path for path in root.iterdir() if path.is_file() and not path.is_symlink())
    files: dict[str, Path | bytes] = {path.name: path for path in paths if matches(path.name, PUBLIC)}
    if (root / UNFINISHED).exists() and not (root / RESULTS).exists():
        raise UNSCError(f"folder: {root} holds an interrupted run; start that run again, it continues from there.")
    weights = any(matches(name, ("model*.safetensors", "adapter_model.safetensors")) for name in files)
    for part, present in (("README.md", "README.md" in files), ("weights (model or adapter)", weights)):
        if not present:
            raise UNSCError(f"folder: {root} holds no {part}; name the output folder of a finished run.")
    if base_model is not None and "adapter_config.json" in files:
        config = json.loads((root / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_model
        files["adapter_config.json"] = json.dumps(config, indent=2, sort_keys=True).encode()
    known = [secret for secret in (*secrets, os.environ.get("HF_TOKEN", "")) if len(secret) >= 6]
    local = {str(place) for place in (root.resolve(), Path.cwd(), Path.home(), tempfile.gettempdir())} - {"/"}
    for name, source in files.items():
        _check_private(name, _read_text(source), known, local)
    try:
        ModelCard((root / "README.md").read_text(encoding="utf-8")).data.to_dict()
    except Exception as error:  # a YAML reader raises errors of many kinds
        raise UNSCError(
            f"README.md: its metadata cannot be read ({first_line(error)}); correct the block between the `---` lines."
        ) from error
    return files


def _read_text(source: Path | bytes) -> bytes:
    """Content of a file; of safetensors only the header, since the rest is numbers."""
    if isinstance(source, bytes):
        return source
    if source.suffix != ".safetensors":
        return source.read_bytes()
    with source.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), source.stat().st_size))


def _check_private(name: str, content: bytes, secrets: Sequence[str], local: set[str]) -> None:
    if any(secret.encode() in content for secret in secrets):
        raise UNSCError(f"{name}: holds the token; remove it, and revoke the token if the file was ever shared.")
    if matches(name, _VOCABULARY):
        return
    if _TOKEN.search(content):
        raise UNSCError(f"{name}: holds what looks like a Hub token; remove it, and revoke the token.")
    places = [place for place in local if place.encode() + b"/" in content or place.encode() + b'"' in content]
    places += [match.decode(errors="replace") for match in _HOME.findall(content)]
    if places and name == "adapter_config.json":
        raise UNSCError(f"{name}: names its base model by a local folder ({places[0]}); give base_model, its Hub id.")
    if places:
        raise UNSCError(f"{name}: names a local folder ({places[0]}); remove it before publishing.")


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Unlearned model",
    base_model: str | None = None,
) -> CommitInfo:
    """Publish a finished run in one commit, and return it; where everything is there already, no commit is made.

    The same commit deletes other weights from the repository, because they still remember. Its history keeps them.

    Args:
        folder: output folder of a run.
        repo_id: "user/name", or "name" in the token's own namespace.
        private: visibility of a new repository; None is the account's default.
        revision: branch, created if missing; "main" when None.
        token: with write access; the stored one when None.
        message: commit message.
        base_model: see `public_files`.

    Raises:
        UNSCError: a file must not leave (see `public_files`), another commit landed in between, or the Hub refused.
    """
    files = public_files(folder, base_model=base_model, secrets=[token] if token else [])
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files["README.md"] = _card_of(repo, (Path(folder) / "README.md").read_text(encoding="utf-8")).encode()
        if revision not in (None, "main"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        head = api.model_info(repo, revision=revision)
        present = {file.rfilename for file in head.siblings or ()} - set(files)
        stale = sorted(name for name in present if matches(name, _STALE))
        if stale:
            logger.warning("Deleting other weights from %s: %s. Its history keeps them.", repo, ", ".join(stale))
        additions = [CommitOperationAdd(name, source) for name, source in files.items()]
        deletions = [CommitOperationDelete(name) for name in stale]
        # The client leaves out unchanged files, and makes no commit where nothing changed.
        return api.create_commit(
            repo, [*additions, *deletions], commit_message=message, revision=revision, parent_commit=head.sha
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # HTTPError: of the client's HTTP library
        raise UNSCError(_explain(error, repo_id, folder)) from error


def _card_of(repo_id: str, card: str) -> str:
    """A card whose example loads the model from its repository, not from the folder where it was made."""
    names = re.findall(r'from_pretrained\(("[^"\n]*")', card)
    return card.replace(names[-1], json.dumps(repo_id)) if names else card


def _status(error: BaseException | None) -> int | None:
    """HTTP status of an error, or of the error that caused it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return int(error.response.status_code)
        error = error.__cause__ or error.__context__
    return None


def _explain(error: Exception, repo_id: str, folder: str | os.PathLike[str]) -> str:
    """One line: what happened, and what to do."""
    status, detail = _status(error), first_line(error)
    again = f"publish again with `unsc push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}`"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        way = "log in with `hf auth login`, or give hub_token"
        return f"hub_token: it is not accepted, or may not see {repo_id}; {way}."
    if isinstance(error, HFValidationError):
        return f"hub_model_id: {repo_id!r} is not a valid repository name ({detail}); give user/name."
    if status == 403:
        return f"hub_token: the token may not write to {repo_id}; give a token with write access."
    if status in (402, 507) or re.search("quota|storage limit", str(error), re.IGNORECASE):
        return f"hub_model_id: the account's storage is full ({detail}); free some, then {again}."
    if status in (409, 412):
        return f"hub_model_id: somebody else changed {repo_id} in between, nothing was overwritten; look, then {again}."
    if isinstance(error, ValueError) and "metadata" in detail.lower():
        return f"README.md: the Hub refuses its metadata ({detail}); correct the block between the `---` lines."
    return f"push_to_hub: the upload failed ({detail}); the run is complete: {again}."
