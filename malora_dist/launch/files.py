"""Files for a user's folder: a recipe, and what a cluster needs. Existing files are never touched."""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from malora_dist.errors import ConfigError
from malora_dist.launch.slurm.script import shipped_scripts


def cluster_files() -> dict[str, str]:
    """Return the relative path and the text of each file of ds_configs/, launchers/ and slurm/."""
    return dict(_walk(files("malora_dist") / "cluster_files", "")) | shipped_scripts()


def write_new_files(recipe: Path, text: str, *, with_cluster_files: bool) -> list[Path]:
    """Write the recipe, and the cluster files beside it if wanted; the paths written.

    Raises ConfigError, before writing anything, if one of them is there already.
    """
    planned = {recipe: text}
    if with_cluster_files:
        planned |= {recipe.parent / name: content for name, content in cluster_files().items()}
    taken = [str(path) for path in planned if path.exists()]
    if taken:
        raise ConfigError(f"will not overwrite {', '.join(taken)}; give another PATH, or move what is there away")
    for path, content in planned.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)
    return list(planned)


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_text(encoding="utf-8")
