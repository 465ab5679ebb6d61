"""Folders on the Hugging Face hub: publish one, or find one by name.

Everything sidtune saves is a folder of JSON, safetensors and parquet. `push_folder` uploads such a folder,
`resolve_folder` turns "a local folder or a hub repository" into a local folder. Nothing here touches the network unless
a caller asks to publish or names something that is no local folder. Our choice; no paper is involved.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_FILES = ["*.json", "*.safetensors", "*.parquet", "*.model", "*.txt", "*.jinja"]


def _endpoint(endpoint: str | None) -> str | None:
    # The hub client reads HF_ENDPOINT once, at import; reading it here also honours a later change.
    return endpoint or os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of the client, which raises those of several HTTP libraries, as a DataError: `what` failed, the hub's reason."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"{what} ({reason}); check the name, the token and the network.") from error


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
    """Uploads a folder, but its hidden files, into a model repository of the hub, which is made if it does not exist.

    Args:
        repo_id: `user/name` or `name`.
        token: default is the one the hub client finds.
        private: visibility of a newly made repository; default is the account's.
        path_in_repo: sub-folder of the repository, default its root.
        endpoint: address of the hub; default HF_ENDPOINT, then the public hub.

    Returns:
        The address of the commit.

    Raises:
        DataError: the folder is missing, or the hub refused (with the hub's reason).
    """
    from huggingface_hub import HfApi

    if not Path(folder).is_dir():
        raise DataError(f"The folder {folder} does not exist, so it cannot be pushed to '{repo_id}'; save it first.")
    api, hidden = HfApi(endpoint=_endpoint(endpoint), token=token), [".*", "**/.*"]
    told = {"path_in_repo": path_in_repo, "commit_message": commit_message, "ignore_patterns": hidden}
    with _told(f"The hub did not accept the upload to '{repo_id}'"):
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **told).commit_url)


class Published:
    """Base class of what has `save_pretrained(folder)` and goes to the hub as such a folder."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes; `options` (token, private, ...) as in `push_folder`. Returns the address."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "folder"
            self.save_pretrained(folder)  # type: ignore[attr-defined]
            return push_folder(folder, repo_id, **options)


def resolve_folder(
    folder_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    endpoint: str | None = None,
    what: str = "folder",
    **client_options: Any,
) -> Path:
    """The local folder behind a path or a hub repository id.

    A local folder always wins. Otherwise only JSON, safetensors and parquet files are fetched, and
    what tokenizers save.

    Args:
        folder_or_repo: local folder, or repository id `user/name`.
        subfolder: folder below it that is meant.
        endpoint: as in `push_folder`.
        what: how messages call the thing that is looked for.
        client_options: options of `huggingface_hub.snapshot_download`, such as `revision`, `token` and `cache_dir`; a local
            folder needs none.

    Raises:
        DataError: neither a local folder nor a repository that can be fetched; a revision of a local folder.
    """
    name, root = str(folder_or_repo), Path(folder_or_repo)
    if root.exists():
        if not root.is_dir():
            raise DataError(f"Expected the folder of a {what}, but {name} is a file; name the folder it lies in.")
        if client_options.get("revision") is not None:
            raise DataError(f"{name} is a local folder, which has no revision; leave it out.")
    elif isinstance(folder_or_repo, Path) or not _REPO_ID.fullmatch(name):
        raise DataError(f"The {what} folder {name} does not exist; check the path or run the step that writes it.")
    else:
        from huggingface_hub import snapshot_download

        patterns = [f"{subfolder}/{pattern}" for pattern in _FILES] if subfolder else _FILES
        with _told(
            f"There is no local folder '{name}', and it could not be fetched from the hub as a {what} repository"
        ):
            found = snapshot_download(name, endpoint=_endpoint(endpoint), allow_patterns=patterns, **client_options)
        root = Path(found)
    target = root / subfolder if subfolder else root
    if not target.is_dir():
        raise DataError(f"There is no folder '{subfolder}' in {name}, where the {what} was looked for; check the name.")
    return target
