"""Experts that share a down-projection, each with one of its own."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import AdapterInfo, AdapterTensors, fill_adapter_folder, open_adapter
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.convert.from_loras import to_mixture
from malora_dist.convert.job import Job
from malora_dist.convert.subspace import outer_gate, subspace_of
from malora_dist.convert.verify import verify_routed
from malora_dist.errors import ConfigError


def to_molora(job: Job) -> None:
    """Write a molora adapter that is the same function: A_t = P_t S_A, rounded once to fp32; the rest as it is.

    A router that reads S_A x becomes W_g S_A, which reads x. S_A in each expert costs (E R - D) I more numbers a
    layer. Several SRC are LoRAs, which become a mixture (`to_mixture`).
    """
    if len(job.sources) > 1:
        return to_mixture(job)
    if job.options.r is not None or job.options.top_k is not None:
        raise ConfigError("--r and --top-k are for a mixture of several SRC; one SRC keeps its own")
    adapter = job.open_adapter()
    spec = replace(adapter.info.spec, method="molora", shared_r=None, router_input="x")
    info = replace(adapter.info, spec=spec)
    card = model_card(info, job.task_names(), {})
    fill_adapter_folder(job.folder, info, _shapes(adapter, info), _values(adapter), card)
    if job.options.verify:
        verify_routed(job, adapter, open_adapter(job.folder))


def _shapes(adapter: AdapterTensors, info: AdapterInfo) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapter.layers():
        inputs, outputs = adapter.shapes[f"{layer}.shared_A"][1], adapter.shapes[f"{layer}.B"][1]
        shapes |= {f"{layer}.{name}": shape for name, shape in factor_shapes(info.spec, inputs, outputs).items()}
    return shapes


def _values(adapter: AdapterTensors) -> Iterator[Tensor]:
    """Yield the tensors in the order of `factor_shapes`: gate, A, B."""
    for layer in adapter.layers():
        factors = adapter.read_layer(layer)
        yield outer_gate(factors, adapter.info.spec)
        yield subspace_of(factors).downs()
        yield factors["B"]
