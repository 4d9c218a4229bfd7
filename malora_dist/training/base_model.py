"""The frozen base of a run: where it is read from, by which process, and where it is placed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from malora_dist.config import RunConfig
from malora_dist.console.log import LOGGER
from malora_dist.console.progress import Bar
from malora_dist.distributed.nodes import this_node
from malora_dist.distributed.process_groups import World, broadcast_object, gather_lists
from malora_dist.distributed.rank_errors import run_on_rank0, sharing_errors
from malora_dist.distributed.zero3 import partition_at_once, partition_parts
from malora_dist.models.attention import attention_for
from malora_dist.models.config import read_model_config
from malora_dist.models.load import load_base_model
from malora_dist.models.loss_head import install_loss_head
from malora_dist.models.resolve import native_dtype
from malora_dist.models.weights.base_tensor import Weights
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.fingerprint import base_fingerprint
from malora_dist.models.weights.prepared import PreparedWeights, prepared_folder
from malora_dist.ops.nf4 import QUANTIZER
from malora_dist.training.run_context import RunContext


def base_model(context: RunContext, folder: Path, deepspeed_settings: dict[str, Any]) -> Any:
    """Load the frozen base, and place it as the ZeRO stage wants it while it is being read.

    Under ZeRO-3 every process reads its own part of a base that is prepared, or that is not to be quantised. Otherwise
    one process of each node reads whole tensors, quantises them, and the others of its node get them from it. The head
    can give the loss itself (`models.loss_head`), where the model returns plain logits. The context is polled before
    each tensor is placed.

    Args:
        context: of the run.
        folder: of the base model.
        deepspeed_settings: those of `setup.engine_config`.
    """
    config, world = context.config, context.world
    dtype, trusted = base_dtype(config, world), config.model.trust_remote_code
    model_config = read_model_config(folder, trust_remote_code=trusted)
    attention = attention_for(config.model.attn_implementation, model_config, dtype, world.device)
    prepared = _prepared(config, folder, dtype, world)
    with sharing_errors(world):
        weights, where = _weights(config, folder, prepared, world)
    with Bar("reading the base model, tensors", active=world.is_main) as bar:
        before = _after(context.poll, bar.advance)
        model = load_base_model(
            folder,
            dtype=dtype,
            load_in_4bit=config.model.load_in_4bit,
            double_quant=config.model.bnb_4bit_use_double_quant,
            attn_implementation=attention,
            trust_remote_code=trusted,
            device=world.device,
            weights=weights,
            agree=lambda find: run_on_rank0(find, world),
            **_placement(context, deepspeed_settings, before, in_parts=isinstance(weights, PreparedWeights)),
        )
    logging.getLogger(LOGGER).info("base model: %s; this process read %.1f MiB", where, weights.bytes_read / 2**20)
    logging.getLogger(LOGGER).info("attention: %s%s", attention, _why(config, model, attention))
    if not install_loss_head(model):
        logging.getLogger(LOGGER).info("loss: from whole logits, as the head of %s is not plain", type(model).__name__)
    if config.train.gradient_checkpointing:
        # Reentrant checkpointing would run forward without a graph and lose the balance loss's gradient.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _why(config: RunConfig, model: Any, attention: str) -> str:
    """Return what the log adds where `auto` means less than for other models."""
    if config.model.attn_implementation != "auto" or attention != "eager":
        return ""
    return f", as {type(model).__name__} has no other here"


def _prepared(config: RunConfig, folder: Path, dtype: torch.dtype, world: World) -> tuple[Path, bool] | None:
    """Return the folder of the prepared 4-bit base, and whether all processes see it; None if it is not 4-bit."""
    if not config.model.load_in_4bit:
        return None
    double_quant = config.model.bnb_4bit_use_double_quant
    prepared, _ = run_on_rank0(lambda: prepared_folder(folder, dtype=dtype, double_quant=double_quant), world)
    return prepared, all(gather_lists([prepared.is_dir()]))


def _weights(config: RunConfig, folder: Path, prepared: tuple[Path, bool] | None, world: World) -> tuple[Weights, str]:
    """Return where the base is read from, the same on all processes, and a sentence about it."""
    if prepared is None:
        return CheckpointWeights(folder, world.device), str(folder)
    made, seen = prepared
    if seen:
        return PreparedWeights(made), f"prepared in {made}"
    return CheckpointWeights(folder, world.device), f"{folder}, quantised now (`malora prepare` would make {made})"


def _placement(
    context: RunContext, deepspeed_settings: dict[str, Any], before: Callable[[], None], *, in_parts: bool
) -> dict[str, Any]:
    """Return the arguments of `load_base_model` that say which process reads, and where tensors are placed."""
    config, world = context.config, context.world
    partitioned = config.parallel.zero_stage == 3
    offload = deepspeed_settings["zero_optimization"].get("offload_param", {}).get("device")
    if partitioned and (in_parts or not config.model.load_in_4bit) and offload != "nvme":
        return {"place_part": _after(before, partition_parts(deepspeed_settings))}
    node = this_node(world, config.parallel.timeout_seconds)
    place = partition_at_once(deepspeed_settings, node.share) if partitioned else node.share
    return {"reader": world.rank == node.reader_rank, "place": _after(before, place)}


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any) -> Any:
        first()
        return then(*arguments)

    return both


def base_identity(config: RunConfig, folder: Path, world: World) -> dict[str, str | None]:
    """Return what identifies the base in a checkpoint: name, revision, fingerprint and dtype, on all processes."""
    return {
        "name": config.model.name_or_path,
        "revision": config.model.revision,
        "fingerprint": run_on_rank0(lambda: base_fingerprint(folder), world),
        "dtype": str(base_dtype(config, world)).removeprefix("torch."),
    }


def base_quantizer(config: RunConfig) -> str | None:
    """Return the definition by which weights of the base become 4-bit codes, None if they do not."""
    return QUANTIZER if config.model.load_in_4bit else None


def base_dtype(config: RunConfig, world: World) -> torch.dtype:
    """Return model.dtype; `auto` is what the main process computes natively, on all processes."""
    if config.model.dtype == "auto":
        dtype: torch.dtype = broadcast_object(native_dtype(world.device))
        return dtype
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.dtype]
