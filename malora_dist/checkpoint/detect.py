"""What a path is that was taken for a checkpoint, told from names alone."""

from collections.abc import Callable
from pathlib import Path

from malora_dist.checkpoint.layout import CHECKPOINTS, checkpoint_name, step_of

Names = list[str]
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def _any(*prefixes: str) -> Callable[[Names], bool]:
    return lambda names: any(name.startswith(prefixes) for name in names)


# The first that fits is said.
FOLDERS: tuple[tuple[Callable[[Names], bool], str], ...] = (
    (_any("global_step", "zero_pp_rank_", "bf16_zero_pp_rank_", "mp_rank_"), "it is a checkpoint of DeepSpeed"),
    (lambda names: CHECKPOINTS in names, "it is a run folder; its checkpoints are in `checkpoints`"),
    (_any("adapter_config.json", "adapter_model."), "it is an adapter folder, without an optimizer"),
    (_any("model.safetensors", "model-0"), "it is a folder of model weights"),
    (lambda names: any(name.endswith(PICKLES) for name in names), "it holds pickles, which are never unpickled"),
    (lambda names: not names, "it is empty"),
)


def detect_kind(path: Path) -> str:
    """Describe what lies at `path` in half a sentence, for a message that names what was expected."""
    if path.is_file():
        pickle = path.name.endswith(PICKLES)
        return "it is a pickle, which is never unpickled" if pickle else "it is a file, not a folder"
    if not path.is_dir():
        return "it does not exist"
    if path.name.startswith(".") and path.name.endswith((".partial", ".removed")):
        return "it is unfinished or partly removed, left by a process that was stopped"
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    steps = [step for step in map(step_of, names) if step is not None]
    if steps:
        return f"it is a folder of checkpoints; the newest is {checkpoint_name(max(steps))}"
    return next((text for fits, text in FOLDERS if fits(names)), f"it holds {', '.join(sorted(names)[:4])}")
