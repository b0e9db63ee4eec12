"""Where adapters are shared: folders, and repositories of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forgetting.deploy.card import HUB_ID
from forgetting.errors import ProblemError, line
from forgetting.io import foreign, need, refuse_outside

ADAPTER = "adapter.safetensors"
PACKAGE = "huggingface_hub", "clip-forgetting[hub]"


def push(files: Mapping[str, bytes], repo_id: str, overwrite: bool, private: bool | None) -> str:
    """Write files, contents by name, in one commit, and give its address."""
    hub = need(*PACKAGE)
    with foreign(f"{line(repo_id)} cannot be written"):
        api = hub.HfApi()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = files.keys() & set(api.list_repo_files(repo_id))
        if there and not overwrite:
            raise ProblemError(f"{repo_id} has {min(there)} already: overwrite=True replaces it")
        added = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        message = "An adapter of clip-forget and its card"
        return api.create_commit(repo_id, added, commit_message=message).commit_url


def adapter_file(place: str | Path, revision: str | None) -> Path:
    """The adapter in a folder, or a repository of which it is downloaded."""
    if (folder := Path(place)).is_dir():
        if revision is not None:
            raise ProblemError(f"{line(place)} is a folder, which has no revision: leave it out")
        refuse_outside(folder / ADAPTER, folder)
        return folder / ADAPTER
    if folder.exists() or "@" in str(place) or not HUB_ID.fullmatch(str(place)):
        raise ProblemError(f"{line(place)}: no folder, nor a name on the Hub (of a file: load)")
    hub = need(*PACKAGE)
    with foreign(f"{line(place)} cannot be fetched"):
        return Path(hub.hf_hub_download(str(place), ADAPTER, revision=revision))
