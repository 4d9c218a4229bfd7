"""Which kind of thing a path is, and the facts of its kind."""

import os
from collections.abc import Callable
from pathlib import Path

from malora_dist.adapters.io.folder import CONFIG, open_adapter
from malora_dist.adapters.io.peft import is_peft_folder, open_peft
from malora_dist.checkpoint.detect import detect_kind
from malora_dist.checkpoint.layout import pointed_at
from malora_dist.cli.inspect import folders
from malora_dist.cli.inspect.adapters import Facts, adapter_facts, routing_shares
from malora_dist.errors import CheckpointError
from malora_dist.files import run_files

GGUF_MAGIC = b"GGUF"


def inspect(path: str | os.PathLike[str]) -> Facts:
    """Return the facts for `malora inspect`: plain JSON with `path`, `kind` and `damaged`, what cannot be used.

    Raises CheckpointError if there is nothing at the path, or nothing that is known.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    path = pointed_at(path)
    return {"path": str(path)} | (_folder(path) if path.is_dir() else _file(path))


def _file(path: Path) -> Facts:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if magic == GGUF_MAGIC:
        return {"kind": "GGUF model", "bytes": path.stat().st_size, "damaged": []}
    raise CheckpointError(f"{path} is of no known kind: {detect_kind(path)}")


def _folder(path: Path) -> Facts:
    if path.name.startswith(".") and path.name.endswith((".partial", ".removed")):
        return {"kind": "unfinished", "damaged": [f"{path} was being written or removed when its process ended"]}
    return next((facts(path) for fits, facts in KINDS if fits(path)), None) or _nothing(path)


def _nothing(path: Path) -> Facts:
    raise CheckpointError(f"{path} is of no known kind: {detect_kind(path)}")


def _adapter(folder: Path) -> Facts:
    """Return the facts of an adapter of ours or of PEFT.

    A PEFT adapter that ours cannot represent gets a remark and is not counted as damaged.
    """
    try:
        peft = is_peft_folder(folder)
    except CheckpointError as error:
        return {"kind": "adapter", "damaged": [str(error)]}
    facts: Facts = {"kind": "adapter of PEFT" if peft else "adapter", "damaged": []}
    try:
        adapter = open_peft(folder) if peft else open_adapter(folder)
        return facts | adapter_facts(adapter, routing_shares(folder.parent / run_files.METRICS))
    except CheckpointError as error:
        return facts | ({"not_read": str(error)} if peft else {"damaged": [str(error)]})


def _several(folder: Path) -> Facts:
    found = {path.name: _adapter(path) for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()}
    damaged = [message for facts in found.values() for message in facts["damaged"]]
    return {"kind": f"folder of {len(found)} adapters", "damaged": damaged, "adapters": found}


# The first that fits.
KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Facts]], ...] = (
    (folders.is_checkpoint, folders.checkpoint_facts),
    (lambda path: (path / CONFIG).is_file(), _adapter),
    (folders.is_run, folders.run_facts),
    (folders.holds_checkpoints, folders.checkpoints_facts),
    (folders.is_deepspeed, folders.deepspeed_facts),
    (lambda path: (path / "config.json").is_file(), folders.model_facts),
    (lambda path: any((part / CONFIG).is_file() for part in path.iterdir()), _several),
)
