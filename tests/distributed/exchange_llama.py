"""A whole Llama with its experts spread over two processes, beside one with all experts in each process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import mixture_spec
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.expert_parallel import connect_experts, keep_local_experts
from malora_dist.distributed.process_groups import World
from tests.distributed.exchange_runs import recorded_messages
from tests.tiny_models import tiny_llama

NUM_EXPERTS = 4


def compare_llamas(world: World, groups: ExpertGroups) -> dict[str, Any]:
    """Largest differences from the model with all experts, and the number of messages. Ranks have unequal tokens."""
    ids = torch.arange(2 * (5 + 3 * world.rank)).view(2, -1) * (7 + world.rank) % 61
    whole = _build(None)
    logits, wanted = _forward_and_backward(whole, ids)
    owned = groups.local_experts(NUM_EXPERTS)
    for name, gradient in wanted.items():
        if name.endswith((".P", ".B")):
            dist.all_reduce(gradient, group=groups.expert_parallel)
            wanted[name] = gradient[owned.start : owned.stop]
    models = {"shared": _build(groups), "each for itself": _build(groups, share=False), "recomputing": _build(groups)}
    models["recomputing"].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found: dict[str, Any] = {}
    for kind, model in models.items():
        with recorded_messages() as messages:
            its_logits, gradients = _forward_and_backward(model, ids)
        assert gradients.keys() == wanted.keys()
        found[kind] = {
            "logits": _error(its_logits, logits),
            "gradients": {name: _error(gradients[name], wanted[name]) for name in wanted},
            "messages": len(messages),
            "attention": _messages_of_attention(model),
            "astray": _error(_inputs_of_their_own(model), _inputs_of_their_own(whole)),
        }
    return found


def _build(groups: ExpertGroups | None, share: bool = True) -> Any:
    """The same float64 model every time, with B not 0 and this process's experts, if there are groups."""
    model = tiny_llama()
    for name, norm in [(n, m) for n, m in model.named_modules() if n.endswith("norm")]:
        # That of transformers computes in fp32 whatever it is given.
        model.set_submodule(name, nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon))
    generator = torch.Generator().manual_seed(1)

    def place(layer: MixtureLinear) -> None:
        nn.init.normal_(layer.B, std=0.3, generator=generator)
        if groups is not None:
            keep_local_experts(layer, groups)

    inject_adapters(model, mixture_spec("malora", num_experts=NUM_EXPERTS, r=3, shared_r=5), place=place)
    if groups is not None:
        connect_experts(model, groups, share=share)
    return model.double().train()


def _forward_and_backward(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids, use_cache=False).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * direction).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in adapter_parameters(model)}


def _messages_of_attention(model: Any) -> int:
    """Messages of the forward of q, k and v."""
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 48, dtype=torch.float64)
    with recorded_messages() as messages, torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear(x)
    return len(messages)


@torch.no_grad()
def _inputs_of_their_own(model: Any) -> Tensor:
    """What k and v say to another tensor than q, or to the same one with other numbers in it."""
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    outputs = [attention.q_proj(x), attention.k_proj(x + 1), attention.v_proj(x + 2), attention.q_proj(x)]
    outputs += [attention.k_proj(x.mul_(3)), attention.v_proj(x)]
    return torch.cat(outputs, dim=-1)


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm."""
    return float((found - wanted).norm() / wanted.norm())
