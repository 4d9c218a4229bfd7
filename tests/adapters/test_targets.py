"""Targets of adapters on every family: what is meant by them, and what is said of those that mean nothing."""

import doctest
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters import near_names as names_module
from malora_dist.adapters import target_names, text_linears
from malora_dist.adapters import targets as targets_module
from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.near_names import near_names
from malora_dist.adapters.target_names import ALL_LINEAR, Narrowing
from malora_dist.adapters.targets import all_linear, check_targets, find_targets, plain_names
from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.errors import ConfigError
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys
from malora_dist.training.balance_loss import BalanceSettings, StepBalance
from tests.evaluation.test_packing import REFUSED
from tests.families import families, family_model
from tests.tiny_models import tiny_llama

LORA = mixture_spec("lora", r=2)
# Two ways for every pair of letters, none of which ends as it should.
SLOW = r"(.|..)+(?<!\w)"
MALORA = mixture_spec("malora", num_experts=4, r=2, shared_r=2)
# Reversible layers for texts of one length, and a kernel that is compiled where it is used.
OTHERS = ("reformer", "rwkv")
IDS = torch.arange(3, 19)[None]


@pytest.mark.parametrize("family", [family for family in families() if family not in OTHERS])
def test_all_linear_of_every_family(family: str) -> None:
    """The adapted model starts as its base bit for bit, and in training a gradient reaches every factor."""
    model = family_model(family)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        inject_adapters(model, MALORA, [ALL_LINEAR], fuse_projections=True)
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    if family in REFUSED:
        return
    train_on(model, Sample(0, 0, IDS[0].numpy().astype(np.int32), 3))
    assert not {name for name, parameter in adapter_parameters(model) if parameter.grad is None}


def train_on(model: Any, sample: Sample) -> None:
    """One micro-batch, as a run trains on it."""
    batch = collate([sample])
    balance = StepBalance(model.train(), BalanceSettings(0.01, "mean", "global"), 1, 1, torch.device("cpu"))
    balance.start(torch.tensor(float(len(sample.input_ids)), dtype=torch.float64), 1)
    set_token_keys(model, batch, 0, 1)
    (cross_entropies(model, batch).sum() + balance.add(batch)).backward()


@pytest.mark.parametrize(
    ("family", "leaves"),
    [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("phi", {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_what_all_linear_means(family: str, leaves: set[str]) -> None:
    assert {name.rpartition(".")[2] for name in all_linear(family_model(family))} == leaves


def test_parts_for_pictures_are_not_meant() -> None:
    """A model of pictures and text has `q_proj` in both; text trains one of them."""
    found = find_targets(family_model("gemma3"), ["q_proj"], LORA)["q_proj"]
    assert found == [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)]


def test_patterns_match_whole_names() -> None:
    model = tiny_llama()
    pattern = r"model\.layers\.[01]\.mlp\.(up|down)_proj"
    assert len(find_targets(model, [pattern], LORA)[pattern]) == 4
    with pytest.raises(ConfigError, match="matches no linear"):
        find_targets(model, [r"mlp\.(up|down)_proj"], LORA)
    for pattern, why in ((r"mlp\.(up", "missing"), ("a{99999999999999999999}", "the repetition number")):
        with pytest.raises(ConfigError, match=f"is not a valid regular expression: {why}"):
            find_targets(model, [pattern], LORA)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ([ALL_LINEAR], ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ([r".*\.up_proj"], ("up_proj",)),
        ([r".*\.1\..*up_proj"], ("model.layers.1.mlp.up_proj",)),
        (["layers.1.mlp.up_proj"], ("layers.1.mlp.up_proj",)),
    ],
)
def test_files_name_ends_of_names(targets: list[str], names: tuple[str, ...]) -> None:
    """PEFT reads a list of targets as ends of names; the same linears are found by them again."""
    model = tiny_llama()
    found = find_targets(model, targets, LORA)
    assert plain_names(model, found) == names
    again = find_targets(model, names, LORA)
    assert sorted(sum(again.values(), [])) == sorted(sum(found.values(), []))
    assert inject_adapters(model, LORA, targets).target_modules == names


def test_all_mistakes_are_said_at_once_with_the_linears_there_are() -> None:
    targets = ["gate_proj", "o_proj", "mlp", "self_attn.q_proj", "q_proj"]
    with pytest.raises(ConfigError) as caught:
        find_targets(family_model("phi"), targets, mixture_spec("malora", r=2, shared_r=40))
    message = str(caught.value)
    assert ". The model's linears are" in message
    for part in (
        "target_modules: 'gate_proj' matches no module of the model, did you mean fc1?",
        "'o_proj' matches no module of the model, did you mean dense?",
        "'mlp' matches model.layers.0.mlp (PhiMLP), which is not a linear layer",
        "'self_attn.q_proj' and 'q_proj' both match model.layers.0.self_attn.q_proj",
        "shared_r=40 must be at most the 32 inputs of model.layers.0.self_attn.q_proj",
        "dense (32 -> 32), fc1 (32 -> 48), fc2 (48 -> 32)",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("target", "family", "near"),
    [
        ("qproj", "llama", ["q_proj"]),
        ("q_proj", "phi3", ["qkv_proj"]),
        ("gate_proj", "phi3", ["gate_up_proj"]),
        ("v_proj", "gpt2", ["c_attn"]),
        ("down_proj", "gpt_neox", ["dense_4h_to_h"]),
        ("query_key_values", "gpt_neox", ["query_key_value"]),
        ("Wqkv", "mixtral", ["q_proj", "k_proj", "v_proj"]),
        ("banana", "llama", []),
    ],
)
def test_near_names_are_spelled_alike_or_do_the_same_work(target: str, family: str, near: list[str]) -> None:
    assert near_names(target, [name.rpartition(".")[2] for name in all_linear(family_model(family))]) == near


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_proj", "lm_head"], "'lm_head' matches lm_head, the output head.*all-linear means every other"),
        ("bart", ["k_proj"], r"encoder_attn\.k_proj and 1 more that text gives no gradient"),
        ("deepseek_v32", ["wk"], "only choose"),
        ("zaya", ["v_proj_delayed"], "or read something else"),
        (
            "phi",
            ["gate_proj", "lm_head"],
            "'gate_proj' matches no module.*; 'lm_head' matches lm_head, the output head",
        ),
    ],
)
def test_what_a_run_cannot_train_is_refused(family: str, targets: list[str], message: str) -> None:
    model = family_model(family)
    with pytest.raises(ConfigError, match=f"adapter.target_modules: .*{message}"):
        check_targets(model, targets, LORA)


class Wrapped(nn.Module):
    """A linear inside of a module of the user's, with another behind it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(inner.out_features, inner.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.inner(x))  # type: ignore[no-any-return]


def test_linears_that_a_user_has_put_on_a_model_are_meant() -> None:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.o_proj = Wrapped(attention.o_proj)
    found = all_linear(model)
    assert {f"model.layers.0.self_attn.o_proj.{name}" for name in ("inner", "extra")} < set(found)
    assert len(found) == 2 * 7 + 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_one_twin_is_asked(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds for a large model."""
    made, twin = [], text_linears._twin
    monkeypatch.setattr(text_linears, "_twin", lambda *arguments: made.append(arguments) or twin(*arguments))
    check_targets(family_model(family), [ALL_LINEAR], LORA)
    assert len(made) == 1


def test_targets_of_models_that_are_none_of_transformers() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.ModuleDict({"out": nn.Linear(6, 2)}))
    assert all_linear(model) == ["0", "2.out"]
    check_targets(model, [ALL_LINEAR], LORA)


@pytest.mark.parametrize("arguments", [{}, {"exclude_modules": (SLOW,)}, {"layers_pattern": (SLOW,)}])
def test_a_pattern_that_never_ends_is_stopped(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_names, "LONGEST_SECONDS", 0.05)
    model, narrowing = tiny_llama(), Narrowing(**arguments, layers_to_transform=(0,))
    with pytest.raises(ConfigError, match=r"the pattern '.*\(.\|..\)\+.*' takes more than 0.05 s for the name '"):
        find_targets(model, ["q_proj"] if arguments else [SLOW], MALORA, narrowing)


@pytest.mark.parametrize("module", [targets_module, names_module, target_names])
def test_examples_in_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
