"""An adapter as people share it: a folder or a repository of the Hub with its model card."""

from __future__ import annotations

from pathlib import Path

from forgetting.adapter import Adapter, adapter_bytes
from forgetting.deploy.card import CARD, HUB_ID, Base, model_card
from forgetting.errors import ProblemError, line
from forgetting.io import atomic_path, foreign, need, refuse_outside

ADAPTER = "adapter.safetensors"
INSTALL = "clip-forgetting[hub]"


def files_of(adapter: Adapter, base: Base) -> dict[str, bytes]:
    """Names and contents of the files that are shared."""
    card = model_card(adapter, "adapter", base)
    return {ADAPTER: adapter_bytes(adapter), CARD: card.encode()}


def save(adapter: Adapter, folder: str | Path, base: Base, overwrite: bool) -> None:
    """See `Forgotten.save_pretrained`."""
    with atomic_path(folder, overwrite) as temporary:
        temporary.mkdir()
        for name, content in files_of(adapter, base).items():
            (temporary / name).write_bytes(content)


def adapter_file(place: str | Path, revision: str | None) -> Path:
    """The adapter in a folder or a repository; see `Forgotten.from_pretrained`."""
    if (folder := Path(place)).is_dir():
        if revision is not None:
            raise ProblemError(f"{line(place)} is a folder, which has no revision: leave it out")
        refuse_outside(folder / ADAPTER, folder)
        return folder / ADAPTER
    if folder.exists() or "@" in str(place) or not HUB_ID.fullmatch(str(place)):
        raise ProblemError(f"{line(place)}: no folder, nor a name on the Hub (of a file: load)")
    hub = need("huggingface_hub", INSTALL)
    with foreign(f"{line(place)} cannot be fetched"):
        return Path(hub.hf_hub_download(str(place), ADAPTER, revision=revision))


def push(
    adapter: Adapter,
    repo_id: str,
    base: Base,
    overwrite: bool,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
) -> str:
    """See `Forgotten.push_to_hub`."""
    hub, files = need("huggingface_hub", INSTALL), files_of(adapter, base)
    with foreign(f"{line(repo_id)} cannot be written"):
        api = hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = files.keys() & set(api.list_repo_files(repo_id, revision=revision))
        if there and not overwrite:
            raise ProblemError(f"{repo_id} has {min(there)} already: overwrite=True replaces it")
        done = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=line(f"Without {', '.join(adapter.classes)}")[:72],
            revision=revision,
        )
    return done.commit_url
