"""Adapters on bases that are mixtures of experts themselves: both balance losses in what Trainer and TRL train on."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist import MaloraConfig, aux_loss, get_malora_model
from malora_dist.adapters.adapted_layers import adapter_parameters
from tests.families import family_model
from tests.tiny_models import byte_tokenizer

OWN, OURS = 0.3, 0.2
IDS = torch.arange(3, 35).reshape(2, 16)
MASK = torch.ones_like(IDS)
MASK[1, 10:] = 0
LABELS = IDS.where(MASK == 1, -100)
# qwen2_moe has linears beside its experts, which all tokens share.
TARGETS = {
    "mixtral": ["q_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "qwen2_moe": ["q_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
}
families = pytest.mark.parametrize("family", TARGETS)


def adapted(family: str, coefficient: float = OURS) -> Any:
    """The base adds its own loss; B is not 0, so that adapters change what its router sees."""
    base = family_model(family, router_aux_loss_coef=OWN, output_router_logits=True)
    config = MaloraConfig(r=3, num_experts=4, target_modules=TARGETS[family], router_aux_loss_coef=coefficient)
    model = get_malora_model(base, config)
    for number, (name, parameter) in enumerate(adapter_parameters(model)):
        if name.endswith(".B"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model.train()


def own_loss(model: Any, router_logits: Any) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    loss = load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, MASK)
    assert isinstance(loss, Tensor)
    return loss


def cross_entropy(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), LABELS[:, 1:].flatten())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(adapter_parameters(model))
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@families
def test_the_loss_is_the_sum_of_all_three(family: str) -> None:
    model = adapted(family)
    outputs = model(IDS, attention_mask=MASK, labels=LABELS)
    own, ours = own_loss(model, outputs.router_logits), aux_loss(model, MASK)
    wanted = cross_entropy(outputs.logits) + OWN * own + OURS * ours
    torch.testing.assert_close(outputs.loss, wanted)
    # What TRL multiplies by the base's coefficient.
    torch.testing.assert_close(OWN * outputs.aux_loss, OWN * own + OURS * ours)
    found = gradients(model, outputs.loss)
    again = adapted(family)
    outputs = again(IDS, attention_mask=MASK)
    total = cross_entropy(outputs.logits) + OWN * own_loss(again, outputs.router_logits) + OURS * aux_loss(again, MASK)
    expected = gradients(again, total)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(IDS, MASK, LABELS, strict=True)]


def after_a_step(model: Any, loss: Tensor) -> dict[str, Tensor]:
    found = gradients(model, loss)
    return {name: parameter.detach() - 0.1 * found[name] for name, parameter in adapter_parameters(model)}


SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
SETTINGS |= {"max_grad_norm": 0.0, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
SETTINGS |= {"lr_scheduler_type": "constant"}


@families
@pytest.mark.filterwarnings("ignore")
def test_trainer(family: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted(family)
    outputs = model(IDS, attention_mask=MASK, labels=LABELS)
    wanted = after_a_step(model, outputs.loss)
    model = adapted(family)
    Trainer(model=model, args=TrainingArguments(str(tmp_path), **SETTINGS), train_dataset=rows()).train()
    for name, parameter in adapter_parameters(model):
        torch.testing.assert_close(parameter.detach(), wanted[name], msg=name)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install trl")
def test_sft_trainer(family: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = adapted(family)
    outputs = model(IDS, attention_mask=MASK, labels=LABELS)
    wanted = after_a_step(model, outputs.loss)
    model = adapted(family)
    lengths = MASK.sum(1).tolist()
    data = Dataset.from_list([{"input_ids": ids[:n].tolist()} for ids, n in zip(IDS, lengths, strict=True)])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), **SETTINGS, bf16=False, gradient_checkpointing=False),
        train_dataset=data,
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    for name, parameter in adapter_parameters(model):
        torch.testing.assert_close(parameter.detach(), wanted[name], msg=name)
