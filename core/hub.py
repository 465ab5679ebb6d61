"""Folders on the Hugging Face hub: publish one, or find one by name.

Everything sidtune saves is a folder of JSON, safetensors and parquet. `push_folder` uploads such a folder,
`resolve_folder` turns "a local folder or a hub repository" into a local folder. Nothing here touches the network unless
a caller asks to publish or names something that is no local folder. Our choice; no paper is involved.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_FILES = ["*.json", "*.safetensors", "*.parquet"]


def _endpoint(endpoint: str | None) -> str | None:
    # The hub client reads HF_ENDPOINT once, at import; reading it here also honours a later change.
    return endpoint or os.environ.get("HF_ENDPOINT") or None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    path_in_repo: str | None = None,
    commit_message: str = "Upload with sidtune",
    endpoint: str | None = None,
) -> str:
    """Uploads a folder into a model repository of the hub, which is made if it does not exist.

    Args:
        folder: an existing local folder; its content is uploaded as it stands (hidden files are left out).
        repo_id: `user/name` or `name`.
        token: access token; default is the one the hub client finds.
        private: visibility of a newly made repository; default is the account's.
        path_in_repo: sub-folder of the repository, default its root.
        commit_message: message of the commit.
        endpoint: address of the hub; default HF_ENDPOINT, then the public hub.

    Returns:
        The address of the commit.

    Raises:
        DataError: the folder is missing, or the hub refused (with the hub's reason).
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist, so it cannot be pushed to '{repo_id}'; save it first.")
    api = HfApi(endpoint=_endpoint(endpoint), token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message,
            ignore_patterns=[".*", "**/.*"],
        )
    except Exception as error:  # the client raises errors of several HTTP libraries; all mean the upload did not happen
        raise DataError(
            f"The hub did not accept the upload to '{repo_id}' ({_reason(error)}); check the name, the token and the "
            "network."
        ) from error
    return str(commit.commit_url)


def push_saved(saved: Any, repo_id: str, **options: Any) -> str:
    """Uploads anything with `save_pretrained(folder)` through a scratch folder; `options` as in `push_folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "folder"
        saved.save_pretrained(folder)
        return push_folder(folder, repo_id, **options)


def resolve_folder(
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    what: str = "folder",
    **client_options: Any,
) -> Path:
    """The local folder behind a path or a hub repository id.

    A local folder always wins. Otherwise only JSON, safetensors and parquet files of the repository are fetched.

    Args:
        folder_or_repo: local folder, or repository id `user/name`.
        subfolder: folder below it that is meant.
        revision: branch, tag or commit of the repository; not allowed for a local folder.
        token, endpoint: as in `push_folder`.
        what: how messages call the thing that is looked for.
        client_options: further options of `huggingface_hub.snapshot_download`, for example `cache_dir`.

    Raises:
        DataError: neither a local folder nor a repository that can be fetched.
    """
    name = str(folder_or_repo)
    local = Path(folder_or_repo)
    if local.exists():
        if not local.is_dir():
            raise DataError(f"Expected the folder of a {what}, but {name} is a file; name the folder it lies in.")
        root = local
    elif isinstance(folder_or_repo, Path) or not _REPO_ID.fullmatch(name):
        raise DataError(f"The {what} folder {name} does not exist; check the path or run the step that writes it.")
    else:
        root = _download(name, subfolder, revision, token, endpoint, what, client_options)
    target = root / subfolder if subfolder else root
    if not target.is_dir():
        raise DataError(f"There is no folder '{subfolder}' in {name}, where the {what} was looked for; check the name.")
    return target


def _download(
    name: str,
    subfolder: str | None,
    revision: str | None,
    token: str | None,
    endpoint: str | None,
    what: str,
    client_options: dict[str, Any],
) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{pattern}" for pattern in _FILES] if subfolder else _FILES
    try:
        path = snapshot_download(
            name,
            revision=revision,
            token=token,
            endpoint=_endpoint(endpoint),
            allow_patterns=patterns,
            **client_options,
        )
    except Exception as error:  # see push_folder
        raise DataError(
            f"There is no local folder '{name}', and it could not be fetched from the hub as a {what} repository "
            f"({_reason(error)}); check the name, or the network and token if it is a repository."
        ) from error
    return Path(path)
