"""What `malora convert --to` offers, as a table. Adding a kind is adding a row; no row imports torch.

The function of a row takes a `job.Job` and fills `job.folder`, an empty folder that becomes DST when it returns. With
`job.options.verify` it also checks what it has written, by `verify`, and raises CheckpointError beyond the tolerance.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from malora_dist.adapters.methods import METHODS, Structure
from malora_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What may follow `--to KIND`; None or False where nothing was said."""

    shards: int | None = None
    gate: str | None = None
    fit: str | None = None
    rank: int | None = None
    r: int | None = None
    shared_r: int | None = None
    beta: float | None = None
    top_k: int | None = None
    lora_alpha: float | None = None
    calibration: int | None = None
    eval_samples: int | None = None
    recipe: Path | None = None
    base: str | None = None
    device: str | None = None
    text: Path | None = None
    verify: bool = False

    def given(self) -> list[str]:
        """Return the names of the options that were given."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to convert.

    module, function: where it is written. fits: whether it takes an adapter of this method; None if SRC is no adapter
    of ours, or if all fit. options: the names of `ConvertOptions` that mean something to it, besides those in `ALWAYS`.
    many_sources: whether it takes several SRC. layer_specs: whether layers may have numbers of their own.
    """

    module: str
    function: str
    help: str
    fits: Callable[[Structure], bool] | None = None
    options: tuple[str, ...] = ()
    many_sources: bool = False
    layer_specs: bool = False


# What a verification needs.
ALWAYS = ("verify", "text", "base", "recipe", "device")

KINDS: dict[str, Kind] = {
    "adapter": Kind(
        module="malora_dist.convert.folders",
        function="to_adapter",
        layer_specs=True,
        help="an adapter folder out of a run, checkpoint or adapter folder",
    ),
    "checkpoint": Kind(
        module="malora_dist.convert.folders",
        function="to_checkpoint",
        help="a checkpoint with another number of files (--shards). Checkpoints hold whole tensors under global names, "
        "so any one resumes at any number of processes, ep_size and ZeRO stage as it is",
        options=("shards",),
    ),
    "molora": Kind(
        module="malora_dist.convert.molora",
        function="to_molora",
        help="experts with a down-projection of their own, A_t = P_t S_A: the same function. Or, of several LoRAs, the "
        "start of a mixture whose router is still to be trained; --r, --top-k",
        fits=lambda structure: structure.routed and structure.shared_down,
        options=("r", "top_k"),
        many_sources=True,
    ),
    "malora": Kind(
        module="malora_dist.convert.from_loras",
        function="to_mixture",
        help="the start of a mixture out of several LoRAs, of PEFT or ours, whose router is still to be trained; --r, "
        "--shared-r, --beta, --top-k",
        fits=lambda structure: not structure.routed and not structure.magnitude,
        options=("r", "shared_r", "beta", "top_k"),
        many_sources=True,
    ),
    "peft-experts": Kind(
        module="malora_dist.convert.experts",
        function="to_peft_experts",
        help="a stock PEFT LoRA for each expert, DST/expert-0, ...; --gate mean weighs each by its mean gate",
        fits=lambda structure: structure.routed,
        options=("gate", "calibration"),
    ),
    "peft-tasks": Kind(
        module="malora_dist.convert.tasks",
        function="to_peft_tasks",
        help="one static LoRA for each task, DST/<task>, that vLLM or transformers serve; --fit lstsq|mean, --rank R",
        fits=lambda structure: structure.routed,
        options=("fit", "rank", "calibration", "eval_samples"),
    ),
    "peft": Kind(
        module="malora_dist.convert.peft",
        function="to_peft",
        layer_specs=True,
        help="a stock PEFT LoRA or DoRA out of a lora or dora adapter: the same bits",
        fits=lambda structure: not structure.routed,
    ),
    "from-peft": Kind(
        module="malora_dist.convert.peft",
        function="from_peft",
        help="an adapter of ours out of a PEFT LoRA, DoRA or rank-stabilised LoRA: the same numbers",
        fits=lambda structure: False,
    ),
    "from-deepspeed": Kind(
        module="malora_dist.convert.deepspeed_folder",
        function="from_deepspeed",
        help="an adapter of ours out of global_stepN, which DeepSpeed saved of a PEFT LoRA run; --lora-alpha where no "
        "adapter_config.json lies beside it",
        fits=lambda structure: False,
        options=("lora_alpha",),
    ),
    "merged": Kind(
        module="malora_dist.convert.merged",
        function="to_merged",
        layer_specs=True,
        help="a lora or dora adapter and its base as one model folder without an adapter",
        fits=lambda structure: not structure.routed,
    ),
}


def find_kind(name: str) -> Kind:
    """Return the row of a kind. Raises ConfigError for an unknown one, with the nearest name."""
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"--to {name}: unknown kind{hint} Kinds are {', '.join(KINDS)}")
    return KINDS[name]


def check_options(name: str, options: ConvertOptions) -> None:
    """Raise ConfigError for an option that has no meaning for this kind; the message names the kinds that take it."""
    for option in options.given():
        if option not in (*ALWAYS, *KINDS[name].options):
            takers = [other for other, kind in KINDS.items() if option in kind.options]
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with --to {name}; it is an option of --to {' or '.join(takers)}")
    if options.text is not None and not options.verify:
        raise ConfigError("--text FILE is the text of --verify; give --verify too")


def methods_that_fit(kind: Kind) -> list[str]:
    """Return the methods whose adapters this kind takes."""
    return [name for name, structure in METHODS.items() if kind.fits is None or kind.fits(structure)]


def kinds_for(method: str) -> list[str]:
    """Return the kinds that take an adapter of this method."""
    return [name for name, kind in KINDS.items() if method in methods_that_fit(kind)]
