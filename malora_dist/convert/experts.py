"""The experts of a mixture as stock PEFT LoRAs, one folder each."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.io.folder import AdapterTensors
from malora_dist.adapters.loading import put_adapter
from malora_dist.adapters.scaling import LORA, RSLORA
from malora_dist.convert.calibration import calibration_samples, collect
from malora_dist.convert.gates import constant_gates
from malora_dist.convert.job import Job
from malora_dist.convert.peft_folder import fill_peft_folder, lora_card, lora_shapes
from malora_dist.convert.subspace import down_shape, subspace_of
from malora_dist.convert.verify import Factors, logits_of, text_rows, verify_peft
from malora_dist.errors import ConfigError

GATES = ("one", "mean")
CALIBRATION = 32

Gates = Mapping[str, Tensor]  # by layer: (E,), by which each expert's B is multiplied


def to_peft_experts(job: Job) -> None:
    """Write DST/expert-0, ...: lora_A = A_t (P_t S_A for malora), lora_B = B_t; r and lora_alpha as they are.

    A folder equals the mixture whose gate is 1 for its expert and 0 for the others. With --gate mean, lora_B is
    multiplied by the mean gate of layer and expert over --calibration samples of each task, so that all folders added
    up are the mixture with its mean gates.
    """
    gate = job.options.gate or "one"
    if gate not in GATES:
        raise ConfigError(f"--gate {gate} must be one of {', '.join(GATES)}")
    if gate == "one" and job.options.calibration is not None:
        raise ConfigError("--calibration N is for --gate mean")
    adapter = job.open_adapter()
    gates = _mean_gates(job, adapter) if gate == "mean" else _ones(adapter)
    for expert in range(adapter.info.spec.num_experts):
        folder = job.folder / f"expert-{expert}"
        folder.mkdir()
        spec = adapter.info.spec
        # PEFT knows two rules; by another one s itself is lora_alpha / r.
        alpha = spec.lora_alpha if spec.scaling_rule in (LORA, RSLORA) else spec.scaling * spec.r
        fill_peft_folder(
            folder,
            adapter.info,
            {name: shape for layer in adapter.layers() for name, shape in _shapes(adapter, layer).items()},
            _values(adapter, expert, gates),
            r=spec.r,
            lora_alpha=alpha,
            use_rslora=spec.use_rslora,
            card=_card(adapter, expert, gate),
        )
    if job.options.verify:
        _verify(job, adapter, gates)


def _ones(adapter: AdapterTensors) -> Gates:
    return dict.fromkeys(adapter.layers(), torch.ones(adapter.info.spec.num_experts, dtype=torch.float64))


def _mean_gates(job: Job, adapter: AdapterTensors) -> Gates:
    """Compute E[g_t] of every layer over the same number of samples of each task."""
    data = job.data(adapter.info)
    count = job.options.calibration or CALIBRATION
    samples = [sample for task in range(len(data.task_names)) for sample in calibration_samples(data, task, count)]
    model = job.load_base(adapter.info)
    put_adapter(model, adapter)
    statistics = collect(model, samples)
    job.log(f"mean gates over {len(samples)} samples of {', '.join(data.task_names)}")
    return {layer: found.mean_gates_E for layer, found in statistics.items()}


def _shapes(adapter: AdapterTensors, layer: str) -> dict[str, tuple[int, int]]:
    factors = {factor: adapter.shapes[f"{layer}.{factor}"] for factor in adapter.layers()[layer]}
    inputs, outputs = down_shape(factors)[1], factors["B"][1]
    return lora_shapes(layer, adapter.info.spec.r, inputs, outputs)


def _values(adapter: AdapterTensors, expert: int, gates: Gates) -> Iterator[Tensor]:
    for layer in adapter.layers():
        space = subspace_of(adapter.read_layer(layer))
        yield space.P_ERD[expert] @ space.S_DI
        yield gates[layer][expert] * space.B_EOR[expert]


def _card(adapter: AdapterTensors, expert: int, gate: str) -> str:
    spec = adapter.info.spec
    weighed = "weighed by its mean gate" if gate == "mean" else "as if the router gave it the whole weight"
    text = f"Expert {expert} of the {spec.num_experts} of a {spec.method} adapter, {weighed}."
    return lora_card(adapter.info, f"expert {expert} of a {spec.method} adapter", text)


def _verify(job: Job, adapter: AdapterTensors, gates: Gates) -> None:
    """Compare the mixture with all gates but one at 0 with that expert's folder in peft, for every expert."""
    experts = range(adapter.info.spec.num_experts)
    rows = text_rows(job, adapter.info)
    model = job.load_base(adapter.info)
    put_adapter(model, adapter)
    wanted = {}
    for expert in experts:
        only = torch.eye(len(experts))[expert]
        with constant_gates(model, {layer: g_E * only for layer, g_E in gates.items()}):
            wanted[f"expert-{expert}"] = logits_of(model, rows)
    remove_adapters(model)

    def delta(name: str, layer: str) -> Factors:
        expert = int(name.removeprefix("expert-"))
        space = subspace_of(adapter.read_layer(layer))
        scale = adapter.info.spec.scaling * gates[layer][expert]
        return scale * space.B_EOR[expert], space.P_ERD[expert] @ space.S_DI

    folders = {name: job.folder / name for name in wanted}
    verify_peft(job, model, rows, folders, wanted, adapter.layers(), delta)
