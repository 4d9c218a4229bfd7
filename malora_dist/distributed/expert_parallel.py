"""Spreading a model's experts over expert-parallel groups: the slice that a process keeps, and its dispatcher."""

import torch
from torch import nn

from malora_dist.adapters.fused_projections import linears_by_input
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.shared_input import SharedInput
from malora_dist.distributed.all_to_all import AllToAll
from malora_dist.distributed.dispatcher import TokenDispatcher
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.zero3 import mark_expert_parameter


def keep_local_experts(layer: MixtureLinear, groups: ExpertGroups) -> None:
    """Replace a routed layer's stacked factors by this process's slice, marked for ZeRO."""
    if not layer.routed:
        return
    local = groups.local_experts(layer.num_experts)
    down = None if layer.expert_down is None else _slice(layer.expert_down, local)
    B = _slice(layer.B, local)
    for part in (down, B):
        if part is not None:
            mark_expert_parameter(part, groups)
    layer.set_experts(down, B)


def _slice(parameter: nn.Parameter, local: range) -> nn.Parameter:
    part = parameter.detach()[local.start : local.stop].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def connect_experts(model: nn.Module, groups: ExpertGroups, *, overlap: bool = True, share: bool = True) -> AllToAll:
    """Let every routed layer dispatch its tokens through the expert-parallel group.

    Args:
        model: whose layers hold this process's slice of their experts (`keep_local_experts`).
        groups: the process's groups.
        overlap: sums are sent back while the base layer computes.
        share: linears that read one tensor send their tokens in one message.

    Returns:
        What all of them send through, which counts the bytes.
    """
    all_to_all = AllToAll(groups.expert_parallel, overlap=overlap)
    dispatcher = TokenDispatcher(all_to_all, share)
    for _, _, layers in linears_by_input(model):
        if layers[0].routed:
            shared_input = layers[0].shared_input or SharedInput([layer.input_projection for layer in layers])
            shared_input.dispatcher = dispatcher
            for layer in layers:
                layer.shared_input = shared_input
    return all_to_all
