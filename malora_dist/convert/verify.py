"""--verify: both sides of a conversion on real text, their logits and weights compared.

The base runs in float32, so the sides differ by rounding alone. Tolerances are relative: |d logits| to the largest
logit, |d weight| to the largest entry of the weights that the adapter adds.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.io.folder import AdapterInfo, AdapterTensors
from malora_dist.adapters.loading import put_adapter
from malora_dist.console.progress import tracked
from malora_dist.convert.gates import Replay, deciding
from malora_dist.convert.job import Job
from malora_dist.convert.subspace import outer_gate, subspace_of
from malora_dist.errors import CheckpointError, ConfigError

LOGITS_TOLERANCE = 1e-4
WEIGHTS_TOLERANCE = 1e-5
# Of every row the logits of its last positions are kept, which is what all its tokens lead to.
ROWS, TOKENS, POSITIONS = 8, 256, 32
OUTPUTS_AT_ONCE = 2048

Factors = tuple[Tensor, Tensor]  # B (O, R) with the scaling in it, A (R, I)
Difference = tuple[float, float]  # largest |difference|, largest |value|


def text_rows(job: Job, info: AdapterInfo) -> list[Tensor]:
    """Return token ids (T,) of up to ROWS pieces of real text: of --text, else of the recipe's training rows by task.

    Raises ConfigError if there is neither, and as `Job.data` does for rows that the base cannot take.
    """
    if job.options.text is not None:
        try:
            text = job.options.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--text {job.options.text} cannot be read as UTF-8 text: {error}") from error
        ids = torch.tensor(job.token_ids(info, text, f"--text {job.options.text}"), dtype=torch.long)
        rows = [row for row in ids.split(min(TOKENS, job.positions(info))) if len(row) > 1][:ROWS]
        if not rows:
            raise ConfigError(f"--text {job.options.text} holds no text")
        return rows
    if job.recipe() is None:
        raise ConfigError(f"--verify runs on real text; {job.source} names no tasks, so give --text FILE or --recipe")
    data = job.data(info)
    samples = [data.train[i * len(data.train) // ROWS] for i in range(min(ROWS, len(data.train)))]
    return [torch.tensor(sample.input_ids[:TOKENS].tolist()) for sample in samples]


@torch.no_grad()
def logits_of(model: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    """Compute the (T, V) logits of each row's last positions, fp32."""
    device = next(model.parameters()).device
    keep = POSITIONS
    return [
        model(input_ids=row[None].to(device), use_cache=False, logits_to_keep=keep).logits[0].float()
        for row in tracked("computing logits, rows", rows)
    ]


def verify_routed(job: Job, ours: AdapterTensors, theirs: AdapterTensors) -> None:
    """Compare the source and its result in our own layers, both with the routing of the source.

    Raises CheckpointError beyond the tolerance.
    """
    rows = text_rows(job, ours.info)
    model = job.load_base(ours.info)
    replay = Replay()
    put_adapter(model, ours)
    with deciding(model, replay.record):
        wanted = logits_of(model, rows)
    remove_adapters(model)
    put_adapter(model, theirs)
    with deciding(model, replay.repeat):
        found = logits_of(model, rows)
    judge(job, "", zip(found, wanted, strict=True), expert_differences(ours, theirs))


def verify_peft(
    job: Job,
    model: Any,
    rows: Sequence[Tensor],
    folders: Mapping[str, Path],
    wanted: Mapping[str, Sequence[Tensor]],
    layers: Iterable[str],
    deltas: Callable[[str, str], Factors],
) -> None:
    """Compare real `peft`, with each of the folders on the bare base `model`, with the logits and weights wanted of it.

    `deltas(name, layer)` are the factors of what folder `name` is to add to a layer. Raises CheckpointError beyond the
    tolerance, ConfigError without peft.
    """
    peft_model = load_in_peft(model, folders)
    for name in folders:
        peft_model.set_adapter(name)
        found = logits_of(peft_model, rows)
        modules = ((layer, peft_model.base_model.model.get_submodule(layer)) for layer in layers)
        weights = (difference(deltas(name, layer), peft_factors(module, name)) for layer, module in modules)
        judge(job, f"{name}: ", zip(found, wanted[name], strict=True), weights)


def load_in_peft(model: Any, folders: Mapping[str, Path]) -> Any:
    """Load every folder onto the base with `peft`, under its name."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("--verify runs the result in peft, which is not installed: pip install peft") from error
    (first, folder), *others = folders.items()
    peft_model = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, folder in others:
        peft_model.load_adapter(folder, adapter_name=name)
    return peft_model.eval()


def peft_factors(module: Any, name: str) -> Factors:
    """Return the factors of what PEFT's layer adds: B with its scaling in it, and A."""
    A_RI, B_OR = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    return module.scaling[name] * B_OR.double().cpu(), A_RI.double().cpu()


def expert_differences(ours: AdapterTensors, theirs: AdapterTensors) -> Iterable[Difference]:
    """Yield by layer and expert how the weights s B_t A_t differ, and the gates, which must be equal."""
    if ours.shapes == theirs.shapes:
        for name in ours.shapes:
            yield difference((ours.read(name).double(), None), (theirs.read(name).double(), None))
        return
    for layer in ours.layers():
        mine, other = ours.read_layer(layer), theirs.read_layer(layer)
        gate, other_gate = outer_gate(mine, ours.info.spec), outer_gate(other, theirs.info.spec)
        yield difference((gate.double(), None), (other_gate.double(), None))
        ours_space, theirs_space = subspace_of(mine), subspace_of(other)
        for B, A, B2, A2 in zip(
            ours_space.B_EOR, ours_space.downs(), theirs_space.B_EOR, theirs_space.downs(), strict=True
        ):
            yield difference((ours.info.spec.scaling * B, A), (theirs.info.spec.scaling * B2, A2))


def difference(mine: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> Difference:
    """Compute the largest |B A - B' A'| and |B A|, a few rows at a time; without A, those of B itself."""
    apart = size = 0.0
    for rows, other_rows in zip(mine[0].split(OUTPUTS_AT_ONCE), other[0].split(OUTPUTS_AT_ONCE), strict=True):
        value = rows if mine[1] is None else rows @ mine[1]
        other_value = other_rows if other[1] is None else other_rows @ other[1]
        furthest = (value - other_value).abs().max().item()
        apart = max(apart, math.inf if math.isnan(furthest) else furthest)
        size = max(size, value.abs().max().item())
    return apart, size


def judge(job: Job, name: str, logits: Iterable[tuple[Tensor, Tensor]], weights: Iterable[Difference]) -> None:
    """Log both differences. Raises CheckpointError if one is beyond its tolerance."""
    lines, failed = [], False
    for what, pairs, tolerance in (
        ("logits", [difference((found, None), (wanted, None)) for found, wanted in logits], LOGITS_TOLERANCE),
        ("weight", list(weights), WEIGHTS_TOLERANCE),
    ):
        apart, limit = max(a for a, _ in pairs), tolerance * max(size for _, size in pairs)
        failed |= not apart <= limit
        lines.append(f"max |d {what}| {apart:.1e} (tolerance {limit:.1e})")
    text = f"{name}{', '.join(lines)}"
    if failed:
        raise CheckpointError(f"verification failed, {job.target} is not written: {text}")
    job.log(f"verified {text}")
