"""Memory, traffic and time of a run before it starts. Arithmetic alone: no GPU, no weights; `families` needs torch."""

from typing import Any

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.config import RunConfig
from malora_dist.config.compatibility import suggest_world_sizes
from malora_dist.plan.advice import advice
from malora_dist.plan.duration import Hardware
from malora_dist.plan.estimate import Estimate, alternatives
from malora_dist.plan.find_shape import find_shape
from malora_dist.plan.run import Lengths, run_of
from malora_dist.plan.shapes import ModelShape
from malora_dist.plan.table import tables
from malora_dist.plan.units import parse_bytes, parse_flops, parse_rate

__all__ = ["Hardware", "Lengths", "Report", "find_shape", "hardware_of"]

GPUS_OF_A_NODE = 8


class Report:
    """A recipe's plan on a cluster, the legal plans beside it, and advice. `spec` is the recipe's adapter.

    Raises ConfigError or TopologyError for a plan that cannot run.
    """

    def __init__(
        self, config: RunConfig, spec: MixtureSpec, shape: ModelShape, hardware: Hardware, lengths: Lengths
    ) -> None:
        self.chosen = Estimate(run_of(config, spec, shape, hardware.world_size, lengths=lengths), hardware)
        self.plans = alternatives(config, spec, shape, hardware, lengths)
        self.advice = advice(self.chosen, self.plans)

    def tables(self) -> list[Any]:
        """Return what rich's Console.print prints, in order."""
        return list(tables(self.chosen, self.plans, self.advice))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plans = [plan.as_dict() for plan in self.plans]
        shape = self.chosen.run.shape
        assumed = {
            "tokens_per_sample": self.chosen.run.tokens_per_sample,
            "targets_per_sample": self.chosen.run.targets_per_sample,
            "dtype_bytes": self.chosen.run.itemsize,
            **vars(self.chosen.hardware),
        }
        return {
            "model": {"source": shape.source, "parameters": shape.num_parameters},
            "assumed": assumed,
            **self.chosen.as_dict(),
            "advice": self.advice,
            "alternatives": plans,
        }


def hardware_of(
    config: RunConfig, *, nodes: int, gpus_per_node: int | None, hbm: str, intra: str, inter: str, flops: str
) -> Hardware:
    """Parse the cluster of the command line. Without gpus_per_node, it is the most up to 8 that can share the batch."""
    if gpus_per_node is None:
        worlds = [world // nodes for world in suggest_world_sizes(config) if world % nodes == 0]
        gpus_per_node = max((gpus for gpus in worlds if gpus <= GPUS_OF_A_NODE), default=GPUS_OF_A_NODE)
    return Hardware(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        hbm=parse_bytes("--hbm", hbm),
        intra=parse_rate("--intra", intra),
        inter=parse_rate("--inter", inter),
        flops=parse_flops("--flops", flops),
    )
