"""The Hugging Face Hub: where a source comes from and a finished checkpoint may go."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id


# What a checkpoint of other shards has left in a repository would be loaded in place of the new one.
WEIGHTS = ("model*.safetensors*", "pytorch_model*")


def find_folder(source: str | Path, revision: str | None, allow_patterns: list[str]) -> tuple[Path, str | None]:
    """Return the folder of a source, downloaded if it is a model id, and then also its commit.

    Args:
        source: folder or model id.
        revision: branch, tag or commit on the Hub; None for its main branch.
        allow_patterns: files to download.

    Raises:
        ValueError: if there is no such folder or model, or a folder is asked for a revision.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder, which has no revision {revision}; leave the revision out")
        return folder.absolute(), None
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) or folder.exists():
        raise ValueError(f"the source {source} is not a folder")
    try:
        snapshot = Path(snapshot_download(str(source), revision=revision, allow_patterns=allow_patterns))
    except Exception as error:  # whatever the network, the Hub's answer or its cache come up with
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} is neither a folder nor a model that the Hub hands out: {reason}") from error
    return snapshot, snapshot.name


def check_repo_id(repo_id: str | None) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ValueError: if it cannot.
    """
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            raise ValueError(f"push_to_hub names no repository: {error}") from error


def push_folder(folder: Path, repo_id: str, message: str) -> None:
    """Upload a finished checkpoint; a repository that does not exist yet is created, private.

    Of a repository that exists, weights that the checkpoint replaces under other names are deleted in the same commit.

    Raises:
        ValueError: if the upload fails; the folder stays.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=_replaced_files(folder)
        )
    except Exception as error:  # whatever the network or the Hub's answer come up with
        raise ValueError(
            f"{folder} is finished, but uploading it to {repo_id} failed: {error}; {_how_to_upload(folder, repo_id)}"
        ) from error


@contextlib.contextmanager
def interruptible_upload(folder: Path, repo_id: str | None) -> Iterator[None]:
    """Let an interrupt in the block say what is left to do: the checkpoint is finished, and stays.

    Args:
        folder: the finished checkpoint.
        repo_id: where the block uploads it; None if nowhere.

    Raises:
        KeyboardInterrupt: with a message, where one without came.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        upload = f", but its upload to {repo_id} is not; {_how_to_upload(folder, repo_id)}" if repo_id else ""
        raise KeyboardInterrupt(f"interrupted; {folder} is finished{upload}") from interrupt


def _replaced_files(folder: Path) -> list[str]:
    """Return patterns of the files that a checkpoint replaces; an adapter's replace nothing of a model beside them."""
    return list(WEIGHTS) if any(folder.glob(WEIGHTS[0])) else []


def _how_to_upload(folder: Path, repo_id: str) -> str:
    delete = [word for pattern in _replaced_files(folder) for word in ("--delete", pattern)]
    return f"upload it with: {shlex.join(['hf', 'upload', '--private', repo_id, str(folder), '.', *delete])}"
