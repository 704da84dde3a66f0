"""From what a user names, a folder or a hub id, to a folder on this machine."""

import os
from pathlib import Path

from vlmjax.errors import HubError

# What a model and its processor are made of; repositories often hold the same weights in other formats too.
_WANTED = ["*.json", "model.safetensors", "model-*-of-*.safetensors", "*.txt", "*.model", "*.jinja"]

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]


def locate(name: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """Return the folder, downloading a hub id (`owner/name`, `owner/name@revision`) into the usual cache.

    Without `weights` only the small files are fetched.

    Raises:
        HubError: no such folder, or the id cannot be fetched and is not in the cache.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(name)
    if path.exists():
        raise HubError(f"{text} is a file; give the folder that holds config.json and model.safetensors")
    if text.startswith((".", "/", "~")) or text.partition("@")[0].count("/") != 1:
        raise HubError(f"{text}: no such folder (a hub id looks like openai/clip-vit-large-patch14)")
    return _download(text, _WANTED if weights else _SMALL)


def _download(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        reason = str(error).strip().partition("\n")[0]
        raise HubError(
            f"{name}: no such folder, not in the hub cache, and cannot be downloaded{offline}: {reason} "
            "Check the name, the network and `hf auth login`, or copy the folder here and give its path"
        ) from error
