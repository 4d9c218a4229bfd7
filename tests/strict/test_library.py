"""A model of `get_malora_model` on the device: loss and gradients, however layers are run again, and its adapters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist import MaloraConfig, get_malora_model
from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.bench.strict.device import StrictDevice
from tests.tiny_models import tiny_llama

CLOSE = {"atol": 2e-6, "rtol": 1e-4}


def adapted(device: str, **arguments: Any) -> Any:
    config = MaloraConfig(**{"r": 3, "num_experts": 4, "router_aux_loss_coef": 0.5} | arguments)
    model: Any = get_malora_model(tiny_llama().to(device), config)
    with torch.no_grad():
        for number, (_, layer) in enumerate(mixture_layers(model)):
            drawn = torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(number))
            layer.B.copy_(0.1 * drawn)
    return model


def batch(device: str) -> dict[str, Any]:
    ids, mask = torch.arange(24).view(2, 12) % 61, torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}
    given["num_items_in_batch"] = torch.tensor(40)
    return {name: tensor.to(device) for name, tensor in given.items()}


def numbers(device: str, reentrant: bool | None, **arguments: Any) -> dict[str, Tensor]:
    """The loss and the gradients of a step."""
    model = adapted(device, **arguments).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(**batch(device), use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(model)}
    return {"loss": loss.detach().cpu()} | {name: grad.cpu() for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("arguments", [{"fuse_projections": True}, {"method": "molora"}])
def test_a_step_gives_the_numbers_of_the_cpu(
    strict: StrictDevice, arguments: dict[str, Any], reentrant: bool | None
) -> None:
    wanted, found = (numbers(device, reentrant, **arguments) for device in ("cpu", "strict"))
    assert len(wanted) == len(found) == 1 + 12 * (3 if "method" in arguments else 4)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_take_turns_and_are_merged(strict: StrictDevice) -> None:
    def logits(device: str) -> Tensor:
        model = adapted(device)
        model.add_adapter("one", MaloraConfig(method="lora", r=2))
        model.set_adapter("one")
        torch.nn.init.constant_(dict(mixture_layers(model))["model.layers.0.mlp.up_proj"].B, 0.1)
        ids = torch.arange(12, device=device)[None]
        with torch.no_grad():
            found = [model(ids).logits]
            model.set_adapter("default")
            found.append(model(ids).logits)
            model.set_adapter("one")
            found.append(model.merge_and_unload()(ids).logits)
        return torch.cat(found).cpu()

    wanted, found = logits("cpu"), logits("strict")
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=1e-4)
