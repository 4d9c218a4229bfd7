"""What `get_malora_model` makes of a model: still the model it was, with the methods that PEFT's users know."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from malora_dist import MaloraConfig, MaloraModel, get_malora_model
from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.loading import load_adapter
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.errors import CheckpointError, ConfigError
from tests.families import family_model
from tests.hub import local_hub
from tests.multiprocess import ROOT
from tests.tiny_models import save_tiny_llama, tiny_llama

IDS = torch.arange(40)[None] % 61
SMALL: dict[str, Any] = {"r": 3, "num_experts": 4}


def fill(model: nn.Module, start: int = 0) -> None:
    """Let the adapter in the model do something."""
    for number, (_, layer) in enumerate(mixture_layers(model)):
        nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(start + number))


def adapted(model: Any = None, **arguments: Any) -> Any:
    found: Any = get_malora_model(tiny_llama() if model is None else model, MaloraConfig(**SMALL | arguments))
    fill(found)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_what_it_was_until_unload_gives_it_back(method: str) -> None:
    from transformers import LlamaForCausalLM, PreTrainedModel

    model = tiny_llama()
    before = logits(model)
    found: Any = get_malora_model(model, MaloraConfig(method=method, **SMALL))
    assert found is model and isinstance(model, MaloraModel) and isinstance(model, PreTrainedModel)
    assert (
        type(model).__name__ == "LlamaForCausalLM" and type(model).from_pretrained == LlamaForCausalLM.from_pretrained
    )
    assert torch.equal(logits(model), before)
    fill(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with found.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert model.generate(IDS[:, :5], max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert found.unload() is model and type(model) is LlamaForCausalLM
    assert torch.equal(logits(model), before) and all(parameter.requires_grad for parameter in model.parameters())
    assert "save_pretrained" not in vars(model)


def test_trained_weights_are_counted_and_printed_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj"]
    get_malora_model(
        tiny_llama(), MaloraConfig(method="lora", r=3, target_modules=targets)
    ).print_trainable_parameters()
    get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=targets)).print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs and "trainable params: " in ours


@pytest.mark.parametrize("fuse_projections", [False, True])
def test_named_adapters_take_turns(tmp_path: Path, fuse_projections: bool) -> None:
    """They differ in method, numbers and targets, and each computes what it would alone."""
    configs = {
        "default": MaloraConfig(**SMALL, fuse_projections=fuse_projections),
        "other": MaloraConfig(method="lora", r=2, target_modules=["o_proj", "up_proj"]),
        "third": MaloraConfig(method="hydralora", r=2, num_experts=3, target_modules="all-linear", seed=5),
    }
    model: Any = get_malora_model(tiny_llama(), configs["default"])
    base = logits(tiny_llama())
    alone = {}
    for number, (name, config) in enumerate(configs.items()):
        if name != "default":
            model.add_adapter(name, config)
        assert model.active_adapter == "default"
        model.set_adapter(name)
        fill(model, 100 * number)
        single: Any = get_malora_model(tiny_llama(), config)
        fill(single, 100 * number)
        alone[name] = logits(single)
        assert torch.equal(logits(model), alone[name]), name
        model.set_adapter("default")
    for name in ("third", "default", "other", "default"):
        model.set_adapter(name)
        assert model.active_adapters == [name] and torch.equal(logits(model), alone[name])
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for _, p in adapter_parameters(model)}
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other"), ("third", tmp_path / "third")):
        loaded = tiny_llama()
        load_adapter(loaded, folder)
        torch.testing.assert_close(logits(loaded), alone[name])
    model.double().float()
    model.delete_adapter("default")
    assert model.active_adapter == "other" and torch.equal(logits(model), alone["other"])
    model.set_adapter("third")
    assert torch.equal(logits(model), alone["third"])
    assert torch.equal(logits(model.unload()), base)


def test_what_is_trained_beside_the_adapter_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", MaloraConfig(**SMALL))
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"^lm_head.weight is trained and no part of the adapter"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_all_names_are_checked_before_an_adapter_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter_name='y' must be one of default"):
        adapted().save_pretrained(tmp_path / "none", selected_adapters=["default", "y"])
    assert not (tmp_path / "none").exists()


def test_a_misspelled_argument_of_save_pretrained_is_refused(tmp_path: Path) -> None:
    plain = tiny_llama()
    inject_adapters(plain, mixture_spec("lora", r=2))
    for model in (adapted(), plain):
        with pytest.raises(TypeError, match="unexpected keyword argument 'is_main_proces'"):
            model.save_pretrained(tmp_path / "none", is_main_proces=False)
        assert not (tmp_path / "none").exists()
        with pytest.raises(ConfigError, match="upload its folder by huggingface_hub.upload_folder"):
            model.save_pretrained(tmp_path / "none", push_to_hub=True)
        model.save_pretrained(tmp_path / "some", safe_serialization=True, max_shard_size="5GB")


def test_parked_adapters_move_with_the_model() -> None:
    model = adapted()
    model.add_adapter("other", MaloraConfig(method="lora", r=2))
    model.double()
    model.set_adapter("other")
    assert {parameter.dtype for _, parameter in adapter_parameters(model)} == {torch.float64}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model: model.set_adapter("x"), "adapter_name='x' must be one of default"),
        (lambda model: model.delete_adapter("default"), "adapter_name='default' is the only adapter"),
        (lambda model: model.add_adapter("default", MaloraConfig()), "'default' is the name of an adapter"),
        (lambda model: model.add_adapter("../up", MaloraConfig()), "must be a name that a folder can have"),
        (lambda model: model.add_adapter("x", MaloraConfig(target_modules="nope")), "'nope' matches no module"),
        (lambda model: get_malora_model(model, MaloraConfig()), "has the adapters default: add_adapter adds another"),
        (lambda model: model.save_pretrained("x", push_to_hub=True), "push_to_hub=True"),
        (lambda model: model.save_pretrained("x", selected_adapters=["y"]), "adapter_name='y' must be one of"),
    ],
)
def test_what_is_refused_changes_nothing(act: Callable[[Any], Any], message: str) -> None:
    model = adapted()
    before = logits(model)
    with pytest.raises(ConfigError, match=message) as error:
        act(model)
    assert "adapter.target" not in str(error.value)
    assert model.active_adapter == "default" and list(model.malora_config) == ["default"]
    assert torch.equal(logits(model), before)


def test_a_model_that_could_not_be_adapted_is_the_model_it_was() -> None:
    model = tiny_llama()
    kind = type(model)
    with pytest.raises(ConfigError, match="target_modules: 'nope' matches no module"):
        get_malora_model(model, MaloraConfig(target_modules=["nope"]))
    assert type(model) is kind and "malora_adapters" not in vars(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_comes_from_a_folder_under_a_name(tmp_path: Path, method: str) -> None:
    model = adapted(method=method, lora_dropout=0.1, router_aux_loss_coef=0.25)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded: Any = MaloraModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval())) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.malora_config["default"].router_aux_loss_coef == 0.25
    other: Any = get_malora_model(tiny_llama(), MaloraConfig(method="lora", r=2))
    result = other.load_adapter(tmp_path, "second", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert other.active_adapter == "default"
    other.set_adapter("second")
    assert torch.equal(logits(other.eval()), logits(model)) and all(
        p.requires_grad for _, p in adapter_parameters(other)
    )
    fill(other, 77)
    other.load_adapter(tmp_path, "second")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(CheckpointError, match="the adapter 'default' of the model"):
        other.load_adapter(tmp_path, "default")


def test_a_damaged_or_foreign_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    adapted(tiny_llama(hidden_size=32)).save_pretrained(tmp_path)
    base = tiny_llama()
    with pytest.raises(CheckpointError, match="this base"):
        MaloraModel.from_pretrained(base, tmp_path)
    assert not isinstance(base, MaloraModel) and not list(mixture_layers(base))
    model = adapted()
    before = logits(model)
    with pytest.raises(CheckpointError, match="this base"):
        model.load_adapter(tmp_path, "other")
    assert list(model.malora_config) == ["default"] and torch.equal(logits(model), before)


def test_an_adapter_that_cannot_be_loaded_leaves_the_active_one_active(tmp_path: Path) -> None:
    adapted(tiny_llama(hidden_size=32)).save_pretrained(tmp_path)
    model = adapted()
    for number, name in enumerate(("second", "third")):
        model.add_adapter(name, MaloraConfig(**SMALL))
        model.set_adapter(name)
        fill(model, 50 * number)
    model.set_adapter("second")
    before, trained = logits(model), {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(CheckpointError, match="this base"):
        model.load_adapter(tmp_path, "fourth")
    assert model.active_adapter == "second" and list(model.malora_config) == ["default", "second", "third"]
    assert torch.equal(logits(model), before) and {id(p) for p in model.parameters() if p.requires_grad} == trained


def test_an_adapter_of_peft_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    ours = MaloraModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))


def test_an_adapter_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "served")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with local_hub({"me/adapter": tmp_path / "served"}) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        loaded = MaloraModel.from_pretrained(tiny_llama(), "me/adapter")
        with pytest.raises(CheckpointError, match="me/none: there is no such folder, and it cannot be downloaded"):
            MaloraConfig.from_pretrained("me/none")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_models_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    model = adapted(fuse_projections=True)
    model.add_adapter("other", MaloraConfig(method="lora", r=2))
    twin = duplicate(model)
    assert isinstance(twin, MaloraModel) and twin.malora_adapters is not model.malora_adapters
    assert torch.equal(logits(twin), logits(model))
    twin.set_adapter("other")
    fill(twin)
    assert model.active_adapter == "default" and not torch.allclose(logits(twin), logits(model), atol=1e-2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", r".*\.0\.mlp\..*"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "layers_to_transform": 0, "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {"q_proj": 5}, "fuse_projections": True},
        {"method": "lora", "rank_pattern": {"q_proj": 5}, "target_modules": ["q_proj", "v_proj"]},
        {"method": "dora", "alpha_pattern": {r"layers\.1\..*": 3}},
    ],
)
def test_single_layers_have_their_own_numbers_and_come_back(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = adapted(**arguments)
    config, layers = model.malora_config["default"], dict(mixture_layers(model))
    assert layers and all(layer.spec == config.spec.of_layer(name) for name, layer in layers.items())
    model.save_pretrained(tmp_path)
    loaded = MaloraModel.from_pretrained(tiny_llama(), tmp_path)
    assert [name for name, _ in mixture_layers(loaded)] == list(layers)
    assert torch.equal(logits(loaded), logits(model))
    if config.method in ("lora", "dora"):
        from peft import PeftModel

        torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path))), logits(model))


def test_peft_chooses_the_same_linears() -> None:
    from peft import LoraConfig, get_peft_model

    for arguments in (
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"target_modules": r".*\.(q_proj|up_proj)", "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
    ):
        theirs = get_peft_model(tiny_llama(), LoraConfig(r=2, **arguments))  # type: ignore[arg-type]
        wanted = {name.removeprefix("base_model.model.").removesuffix(".lora_A") for name, _ in theirs.named_modules()
                  if name.endswith(".lora_A")}  # fmt: skip
        assert {name for name, _ in mixture_layers(adapted(**arguments))} == wanted, arguments


def test_what_peft_makes_of_a_mixture(tmp_path: Path) -> None:
    """It names the type, and takes no method that its enumeration lacks: docs/library.md says so."""
    from peft import PeftModel
    from peft.utils import register_peft_method

    adapted().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="MALORA"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    with pytest.raises(ValueError, match="Unknown PEFT type MALORA, please add an entry to peft.utils.peft_types"):
        register_peft_method(name="malora", config_cls=MaloraConfig, model_cls=MaloraModel)


def test_a_bf16_base_trains_fp32_adapters() -> None:
    model = adapted(tiny_llama(torch.bfloat16)).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for _, p in adapter_parameters(model))


def test_nothing_left_of_the_targets_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"no module is left after exclude_modules=\['q_proj'\], layers_to_transform=None"
    ):
        adapted(target_modules=["q_proj"], exclude_modules=["q_proj"])


@pytest.mark.parametrize(
    ("family", "leaves"),
    [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_families_whose_linears_have_other_names(family: str, leaves: set[str]) -> None:
    """Without target_modules all linears but the head are adapted: Conv1D, and projections that the model fuses."""
    model = family_model(family)
    found: Any = get_malora_model(model, MaloraConfig(**SMALL))
    assert {name.rpartition(".")[2] for name, _ in mixture_layers(found)} == leaves
    fill(found)
    found.train()(IDS % 31, labels=IDS % 31).loss.backward()
    assert all(parameter.grad is not None for _, parameter in adapter_parameters(found))


@pytest.mark.e2e
def test_the_api_needs_no_deepspeed_and_no_peft(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["deepspeed"] = sys.modules["peft"] = None
from malora_dist import MaloraConfig
config = MaloraConfig(r=2)
assert "torch" not in sys.modules
from malora_dist import MaloraModel, aux_loss, get_malora_model
from tests.tiny_models import tiny_llama
import torch
model, ids = get_malora_model(tiny_llama(), config).train(), torch.arange(20)[None]
model(ids, labels=ids).loss.backward()
model.save_pretrained(sys.argv[1])
MaloraModel.from_pretrained(tiny_llama(), sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_plain_module() -> None:
    model: Any = get_malora_model(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), MaloraConfig(**SMALL, target_modules=["0", "2"])
    )
    assert model(torch.ones(3, 6)).shape == (3, 2) and isinstance(model, nn.Sequential) and len(model) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_bitsandbytes_has_quantised(tmp_path: Path, bits: int) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128, noise=0.0)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    model: Any = adapted(base)
    plain, total = tiny_llama(hidden_size=64, intermediate_size=128), model.get_nb_trainable_parameters()
    assert total[1] - total[0] == sum(parameter.numel() for parameter in plain.parameters())
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for _, parameter in adapter_parameters(model))
    with pytest.raises(ConfigError, match="num_experts=4"):
        model.merge_and_unload()
    model.add_adapter("one", MaloraConfig(method="lora", r=2))
    model.set_adapter("one")
    with pytest.raises(ConfigError, match="whose weight is quantised"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    before = adapter_state_dict(model)
    model.set_adapter("default")
    loaded = tiny_llama(hidden_size=64, intermediate_size=128)
    load_adapter(loaded, tmp_path / "adapter")
    saved = adapter_state_dict(loaded)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter_state_dict(model).items()) and before


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "lora"},
        {"method": "dora"},
        *({"method": m, "num_experts": 1, "top_k": 1, "shared_r": 4} for m in ("malora", "molora", "hydralora")),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_expert_is_merged_into_the_weights(family: str, arguments: dict[str, Any]) -> None:
    model = tiny_llama(torch.float64) if family == "llama" else family_model(family).double()
    kind = type(model)
    ours: Any = adapted(model, **arguments).double()
    ids = IDS % 31
    with torch.no_grad():
        wanted = ours(ids).logits
        merged = ours.merge_and_unload()
        assert type(merged) is kind
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [3e38, float("inf")])
def test_a_merge_that_fails_in_the_middle_leaves_the_base_as_it_was(value: float) -> None:
    model = adapted(tiny_llama(torch.bfloat16), method="lora").to(torch.bfloat16)
    name, layer = list(mixture_layers(model))[-1]
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        layer.B.fill_(value)
        layer.expert_down.fill_(1e3)
    with pytest.raises(ConfigError, match=f"^{name}.weight is not finite in torch.bfloat16 with the adapter in it$"):
        model.merge_and_unload()
    with torch.no_grad():
        for factor, parameter in layer.factors():
            parameter.copy_(weights[f"{name}.{factor}"])
    assert all(torch.equal(parameter, weights[n]) for n, parameter in model.named_parameters())
    assert isinstance(model, MaloraModel) and torch.equal(logits(model), before)


def test_a_compiled_model_has_the_same_loss_and_gradients() -> None:
    """docs/library.md says with which settings."""
    model = adapted(tiny_llama(num_hidden_layers=1), computation="dense", target_modules=["q_proj"]).train()
    found = []
    torch.compiler.reset()
    for function in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = function(IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for _, parameter in adapter_parameters(model))])
    torch.testing.assert_close(found[1], found[0])


def test_what_is_not_planned_is_not_there_in_part() -> None:
    """docs/library.md lists these."""
    model = adapted()
    assert not [n for n in ("merge_adapter", "unmerge_adapter", "add_weighted_adapter") if hasattr(model, n)]
    with pytest.raises(ConfigError, match="adapter_names: one adapter is active at a time"):
        model(IDS, adapter_names=["default"])


def test_several_experts_and_tied_heads_are_not_merged() -> None:
    model = adapted()
    before = logits(model)
    with pytest.raises(ConfigError, match="num_experts=4: its router weighs the experts anew for every token"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    tied = adapted(tiny_llama(tie_word_embeddings=True), method="lora", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="lm_head is tied to model.embed_tokens"):
        tied.merge_and_unload()
