"""Files for a user's folder: a recipe, and what a cluster needs. Existing files are never touched."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from malora_dist.errors import ConfigError
from malora_dist.files.atomic import partial_name, write_text
from malora_dist.launch.slurm.script import shipped_scripts


def cluster_files() -> dict[str, str]:
    """Return the relative path and the text of each file of ds_configs/, launchers/ and slurm/."""
    return dict(_walk(files("malora_dist") / "cluster_files", "")) | shipped_scripts()


def write_new_files(recipe: Path, text: str, *, with_cluster_files: bool) -> list[Path]:
    """Write the recipe, and the cluster files beside it if wanted; return the paths written.

    Raises ConfigError if one of them is there already, or cannot be written; none of them is left then.
    """
    planned = {recipe: text}
    if with_cluster_files:
        planned |= {recipe.parent / name: content for name, content in cluster_files().items()}
    taken = [str(path) for path in planned if path.exists()]
    if taken:
        raise ConfigError(f"will not overwrite {', '.join(taken)}; give another PATH, or move what is there away")
    folders = [folder for path in planned for folder in path.parents if not folder.exists()]
    try:
        for path, content in planned.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, content)
            if path.suffix == ".sh":
                path.chmod(0o755)
    except OSError as error:
        _remove([*planned, *(path.with_name(partial_name(path.name)) for path in planned)], folders)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return list(planned)


def _remove(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Remove files, and folders that are empty then, as far as the system lets us; inner folders come first."""
    for file in files:
        with suppress(OSError):
            file.unlink()
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        with suppress(OSError):
            folder.rmdir()


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_text(encoding="utf-8")
