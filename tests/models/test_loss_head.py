"""The head that gives losses: same numbers and gradients as whole logits, and the model's own parameters untouched."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2Config,
)

from malora_dist.adapters.adapted_layers import adapter_parameters, count_base_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.models import loss_head as head_module
from malora_dist.models.loss_head import LossHead, install_loss_head, loss_head
from tests.tiny_models import SIZES, tiny_config, tiny_llama


def batch() -> MicroBatch:
    draw = np.random.default_rng(0)
    lengths = [(9, 4), (14, 13), (6, 1)]
    return collate([Sample(i, 0, draw.integers(0, 61, n).astype(np.int32), p) for i, (n, p) in enumerate(lengths)])


def adapted(model: Any, targets: tuple[str, ...] = DEFAULT_TARGETS, dropout: float = 0.1) -> Any:
    inject_adapters(model, mixture_spec("malora", num_experts=4, r=3, shared_r=6), targets, lora_dropout=dropout)
    for index, (name, parameter) in enumerate(adapter_parameters(model)):
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(index))
    return model.train()


def losses_and_gradients(model: Any) -> dict[str, Tensor]:
    set_token_keys(model, batch(), 0, 1)
    losses = cross_entropies(model, batch())
    weights = torch.linspace(0.1, 1, len(losses))
    named = dict(adapter_parameters(model))
    gradients = torch.autograd.grad((losses * weights).sum(), list(named.values()), allow_unused=True)
    zero = torch.zeros(())
    return {"losses": losses} | {n: zero if g is None else g for n, g in zip(named, gradients, strict=True)}


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_losses_and_gradients_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, tied: bool, chunk: int, checkpointing: bool
) -> None:
    monkeypatch.setattr(head_module, "chunk_rows", lambda vocab_size, device: chunk)
    model = adapted(tiny_llama(tie_word_embeddings=tied))
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    plain = losses_and_gradients(model)
    assert install_loss_head(model) and install_loss_head(model)
    found = losses_and_gradients(model)
    assert found.keys() == plain.keys()
    assert all(gradient.norm() > 0 for name, gradient in plain.items() if name.endswith(".B"))
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_in_bf16() -> None:
    """The losses are those of whole logits, which are bf16 in both cases."""
    model = adapted(tiny_llama(torch.bfloat16))
    plain = losses_and_gradients(model)
    assert install_loss_head(model)
    found = losses_and_gradients(model)
    torch.testing.assert_close(found["losses"], plain["losses"], rtol=1e-6, atol=2e-6)
    for name, gradient in plain.items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm(), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_keeps_its_parameters(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    before, count = dict(model.named_parameters(remove_duplicate=False)), count_base_parameters(model)
    names = list(model.state_dict())
    assert install_loss_head(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(before) == list(after) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == names and count_base_parameters(model) == count
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert isinstance(model.get_output_embeddings(), LossHead) and not model.lm_head.training


def test_a_plain_head_but_for_losses() -> None:
    """Also after a forward that failed."""
    model, ids = tiny_llama().requires_grad_(False), torch.arange(7)[None]
    wanted = model(input_ids=ids).logits
    assert install_loss_head(model)
    with (
        pytest.raises(ValueError, match="3 targets for 7 rows"),
        model.lm_head.loss_at(torch.zeros(3, dtype=torch.long)),
    ):
        model(input_ids=ids)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)


def test_a_hook_that_fails_leaves_no_losses() -> None:
    model, ids = tiny_llama().requires_grad_(False), torch.arange(7)[None]
    wanted = model(input_ids=ids).logits
    assert install_loss_head(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("a hook")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook"), model.lm_head.loss_at(torch.zeros(7, dtype=torch.long)):
        model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)


def test_nothing_to_learn() -> None:
    """A micro-batch of prompts alone: no losses, and gradients that are zero, not missing."""
    model = adapted(tiny_llama())
    assert install_loss_head(model)
    prompt = collate([Sample(0, 0, np.arange(5, dtype=np.int32), 5)])
    set_token_keys(model, prompt, 0, 1)
    losses = cross_entropies(model, prompt)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in adapter_parameters(model) if n.endswith(".B"))


def test_hooks_see_nothing_to_go_back_through() -> None:
    """ZeRO-3 would gather the weight for the backward of any output that has one."""
    model = adapted(tiny_llama())
    assert install_loss_head(model)
    seen = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    assert cross_entropies(model, batch()).requires_grad
    assert seen == [False]


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (Gemma2Config(**SIZES, head_dim=12), False),
        (Gemma2Config(**SIZES, head_dim=12, final_logit_softcapping=None), True),
        (CohereConfig(**SIZES), False),
        (GraniteConfig(**SIZES, logits_scaling=8.0), False),
        (Qwen2Config(**SIZES), True),
        (MixtralConfig(**SIZES, num_local_experts=2), True),
    ],
    ids=["gemma2", "gemma2-uncapped", "cohere", "granite", "qwen2", "mixtral"],
)
def test_a_model_that_changes_logits_keeps_its_head(config: Any, plain: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    head, modules = model.get_output_embeddings(), [name for name, _ in model.named_modules()]
    before = cross_entropies(model, batch())
    assert install_loss_head(model) == plain
    assert (model.get_output_embeddings() is head) != plain
    assert [name for name, _ in model.named_modules()] == modules
    torch.testing.assert_close(cross_entropies(model, batch()), before)


class Halved(LlamaForCausalLM):
    """Changes the logits in the very tensor that the head gave."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits.mul_(0.5)
        return output


def test_a_change_in_place_is_a_change() -> None:
    assert install_loss_head(tiny_llama())
    assert not install_loss_head(Halved(tiny_config()))


def test_a_head_that_learns_gives_logits() -> None:
    """Adapted, or not frozen: its weight's gradient is not among what the losses give."""
    whole = tiny_llama()
    assert install_loss_head(whole)
    assert loss_head(whole) is None
    cross_entropies(whole, batch()).sum().backward()
    assert whole.lm_head.weight.grad.norm() > 0
    model = tiny_llama()
    assert install_loss_head(model)
    adapted(model, (*DEFAULT_TARGETS, "lm_head"), dropout=0)
    assert isinstance(model.lm_head, MixtureLinear) and loss_head(model) is None
    assert losses_and_gradients(model)["lm_head.B"].norm() > 0
