"""What a model takes in one row so that each sample gets the same losses as alone: by its class, and measured."""

import logging
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.console.log import LOGGER
from malora_dist.data.encode import ChoiceItem
from malora_dist.data.packed_row import Packing, cumulative_lengths
from malora_dist.distributed.process_groups import World, max_over_processes
from malora_dist.errors import ConfigError
from malora_dist.evaluation.packed_forward import accepted, cross_entropies
from malora_dist.evaluation.scoring import build_row
from malora_dist.evaluation.tasks import evaluating
from malora_dist.models.packed_attention import FULL, is_masked, length_arguments
from malora_dist.models.rotations import LONGROPE, check_rotations, length_limits

KEY = "train.per_device_train_batch_size"
# Layers in which a token sees those that a mask shows it. Others carry a state along the row, or see blocks of it.
BY_MASK = {FULL, "sliding_attention", "chunked_attention"}
ROWS = {
    Packing.ALONE: "one sample each, and one choice each in evaluation",
    Packing.SEQUENCES: "several samples, and in evaluation a copy of the prompt for each choice",
    Packing.TREES: "several samples, and in evaluation choices behind one prompt",
}
# Rounding alone, of cross-entropies in fp32.
ROUNDING = 1e-5


def most_packing(config: Any, model_class: Any, longest: int = 0) -> Packing:
    """Return what a model takes at most of samples of up to `longest` tokens, before any weight is read.

    Branches need an attention that knows places by its mask alone: others may have windows or distances of their own.
    """
    if any(longest > limit for limit in length_limits(config).values()):
        return Packing.ALONE
    layers = set(getattr(config.get_text_config(), "layer_types", None) or [FULL])
    if getattr(model_class, "_is_stateful", False) or not layers <= BY_MASK:
        return Packing.ALONE
    replaceable = getattr(model_class, "_supports_attention_backend", False)
    return Packing.TREES if replaceable else Packing.SEQUENCES


def check_rows(config: Any, samples: int, longest: int = 0) -> None:
    """Raise ConfigError if a model of this configuration cannot be trained on rows of so many samples.

    longest: tokens of the longest sample.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    _check_lengths(config, samples, longest)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if samples > 1 and most_packing(config, model_class) is Packing.ALONE:
        raise ConfigError(
            f"{KEY}={samples} must be 1 for {config.model_type}: its layers carry state, or blocks of tokens, from one "
            "sample of a packed row into the next; the global batch may stay as it is"
        )


def _check_lengths(config: Any, samples: int, longest: int) -> None:
    check_rotations(config, longest)
    limits, key = length_limits(config), "data.max_seq_length"
    if samples > 1 and longest > limits.get(LONGROPE, longest):
        raise ConfigError(
            f"{KEY}={samples} must be 1 for this {config.model_type}, or {key}={longest} at most {limits[LONGROPE]}: "
            "its rotary embedding (longrope) changes for all samples of a row with a longer one in it"
        )


def check_packing(engine: Any, world: World, samples: int, longest: int = 0) -> Packing:
    """Measure what the base takes in one row. Every process calls.

    Args:
        engine: the model under DeepSpeed.
        world: all processes.
        samples: how many are to be trained in one row.
        longest: tokens of the longest sample.

    Returns:
        The packing, the same on every process.

    Raises:
        ConfigError: on every process alike, if the base cannot take that many, or is not causal.
    """
    model = engine.module
    with evaluating(engine, use_adapter=False):
        differences = packing_differences(engine, world.device, longest)
    found = _judged(model, max_over_processes(differences), samples, longest)
    logging.getLogger(LOGGER).info("rows: %s", ROWS[found])
    return found


def packing_of(model: Any, samples: int = 1, longest: int = 0) -> Packing:
    """Return what a model that no engine wraps takes in one row. Raises ConfigError as `check_packing`."""
    differences = packing_differences(model, next(model.parameters()).device, longest)
    return _judged(model, differences, samples, longest)


class Differences(NamedTuple):
    """By how much cross-entropies of one sample change.

    alone: first in its row, against the model's own, with tokens behind and no word of positions. visible: where the
    sample before it is another. moved: behind another sample, against first in the row. branched: as a branch. noise:
    where what follows is another. seen: in a text that goes on, where it does see what is before it.
    """

    alone: float
    visible: float
    moved: float
    branched: float
    noise: float
    seen: float


def _judged(model: Any, measured: Tensor, samples: int, longest: int) -> Packing:
    """Return what `packing_differences` allow. Raises ConfigError if it is less than is wanted."""
    check_rotations(model.config, longest)
    found, dtype = Differences(*measured.tolist()), model.get_input_embeddings().weight.dtype
    allowed = tolerance(found, dtype)
    if not found.alone <= allowed:
        raise ConfigError(
            f"model.name_or_path: {type(model).__name__} does not predict each token from those before it, at "
            f"positions from 0 on (cross-entropies change by {found.alone:.1g} where tokens follow and no positions "
            "are given); this base is not supported"
        )
    apart = found.visible <= visible_tolerance(found, dtype) and found.moved <= allowed
    if not apart and samples > 1:
        raise ConfigError(
            f"{KEY}={samples} must be 1 for {type(model).__name__}: its attention mixes the samples of a packed row, "
            "or their positions run on through the row"
            f" (cross-entropies change by {found.moved:.1g}); the "
            "global batch may stay as it is"
        )
    if not apart:
        return Packing.ALONE
    most = _most(model, longest)
    return Packing.SEQUENCES if most is Packing.TREES and not found.branched <= allowed else most


def _most(model: Any, longest: int) -> Packing:
    most = most_packing(model.config, type(model), longest)
    return Packing.SEQUENCES if most is Packing.TREES and not is_masked(model) else most


def tolerance(found: Differences, dtype: torch.dtype) -> float:
    """Return which difference of cross-entropies is rounding, for a sample at another place of its row."""
    eps = torch.finfo(dtype).eps
    return max(ROUNDING, eps / 4, math.sqrt(eps) * found.seen)


def visible_tolerance(found: Differences, dtype: torch.dtype) -> float:
    """Return the tolerance for a sample at the same place of a row of the same shape: less, but for shared experts.

    Experts multiply as many tokens at a time as have chosen them, and round by how many these are.
    """
    return max(ROUNDING, torch.finfo(dtype).eps / 4, 8 * found.noise, tolerance(found, dtype) / 10)


@torch.no_grad()
def packing_differences(engine: Any, device: torch.device, longest: int = 0) -> Tensor:
    """Return `Differences`, (6,) fp64. Three short rows, through every process alike."""
    model = getattr(engine, "module", engine)
    prompt, answer, *others = _texts(model.config.get_text_config().vocab_size)
    n, most = len(answer), _most(model, longest)
    parts = [_losses(engine, most, prompt, answer, other, device) for other in others]
    (first, behind, branch), (first_again, behind_another, _) = parts
    own, after = _own(engine, (*prompt, *answer, *others[0], *prompt, *answer), len(prompt), n, device)
    pairs = {
        "alone": (first, own),
        "visible": (behind, behind_another),
        "moved": (behind, first),
        "branched": (branch, first),
        "noise": (first, first_again),
        "seen": (after, own),
    }
    return torch.stack([(one - another).abs().max() for one, another in (pairs[name] for name in Differences._fields)])


def _texts(vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """Return a prompt, its answer and two other texts, away from the special tokens that begin a vocabulary."""
    numbers = [(vocabulary // 3 + 7 * number) % vocabulary for number in range(18)]
    return tuple(numbers[:3]), tuple(numbers[3:6]), tuple(numbers[6:12]), tuple(numbers[12:])


def _losses(
    engine: Any,
    most: Packing,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    other: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the answer's cross-entropies first in a row, behind another text, and as a branch behind another one."""
    n, packed = len(answer), most is not Packing.ALONE
    items = [_question(prompt, answer)]
    items += [_question(other[:2], other[2:]), items[0], _question(prompt, other, answer)] if packed else []
    row = build_row(items, tuple(range(len(items))), most is Packing.TREES).to(device)
    losses = cross_entropies(engine, row).double()
    if not packed:
        return losses, losses, losses
    first, _, behind, _, branch = losses.split([n, len(other) - 2, n, len(other), n])
    return first, behind, branch


def _question(prompt: tuple[int, ...], *answers: tuple[int, ...]) -> ChoiceItem:
    return ChoiceItem(0, prompt, answers, (1,) * len(answers), 0)


def _own(engine: Any, ids: tuple[int, ...], start: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the model's own cross-entropies of n tokens from `start` on, and of the last n, by whole logits."""
    ids_T, T = torch.tensor(ids, device=device), len(ids)
    model = getattr(engine, "module", engine)
    lengths = {} if is_masked(model) else length_arguments(cumulative_lengths([T]).to(device), T)
    options = accepted(model, {"use_cache": False, **lengths})
    logits_TV = engine(input_ids=ids_T[None], **options).logits[0].double()
    losses = F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")
    return losses[start - 1 : start - 1 + n], losses[-n:]
