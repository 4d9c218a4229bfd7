"""Where an adapter comes from: a folder, or an id of the Hugging Face Hub, of which a folder is made."""

import os
from pathlib import Path

from malora_dist.errors import CheckpointError

FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]


def adapter_folder(folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of an adapter; a name that is no local folder is downloaded from the hub, once.

    Raises CheckpointError if there is neither such a folder nor such an id, or the hub cannot be asked.
    """
    path, name = Path(folder_or_hub_id).expanduser(), os.fspath(folder_or_hub_id)
    if path.exists():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(
            f"{name} is not an adapter folder: there is no such folder, and it is not an id of the Hugging Face Hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: there is no such folder, and it cannot be downloaded from the hub: {first}"
        ) from error
