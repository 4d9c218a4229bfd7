"""Spreading a model's experts over expert-parallel groups: which slice a process keeps, and how its tokens travel."""

import torch
from torch import nn

from malora_dist.adapters.fused_projections import linears_by_input
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.distributed.all_to_all import AllToAll
from malora_dist.distributed.dispatcher import SharedInputDispatcher
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.zero3 import mark_expert_parameter


def keep_local_experts(layer: MixtureLinear, groups: ExpertGroups) -> None:
    """Replace a layer's stacked factors by this process's slice, marked for ZeRO."""
    if not layer.routed:
        return
    owned = groups.local_experts(layer.num_experts)
    assert layer.expert_down is not None, "check_plan refuses methods whose tokens use every expert"
    parts = [_slice(parameter, owned) for parameter in (layer.expert_down, layer.B)]
    for part in parts:
        mark_expert_parameter(part, groups)
    layer.set_experts(*parts)


def _slice(parameter: nn.Parameter, owned: range) -> nn.Parameter:
    part = parameter.detach()[owned.start : owned.stop].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def connect_experts(model: nn.Module, groups: ExpertGroups, *, overlap: bool = True, share: bool = True) -> AllToAll:
    """Give every routed layer a dispatcher through the expert-parallel group; the AllToAll they share counts bytes.

    overlap: the home phase flies while the base layer computes. share: linears that read one tensor send together.
    """
    all_to_all = AllToAll(groups.expert_parallel, overlap=overlap)
    for layers in _sharing_an_input(model, share):
        dispatcher = SharedInputDispatcher(layers, all_to_all)
        for layer in layers:
            layer.dispatcher = dispatcher
    return all_to_all


def _sharing_an_input(model: nn.Module, share: bool) -> list[list[MixtureLinear]]:
    sets = [[layer for layer in layers if layer.routed] for _, _, layers in linears_by_input(model)]
    return sets if share else [[layer] for layers in sets for layer in layers]
