"""One conversion: what it reads, where it writes, and what its options stand for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from malora_dist.adapters.io.folder import AdapterInfo, AdapterTensors, open_adapter
from malora_dist.checkpoint.layout import pointed_at
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.config import RunConfig, load_config
from malora_dist.config.load import config_from_dict
from malora_dist.console.progress import Bar
from malora_dist.convert.kinds import KINDS, ConvertOptions, check_options, find_kind, kinds_for, methods_that_fit
from malora_dist.data.build import PreparedData, build_data
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files import run_files
from malora_dist.files.folder import new_folder
from malora_dist.models.attention import attention_for
from malora_dist.models.config import KEY, own_code, read_model_config
from malora_dist.models.load import build_empty_model, load_base_model, load_tokenizer
from malora_dist.models.resolve import resolve_model
from malora_dist.models.vocabulary import check_row, check_tokens, check_vocabulary, embedding_rows
from malora_dist.models.weights.fingerprint import base_fingerprint
from malora_dist.ops.choices import VARLEN
from malora_dist.training.sequence_lengths import position_notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a kind's function is given.

    kind: its name. sources: SRC, one or more. target: DST, as it will be called. folder: the empty folder to fill,
    which becomes DST. log: prints a line.
    """

    kind: str
    sources: tuple[Path, ...]
    target: Path
    folder: Path
    options: ConvertOptions
    log: Callable[[str], None] = field(default=print)
    _found: dict[str, Path] = field(default_factory=dict, init=False, repr=False)

    @property
    def source(self) -> Path:
        """The only SRC."""
        (source,) = self.sources
        return source

    def open_adapter(self) -> AdapterTensors:
        """Open the adapter of SRC. Raises CheckpointError if it is damaged or its method does not fit the kind."""
        adapter = open_adapter(self.source)
        method = adapter.info.spec.method
        if method not in methods_that_fit(KINDS[self.kind]):
            raise CheckpointError(
                f"--to {self.kind} takes {', '.join(methods_that_fit(KINDS[self.kind]))}; {self.source} is a {method} "
                f"adapter, which these take: {', '.join(kinds_for(method))}"
            )
        check_layer_specs(self.source, self.kind, adapter)
        return adapter

    def recipe(self) -> RunConfig | None:
        """Return the recipe of --recipe, of the run or of the checkpoint; None for a bare adapter folder."""
        return self._recipe

    @cached_property
    def _recipe(self) -> RunConfig | None:
        file = self._recipe_file
        if file is not None:
            return load_config(file)
        if self._checkpoint is None:
            return None
        return config_from_dict(self._checkpoint.manifest.config, source=str(self._checkpoint.folder))

    @property
    def _recipe_file(self) -> Path | None:
        """The file of --recipe, else that of the run."""
        if self.options.recipe is not None:
            return self.options.recipe
        files = (folder / run_files.CONFIG for folder in (self.sources[0], self.sources[0].parent))
        return next((file for file in files if file.is_file()), None)

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        try:
            return open_adapter(self.sources[0]).checkpoint
        except CheckpointError:
            return None  # SRC is no adapter of ours: kinds that need one have opened it already

    def task_names(self) -> list[str]:
        """Return the names of the recipe's tasks, for a model card; none for a bare adapter folder."""
        recipe = self.recipe()
        return [] if recipe is None else [task.name for task in recipe.data.tasks]

    def needed_recipe(self) -> RunConfig:
        """Return the recipe, as `recipe` does. Raises ConfigError if there is none."""
        recipe = self.recipe()
        if recipe is None:
            raise ConfigError(f"--to {self.kind} reads tasks; {self.source} names none, so give --recipe RECIPE.yaml")
        return recipe

    def base_folder(self, info: AdapterInfo) -> Path:
        """Find the folder of the base: that of --base, else the recipe's, else the one that the adapter names.

        Raises ConfigError if the folder has code of its own that SRC alone, and no --recipe, allows to run.
        """
        recipe = self.recipe()
        name, revision = self.options.base or info.base_model, None
        if self.options.base is None and recipe is not None:
            name, revision = recipe.model.name_or_path, recipe.model.revision
        if name not in self._found:
            folder = resolve_model(name, revision, trust_remote_code=self.trusted)
            self._check_code(folder, info)
            self._found[name] = folder
        return self._found[name]

    def _check_code(self, folder: Path, info: AdapterInfo) -> None:
        """Log that a base's own code runs. Raises ConfigError where SRC alone allows it."""
        code, recipe = own_code(folder), self.recipe()
        if code and self.trusted:
            self.log(f"note: {KEY}=true: code of {folder} is run ({', '.join(code)})")
        elif code and (info.trust_remote_code or (recipe is not None and recipe.model.trust_remote_code)):
            raise ConfigError(
                f"{folder} has its own code ({', '.join(code)}), with which {self.sources[0]} was made. Code runs with "
                "all of your permissions, so the setting in SRC is not used. If you trust it, give a recipe with "
                f"{KEY}: true: --recipe {self._recipe_file or 'RECIPE.yaml'}"
            )

    @property
    def trusted(self) -> bool:
        """Whether code of the base's folder may run: only a recipe that the user has named can say so."""
        recipe = self.recipe() if self.options.recipe is not None else None
        return recipe is not None and recipe.model.trust_remote_code

    def token_ids(self, info: AdapterInfo, text: str, where: str) -> list[int]:
        """Tokenize a text. Raises ConfigError or DataError for tokens for which the base has no embedding row."""
        tokenizer, beyond = self._tokenizer(info)
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        check_row(ids, beyond, where)
        return ids

    def data(self, info: AdapterInfo) -> PreparedData:
        """Tokenize the recipe's tasks. Raises as `token_ids` does, and for samples beyond the positions of the base."""
        tokenizer, beyond = self._tokenizer(info)
        data = build_data(self.needed_recipe().data, tokenizer)
        check_tokens(data, beyond)
        for note in position_notes(data, self.base_folder(info), trust_remote_code=self.trusted):
            self.log(f"note: {note}")
        return data

    def positions(self, info: AdapterInfo) -> int:
        """Return the longest row, in tokens, that the base was made for."""
        config: Any = read_model_config(self.base_folder(info), trust_remote_code=self.trusted)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else sys.maxsize

    def _tokenizer(self, info: AdapterInfo) -> tuple["PreTrainedTokenizerBase", dict[int, str]]:
        """Load the base's tokenizer, and the tokens for which the base has no embedding row."""
        folder, trusted = self.base_folder(info), self.trusted
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
        model = build_empty_model(folder, dtype=torch.float32, trust_remote_code=trusted)
        return tokenizer, check_vocabulary(tokenizer, embedding_rows(model))

    def load_base(self, info: AdapterInfo) -> "PreTrainedModel":
        """Load the base in float32, not quantised, on --device (the CPU), with the recipe's attention where that runs.

        Raises CheckpointError if SRC is a checkpoint that was trained on another base.
        """
        folder = self.base_folder(info)
        check_base(self._checkpoint, folder)
        return self.load_model(folder)

    def load_model(self, folder: Path) -> "PreTrainedModel":
        """Load any model folder as `load_base` loads the base."""
        recipe, device, dtype = self.recipe(), torch.device(self.options.device or "cpu"), torch.float32
        wanted = "auto" if recipe is None else recipe.model.attn_implementation
        # Kernels of packed rows want a GPU and 16 bits.
        wanted = "auto" if wanted in VARLEN else wanted
        attention = attention_for(wanted, read_model_config(folder, trust_remote_code=self.trusted), dtype, device)
        with Bar("reading the base model, tensors") as bar:
            return load_base_model(
                folder,
                dtype=dtype,
                load_in_4bit=False,
                attn_implementation=attention,
                trust_remote_code=self.trusted,
                device=device,
                place=bar.advance,
            )


def check_layer_specs(path: Path, kind: str, adapter: AdapterTensors) -> None:
    """Raise CheckpointError for an adapter whose layers have numbers of their own, where a kind has one for all."""
    if adapter.info.spec.has_patterns and not KINDS[kind].layer_specs:
        raise CheckpointError(
            f"{path}: rank_pattern or alpha_pattern gives its layers numbers of their own; --to {kind} has one for all"
        )


def check_base(checkpoint: Checkpoint | None, base: Path) -> None:
    """Raise CheckpointError unless a model folder is the base of a checkpoint; adapter folders do not record theirs."""
    if checkpoint is None:
        return
    wanted, found = checkpoint.manifest.base["fingerprint"], base_fingerprint(base)
    if wanted != found:
        raise CheckpointError(
            f"{base} is not the base of {checkpoint.folder}: its fingerprint is {found}, the checkpoint's is {wanted}"
        )


def convert(
    kind: str,
    sources: tuple[Path, ...],
    target: Path,
    options: ConvertOptions,
    log: Callable[[str], None] = print,
) -> None:
    """Write `target`, whole or not at all.

    Raises ConfigError for an unknown kind or an option it does not take, CheckpointError if a source cannot be read,
    does not fit, or fails the verification, or if `target` exists.
    """
    row = find_kind(kind)
    check_options(kind, options)
    if len(sources) != 1 and not (sources and row.many_sources):
        raise ConfigError(f"--to {kind} takes one SRC, then DST; {len(sources)} SRC were given")
    missing = [str(source) for source in sources if not source.exists()]
    if missing:
        raise CheckpointError(f"SRC={missing[0]}: there is no such file or folder")
    sources = tuple(map(pointed_at, sources))
    function = _function(row.module, row.function)
    with new_folder(target) as folder:
        function(Job(kind=kind, sources=sources, target=target, folder=folder, options=options, log=log))
    log(f"wrote {target}")


def _function(module: str, name: str) -> Callable[[Job], Any]:
    from importlib import import_module

    function: Callable[[Job], Any] = getattr(import_module(module), name)
    return function
