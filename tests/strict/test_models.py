"""A base of every kind read onto the device, an adapter put on it, asked in every way: the answers of the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import adapter_state_dict, mixture_layers
from malora_dist.adapters.inject import inject_adapters, remove_adapters
from malora_dist.adapters.io.folder import AdapterInfo, save_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.adapters.methods import mixture_spec
from malora_dist.bench.strict.device import StrictDevice
from malora_dist.data.encode import ChoiceItem
from malora_dist.evaluation.scoring import score_items
from malora_dist.evaluation.tasks import forward_of
from malora_dist.models.load import load_base_model
from tests.tiny_models import tiny_llama

TARGETS = ("q_proj", "v_proj", "down_proj")
BASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32, "load_in_4bit": False},
    "bf16": {"dtype": torch.bfloat16, "load_in_4bit": False},
    "nf4": {"dtype": torch.float32, "load_in_4bit": True},
    "nf4-double": {"dtype": torch.float32, "load_in_4bit": True, "double_quant": True},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder, and the folder of an adapter that matters in `adapter`."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    info = AdapterInfo(
        spec=mixture_spec("malora", num_experts=4, r=3),
        target_modules=TARGETS,
        base_model=str(tmp_path / "model"),
        lora_dropout=0.1,
    )
    inject_adapters(model, info.spec, TARGETS)
    for number, (_, layer) in enumerate(mixture_layers(model)):
        torch.nn.init.normal_(layer.B, std=0.3, generator=torch.Generator().manual_seed(number))
    save_adapter(tmp_path / "adapter", info, adapter_state_dict(model), "# a card\n")
    return tmp_path


@torch.no_grad()
def answers(folder: Path, base: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Logits, the tokens of a generation and scores of packed questions."""
    model = load_base_model(folder / "model", device=device, **base)
    bare = [parameter.cpu() for parameter in model.parameters()]
    load_adapter(model, folder / "adapter")
    ids = torch.tensor([[3, 60, 17, 0, 5]], device=device)

    items = [ChoiceItem(0, (5, 7, 9), ((1, 2), (3,)), (1, 1), 0), ChoiceItem(0, (8,), ((4, 4), (6, 1, 2)), (1, 1), 1)]
    scores = score_items(forward_of(model), items, batch_tokens=64, device=device)
    found = {
        "weights": torch.cat([values.flatten().double() for values in bare]),
        "logits": model(input_ids=ids, use_cache=False).logits.float(),
        "tokens": model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        ),
        "scores": torch.tensor([scores[choice] for choice in sorted(scores)]),
    }
    remove_adapters(model)
    found["bare logits"] = model(input_ids=ids, use_cache=False).logits.float()
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("base", list(BASES))
def test_a_base_answers_as_on_the_cpu(strict: StrictDevice, folder: Path, base: str) -> None:
    wanted = answers(folder, BASES[base], "cpu")
    assert not strict.counts.launches
    found = answers(folder, BASES[base], "strict")
    assert torch.equal(found["weights"], wanted["weights"])
    assert base == "bf16" or torch.equal(found["tokens"], wanted["tokens"])
    # Not bit for bit: the CPU has an attention kernel of its own.
    error = 0.05 if base == "bf16" else 1e-5
    for name in ("logits", "bare logits", "scores"):
        apart = (found[name] - wanted[name]).abs().max() / wanted[name].abs().max()
        assert apart < error, name
    assert not torch.allclose(wanted["logits"], wanted["bare logits"], rtol=0.1)
