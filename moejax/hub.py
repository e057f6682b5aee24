"""From a name to a model directory: the embedded model, a path, or a Hugging Face hub id."""

import os
import pathlib
import re

from moejax import checkpoints
from moejax.errors import CheckpointError, HubError

EMBEDDED = {"tiny": "tiny", "tiny-draft": "tiny_draft"}
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path_or_name: str | os.PathLike, *, download: bool = True) -> pathlib.Path:
    """The directory of a model; downloads it if it is a hub id that is not cached yet.

    Args:
        download: False takes a hub id from the local cache only.

    Raises:
        CheckpointError: no such directory.
        HubError: the download failed, or HF_HUB_OFFLINE forbids it.
    """
    name = os.fspath(path_or_name)
    if name in EMBEDDED:
        return pathlib.Path(checkpoints.__file__).parent / EMBEDDED[name]
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the directory that holds config.json")
    if not HUB_ID.fullmatch(name) or name[0] in "./~":
        raise CheckpointError(
            f"there is no directory {path}; known names: {', '.join(EMBEDDED)}, or a hub id such "
            "as Qwen/Qwen3-30B-A3B"
        )
    return _download(name, download)


def _why(online: bool) -> str:
    """Why a model that is not in the cache is not downloaded, and what to do."""
    if online:
        return (
            "it cannot be downloaded now (offline, or HF_HUB_OFFLINE is set): give a local "
            "directory, or go online once"
        )
    return "this command downloads nothing: give a local directory, or run `hf download` first"


def _download(name: str, online: bool) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(PATTERNS), local_files_only=not online
            )
        )
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{name} is no directory here and no model in the local cache, and {_why(online)}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise HubError(f"{name} could not be downloaded: {first}") from error
