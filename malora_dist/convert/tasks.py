"""A mixture as one static LoRA for each task, which servers without routing can load."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.io.folder import AdapterTensors
from malora_dist.adapters.loading import put_adapter
from malora_dist.convert.accuracy import GAP_HEADER, Gap, gap_line, measure
from malora_dist.convert.calibration import LayerStatistics, calibration_samples, collect
from malora_dist.convert.collapse import static_up, truncated
from malora_dist.convert.gates import constant_gates, static_lora
from malora_dist.convert.job import Job
from malora_dist.convert.peft_folder import fill_peft_folder, lora_card, lora_shapes
from malora_dist.convert.subspace import down_shape, subspace_of
from malora_dist.convert.verify import Factors, logits_of, text_rows, verify_peft
from malora_dist.data.build import PreparedData
from malora_dist.errors import ConfigError

FITS = ("lstsq", "mean")
CALIBRATION = 128
EVAL_SAMPLES = 200
# What `vllm serve --max-lora-rank` accepts.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

Statistics = Mapping[str, LayerStatistics]


def to_peft_tasks(job: Job) -> None:
    """Write DST/<task>: lora_A = S, lora_B = L of `collapse`, from --calibration training samples of the task; rank D.

    With --rank R it is the nearest product of that rank. Logs for each task the accuracy routed and static, on
    --eval-samples rows of the recipe's evaluation split (0: not measured), and the command that serves the folders.
    """
    adapter, recipe = job.open_adapter(), job.needed_recipe()
    fit, rank = _checked(job, adapter)
    data = job.data(adapter.info)
    model = job.load_base(adapter.info)
    put_adapter(model, adapter)
    statistics: dict[str, Statistics] = {}
    if _eval_samples(job):
        job.log(GAP_HEADER)
    for task_id, task in enumerate(data.task_names):
        statistics[task] = _statistics(job, adapter, model, data, task_id, fit)
        _write(job, adapter, task, statistics[task], fit, rank)
        rows = data.evaluation[recipe.evaluation.split][task][: _eval_samples(job)]
        if rows:
            routed = measure(model, rows, recipe.evaluation.batch_tokens)
            with static_lora(model, _on_model(adapter, model, statistics[task], fit, rank)):
                static = measure(model, rows, recipe.evaluation.batch_tokens)
            job.log(gap_line(task, Gap(routed, static)))
    if job.options.verify:
        _verify(job, adapter, model, statistics, fit, rank)
    job.log(_serving(job, adapter, list(data.task_names), rank))


def _checked(job: Job, adapter: AdapterTensors) -> tuple[str, int]:
    """Return --fit and the rank of the result. Raises ConfigError for values that are not valid."""
    fit, exact = job.options.fit or FITS[0], _exact_rank(adapter)
    if fit not in FITS:
        raise ConfigError(f"--fit {fit} must be one of {', '.join(FITS)}")
    if job.options.rank is not None and job.options.rank > exact:
        raise ConfigError(f"--rank {job.options.rank} must be at most {exact}, the rank without any loss")
    return fit, job.options.rank or exact


def _exact_rank(adapter: AdapterTensors) -> int:
    return max(_down_shape(adapter, layer)[0] for layer in adapter.layers())


def _down_shape(adapter: AdapterTensors, layer: str) -> tuple[int, int]:
    return down_shape({factor: adapter.shapes[f"{layer}.{factor}"] for factor in adapter.layers()[layer]})


def _eval_samples(job: Job) -> int:
    return EVAL_SAMPLES if job.options.eval_samples is None else job.options.eval_samples


def _statistics(
    job: Job, adapter: AdapterTensors, model: Any, data: PreparedData, task_id: int, fit: str
) -> Statistics:
    samples = calibration_samples(data, task_id, job.options.calibration or CALIBRATION)
    if fit == "mean":
        return collect(model, samples)
    device = next(model.parameters()).device
    downs = {layer: subspace_of(adapter.read_layer(layer)).S_DI.float().to(device) for layer in adapter.layers()}
    return collect(model, samples, downs)


def _factors(adapter: AdapterTensors, layer: str, found: LayerStatistics, fit: str, rank: int) -> Factors:
    """Return B (O, R) without scaling and A (R, I) of a layer, fp64."""
    space = subspace_of(adapter.read_layer(layer))
    L_OD = static_up(space, found, fit)
    if rank < len(space.S_DI):
        left, right, _ = truncated(L_OD, space.S_DI, rank)
        return left, right
    return L_OD, space.S_DI


def _write(job: Job, adapter: AdapterTensors, task: str, statistics: Statistics, fit: str, rank: int) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for layer in adapter.layers():
        shapes |= lora_shapes(layer, rank, _down_shape(adapter, layer)[1], adapter.shapes[f"{layer}.B"][1])

    def values() -> Iterator[Tensor]:
        for layer in adapter.layers():
            up, down = _factors(adapter, layer, statistics[layer], fit, rank)
            yield down
            yield up

    (job.folder / task).mkdir()
    spec = adapter.info.spec
    text = (
        f"A static stand-in, by --fit {fit}, for a {spec.method} adapter with {spec.num_experts} experts on the task "
        f"{task}: the router's weights are those of the task's training rows, not of the token at hand."
    )
    fill_peft_folder(
        job.folder / task,
        adapter.info,
        shapes,
        values(),
        r=rank,
        lora_alpha=spec.scaling * rank,
        card=lora_card(adapter.info, f"{task}, out of a {spec.method} adapter", text),
    )


def _on_model(
    adapter: AdapterTensors, model: Any, statistics: Statistics, fit: str, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every layer, with the scaling in B, on the model's device."""
    device, pairs = next(model.parameters()).device, {}
    for layer in adapter.layers():
        up, down = _factors(adapter, layer, statistics[layer], fit, rank)
        pairs[layer] = (down.float().to(device), (adapter.info.spec.scaling * up).float().to(device))
    return pairs


def _verify(
    job: Job, adapter: AdapterTensors, model: Any, statistics: Mapping[str, Statistics], fit: str, rank: int
) -> None:
    """Compare peft with our layers, the mean gates forced or, where no gates are equivalent, with B A x added."""
    rows = text_rows(job, adapter.info)
    wanted = {}
    for task, found in statistics.items():
        if fit == "mean" and rank == _exact_rank(adapter):
            ours = constant_gates(model, {layer: layer_found.mean_gates_E for layer, layer_found in found.items()})
        else:
            ours = static_lora(model, _on_model(adapter, model, found, fit, rank))
        with ours:
            wanted[task] = logits_of(model, rows)
    remove_adapters(model)

    def delta(task: str, layer: str) -> Factors:
        up, down = _factors(adapter, layer, statistics[task][layer], fit, rank)
        return adapter.info.spec.scaling * up, down

    folders = {task: job.folder / task for task in statistics}
    verify_peft(job, model, rows, folders, wanted, adapter.layers(), delta)


def _serving(job: Job, adapter: AdapterTensors, tasks: list[str], rank: int) -> str:
    """Return the vLLM command that serves the folders."""
    allowed = [number for number in VLLM_RANKS if number >= rank]
    if not allowed:
        return f"vLLM serves LoRAs of rank {VLLM_RANKS[-1]} at most, these have {rank}: convert with a smaller --rank"
    base = job.options.base or adapter.info.base_model
    if base.endswith(".gguf"):
        base = str(job.base_folder(adapter.info))
    modules = [f"{task}={job.target / task}" for task in tasks]
    command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(allowed[0])]
    command += ["--max-loras", str(len(tasks)), "--lora-modules", *modules]
    return f"serve with: {shlex.join(command)}"
