"""Putting adapters on a model: what matches, what is refused, what is trained; and the model under checkpointing."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from malora_dist.adapters.adapted_layers import (
    adapter_parameters,
    adapter_state_dict,
    count_base_parameters,
    mixture_layers,
)
from malora_dist.adapters.inject import inject_adapters, layer_seed, remove_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters
from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.adapters.targets import fused_experts
from malora_dist.errors import ConfigError
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.balance import expert_statistics, load_balancing_loss
from malora_dist.ops.dropout import token_keys
from malora_dist.ops.nf4 import quantize_nf4
from tests.families import family_model, without_compiler
from tests.tiny_models import tiny_llama

MALORA = mixture_spec("malora", num_experts=4, r=3, shared_r=6)
SIZES = {"q_proj": (48, 48), "k_proj": (48, 24), "v_proj": (48, 24), "gate_proj": (48, 80), "up_proj": (48, 80),
         "down_proj": (80, 48)}  # fmt: skip
IDS = torch.arange(40)[None] % 61


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_adapted_model_starts_as_its_base_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    base = model(IDS[:, :8]).logits
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3), lora_dropout=0.1)
    assert torch.equal(model(IDS[:, :8]).logits, base)
    assert torch.equal(model.train()(IDS[:, :8]).logits, base)
    assert len(list(mixture_layers(model))) == 12


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_fp32_under_every_default_dtype(method: str) -> None:
    """As where a model is built in the dtype of its checkpoint; the same values, too."""
    plain, other = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    spec = mixture_spec(method, num_experts=4, r=3)
    inject_adapters(plain, spec)
    torch.set_default_dtype(torch.bfloat16)
    try:
        inject_adapters(other, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = dict(adapter_parameters(plain))
    for name, parameter in adapter_parameters(other):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_report_and_trainable_parameters(method: str) -> None:
    model, spec = tiny_llama(), mixture_spec(method, num_experts=4, r=3)
    before = dict(model.named_parameters())
    base_parameters = sum(p.numel() for p in before.values())
    report = inject_adapters(model, spec)
    assert [(row.target, row.modules, row.in_features, row.out_features) for row in report.rows] == [
        (target, 2, *SIZES[target]) for target in DEFAULT_TARGETS
    ]
    assert [row.trainable_parameters for row in report.rows] == [
        2 * count_parameters(spec, *SIZES[target]) for target in DEFAULT_TARGETS
    ]
    trainable = {
        re.sub(r"\.(input_projection|dora)", "", name): p for name, p in model.named_parameters() if p.requires_grad
    }
    assert report.trainable_parameters == sum(p.numel() for p in trainable.values())
    assert set(trainable) == {name for name, _ in adapter_parameters(model)}
    assert {id(p) for p in model.parameters() if not p.requires_grad} == {id(p) for p in before.values()}
    assert report.base_parameters == base_parameters == count_base_parameters(model)
    assert report.adapted_parameters == 2 * sum(n * m for n, m in SIZES.values())
    assert report.quantized_parameters == 0


def test_report_counts_the_weights_a_blob_stands_for() -> None:
    model = tiny_llama(attention_bias=True)
    expected = count_base_parameters(model)
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "o_proj"):
        linear = getattr(attention, name)
        packed = quantize_nf4(linear.weight)
        quantized = NF4Linear(packed, linear.bias.detach(), linear.in_features, linear.out_features, False)
        setattr(attention, name, quantized)
    report = inject_adapters(model, MALORA)
    assert report.base_parameters == expected
    assert report.quantized_parameters == 2 * 48 * 48
    assert isinstance(attention.q_proj, MixtureLinear) and isinstance(attention.q_proj.base_layer, NF4Linear)
    assert isinstance(attention.o_proj, NF4Linear)


def test_values_depend_on_seed_and_name_alone() -> None:
    """Not on the order of targets, on what else is adapted, or on the state of a process's generator."""

    def state(targets: Any, seed: int) -> dict[str, Tensor]:
        model = tiny_llama()
        torch.rand(3)
        inject_adapters(model, MALORA, targets, seed=seed)
        return adapter_state_dict(model)

    first = state(DEFAULT_TARGETS, 7)
    for name, tensor in state(DEFAULT_TARGETS[::-1], 7).items():
        assert torch.equal(tensor, first[name]), name
    few = state(["up_proj", "o_proj"], 7)
    shared = [name for name in few if "up_proj" in name]
    assert len(shared) == 8 and all(torch.equal(few[name], first[name]) for name in shared)
    other_seed = state(DEFAULT_TARGETS, 8)
    assert all(not torch.equal(first[n], other_seed[n]) for n in first if not n.endswith(".B"))
    assert not torch.equal(first["model.layers.0.mlp.up_proj.P"], first["model.layers.1.mlp.up_proj.P"])
    assert not torch.equal(first["model.layers.0.mlp.up_proj.P"], first["model.layers.0.mlp.gate_proj.P"])


def test_seed_of_a_name_is_the_same_in_every_process() -> None:
    assert layer_seed(42, "model.layers.0.mlp.up_proj") == 664241425  # Python's own hash differs by process
    assert 0 <= layer_seed(0, "x") < 2**31


def test_state_dict_names_every_factor() -> None:
    model = tiny_llama()
    inject_adapters(model, MALORA)
    state = adapter_state_dict(model)
    assert len(state) == 2 * 6 * 4
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if "layers.1.mlp.down" in name} == {
        "model.layers.1.mlp.down_proj.gate": (4, 80),
        "model.layers.1.mlp.down_proj.shared_A": (6, 80),
        "model.layers.1.mlp.down_proj.P": (4, 3, 6),
        "model.layers.1.mlp.down_proj.B": (4, 48, 3),
    }
    assert not any(tensor.requires_grad for tensor in state.values())


def test_layers_that_read_the_same_tensor_drop_the_same_numbers() -> None:
    model = tiny_llama()
    inject_adapters(model, MALORA, [*DEFAULT_TARGETS, "o_proj"], seed=3)
    salts = {
        name.removeprefix("model.layers."): layer.input_projection.input_salt for name, layer in mixture_layers(model)
    }
    for block in "01":
        assert salts[f"{block}.self_attn.q_proj"] == salts[f"{block}.self_attn.k_proj"]
        assert salts[f"{block}.self_attn.q_proj"] == salts[f"{block}.self_attn.v_proj"]
        assert salts[f"{block}.mlp.gate_proj"] == salts[f"{block}.mlp.up_proj"]
    assert len(set(salts.values())) == 2 * 4  # attention, o_proj, mlp and down_proj of each block
    assert all(0 <= salt < 2**31 for salt in salts.values())  # a mask's integers have 32 bits


def test_a_suffix_with_dots_picks_modules() -> None:
    model = tiny_llama()
    inject_adapters(model, MALORA, ["layers.1.mlp.up_proj", "self_attn.o_proj"])
    assert [name for name, _ in mixture_layers(model)] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("qproj", ["'qproj'", "did you mean q_proj? The model's linears are"]),
        ("w13", ["'w13'", "down_proj", "lm_head", "v_proj"]),
        ("proj", ["'proj'", "q_proj"]),  # the end of a name, but not a name
        ("mlp", ["'mlp'", "model.layers.0.mlp", "LlamaMLP", "not a linear layer"]),
        ("embed_tokens", ["'embed_tokens'", "Embedding"]),
    ],
)
def test_a_wrong_target_is_named_and_nothing_is_changed(target: str, named: list[str]) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError) as caught:
        inject_adapters(model, MALORA, ["q_proj", target])
    assert all(name in str(caught.value) for name in ["target_modules", *named]), str(caught.value)
    assert not list(mixture_layers(model)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_named_and_the_linears_beside_them_adapted(family: str) -> None:
    """transformers keeps the experts of a layer as one parameter, which no linear is."""
    model = family_model(family)
    report = inject_adapters(model, MALORA, ["q_proj"])
    assert report.fused_experts[0] == "model.layers.0.mlp.experts.gate_up_proj" and len(report.fused_experts) == 4
    assert [row.modules for row in report.rows] == [2]
    with pytest.raises(
        ConfigError, match=r"gate_up_proj.*matches no.*as one parameter \(model\.layers\.0\.mlp\.experts"
    ):
        inject_adapters(family_model(family), MALORA, ["gate_up_proj"])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("jetmoe", ["model.layers.0.mlp.input_linear.weight", "model.layers.0.mlp.output_linear.weight"]),
        ("dbrx", [f"transformer.blocks.0.ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")]),
        ("gpt_oss", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]),
        *((family, []) for family in ("rwkv", "zamba", "recurrent_gemma", "gemma3", "xlnet", "reformer")),
    ],
)
def test_nothing_but_experts_is_called_so(family: str, expected: list[str]) -> None:
    """Others have 3-D parameters for states, positions or pictures."""
    with without_compiler():
        assert fused_experts(family_model(family))[: len(expected) or None] == expected


def test_a_shared_rank_above_the_inputs_is_named() -> None:
    """S_A has orthogonal rows, of which there are no more than inputs: 48 for all targets but down_proj's 80."""
    model = tiny_llama()
    inject_adapters(model, mixture_spec("malora", r=3, shared_r=80), ["down_proj"])
    with pytest.raises(ConfigError, match=r"shared_r=49.*48.*q_proj"):
        inject_adapters(tiny_llama(), mixture_spec("malora", r=3, shared_r=49), ["q_proj"])


@pytest.mark.parametrize("second", ["q_proj", "v_proj"])
def test_injecting_twice_is_refused(second: str) -> None:
    """Other targets too: the first adapters would be frozen, and saved with the numbers of the second."""
    model = tiny_llama()
    inject_adapters(model, MALORA, ["q_proj"])
    with pytest.raises(ConfigError, match="has adapters.*q_proj is a MixtureLinear.*remove_adapters"):
        inject_adapters(model, mixture_spec("lora", r=2), [second])


@pytest.mark.parametrize("fuse_projections", [False, True])
def test_removed_and_injected_again(fuse_projections: bool) -> None:
    """The model is again what it was, whatever of it was trained; and the second adapters are the first's equals."""
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    trained, expected = [p.requires_grad for p in model.parameters()], model(IDS).logits
    inject_adapters(model, MALORA, fuse_projections=fuse_projections)
    first = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    for layer in dict(mixture_layers(model)).values():
        nn.init.ones_(layer.B)
    remove_adapters(model)
    assert [p.requires_grad for p in model.parameters()] == trained and not vars(model).keys() & {"save_pretrained"}
    assert torch.equal(model(IDS).logits, expected) and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    inject_adapters(model, MALORA, fuse_projections=fuse_projections)
    assert all(torch.equal(tensor, first[name]) for name, tensor in adapter_state_dict(model).items())


@pytest.mark.parametrize("step", ["count_base_parameters", "_adapted", "_rows", "keep_differentiable"])
def test_an_injection_that_fails_leaves_the_model_as_it_was(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops it and wherever, as Ctrl+C does."""
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    trained, attributes = [p.requires_grad for p in model.parameters()], set(vars(model))
    modules = [(name, id(module)) for name, module in model.named_modules()]
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(f"malora_dist.adapters.inject.{step}", stop)
        with pytest.raises(KeyboardInterrupt):
            inject_adapters(model, MALORA, fuse_projections=True)
    assert [p.requires_grad for p in model.parameters()] == trained and set(vars(model)) == attributes
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    inject_adapters(model, MALORA)


def test_a_linear_that_stands_in_two_places_is_adapted_in_both() -> None:
    linear = nn.Linear(8, 8)
    model = nn.Sequential(nn.ModuleDict({"up": linear}), nn.ModuleDict({"up": linear, "down": nn.Linear(8, 4)}))
    assert inject_adapters(model, mixture_spec("lora", r=2), "up").rows[0].modules == 1
    assert model[0]["up"] is model[1]["up"] and isinstance(model[1]["up"], MixtureLinear)
    remove_adapters(model)
    assert model[0]["up"] is model[1]["up"] is linear


@pytest.mark.parametrize("method", METHODS)
def test_conv1d_of_gpt2_is_adapted(method: str) -> None:
    """c_attn, c_proj and c_fc, whose weights lie as (I, O): the same function as linears of the transposed weights."""
    model, plain = family_model("gpt2"), family_model("gpt2")
    for name, conv in [(n, m) for n, m in plain.named_modules() if isinstance(m, Conv1D)]:
        linear = nn.Linear(conv.nx, conv.nf)
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, linear)
    spec = mixture_spec(method, num_experts=4, r=3, shared_r=6 if method == "malora" else None)
    targets = ["c_attn", "c_fc", "c_proj"]
    reports = [inject_adapters(each, spec, targets) for each in (model, plain)]
    assert reports[0] == reports[1] and [row.modules for row in reports[0].rows] == [2, 2, 2, 2]
    for each in (model, plain):
        for number, (_, layer) in enumerate(mixture_layers(each)):
            nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
        each(IDS).logits.square().mean().backward()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    gradients = [{name: p.grad for name, p in adapter_parameters(each)} for each in (model, plain)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_what_code_reads_off_a_linear_it_reads_off_an_adapted_one() -> None:
    """T5 asks its last linear for the dtype of `weight`."""
    model = tiny_llama(attention_bias=True)
    linear = model.model.layers[0].self_attn.q_proj
    inject_adapters(model, MALORA)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (48, 48)
    assert not {"weight", "bias"} & {name.rpartition(".")[2] for name, _ in adapter_parameters(model)}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_after_a_step_is_a_model_of_its_own(method: str, duplicate: Callable[[Any], Any]) -> None:
    model = tiny_llama().train()
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3), fuse_projections=True, lora_dropout=0.1)
    # Some linears of one input have run: what is kept of the input is not the copy's.
    model.model.layers[0].self_attn.q_proj(torch.ones(3, 48, requires_grad=True))
    model(IDS).logits.square().mean().backward()
    twin = duplicate(model)
    assert twin.save_pretrained.model is twin
    assert torch.equal(twin.eval()(IDS).logits, model.eval()(IDS).logits)
    for _, parameter in adapter_parameters(twin):
        parameter.data.add_(1)
    state = adapter_state_dict(model)
    assert all(not torch.equal(tensor, state[name]) for name, tensor in adapter_state_dict(twin).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_comes_back(method: str) -> None:
    """Onto a model of another base, too: DoRA's norms are then those of the new base."""
    spec = mixture_spec(method, num_experts=4, r=3)
    model, other = tiny_llama(), tiny_llama(scale=7.0)
    for each in (model, other):
        inject_adapters(each, spec, fuse_projections=True)
    for _, layer in mixture_layers(model):
        nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(layer.in_features))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_moved_to_another_dtype_starts_as_its_base(method: str, dtype: torch.dtype) -> None:
    model, base = tiny_llama(), tiny_llama(dtype)
    inject_adapters(model, mixture_spec(method, num_experts=4, r=3))
    model.to(dtype)
    close = {"rtol": 0.02, "atol": 0.04} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, **close)
    norms = [layer.dora.base_squares.dtype for _, layer in mixture_layers(model) if layer.dora is not None]
    assert set(norms) <= {torch.promote_types(dtype, torch.float32)}


# ------------------------------------------------------------------------------------------ activation checkpointing


def _losses_and_gradients(model: nn.Module, aux_weight: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One step as the engine takes it: routers are read after forward and before backward."""
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    cross_entropy = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    layers = [layer for _, layer in mixture_layers(model)]
    statistics = expert_statistics([layer.routing for layer in layers if layer.routing is not None])
    counts_LE = statistics.counts_GLE.sum(dim=0)
    aux = load_balancing_loss(counts_LE, statistics.prob_sum_LE, IDS.numel(), layers[0].top_k).mean()
    (cross_entropy + aux_weight * aux).backward()
    gradients = {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}
    return cross_entropy.detach(), aux.detach(), gradients


@pytest.mark.parametrize("computation", ["dense", "grouped"])
def test_checkpointing_changes_no_gradient_and_counts_the_balance_loss_once(computation: str) -> None:
    model = tiny_llama().double()
    inject_adapters(model, MALORA, lora_dropout=0.2, computation=computation)
    for number, (_, layer) in enumerate(mixture_layers(model)):
        layer.double()
        layer.B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        layer.token_keys = token_keys(1, 2, torch.zeros(40), torch.arange(40))
    model.train()
    plain = _losses_and_gradients(model, aux_weight=0.5)
    without_aux = _losses_and_gradients(model, aux_weight=0.0)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    forwards: list[str] = []
    for name, layer in mixture_layers(model):
        layer.register_forward_pre_hook(lambda *_, name=name: forwards.append(name))
    checkpointed = _losses_and_gradients(model, aux_weight=0.5)

    assert len(forwards) == 2 * len(set(forwards)) == 2 * 12  # backward did run each layer again
    assert len(plain[2]) == 12 * 4
    assert 1 < float(plain[1]) < MALORA.num_experts / MALORA.top_k
    assert torch.equal(checkpointed[0], plain[0]) and torch.equal(checkpointed[1], plain[1])
    torch.testing.assert_close(checkpointed[2], plain[2], rtol=1e-10, atol=1e-13)
    routers = [name for name in plain[2] if name.endswith(".gate")]
    assert all(not torch.allclose(plain[2][n], without_aux[2][n], rtol=0.01) for n in routers)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        pytest.param([], "must not be empty", id="none"),
        pytest.param(["q_proj", "self_attn.q_proj"], "both match model.layers.0.self_attn.q_proj", id="overlapping"),
    ],
)
def test_impossible_targets_leave_the_model_as_it_was(targets: list[str], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        inject_adapters(model, mixture_spec("malora", r=2, shared_r=4), targets)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_in_between_leaves_the_model_as_it_was() -> None:
    """As where memory runs out at the third layer."""
    model, placed = tiny_llama(), []
    before = dict(model.named_modules())
    model.model.norm.weight.requires_grad_(False)

    def place(layer: MixtureLinear) -> None:
        placed.append(layer)
        if len(placed) == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        inject_adapters(model, MALORA, place=place)
    assert dict(model.named_modules()) == before and "save_pretrained" not in vars(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    inject_adapters(model, MALORA)


def test_an_adapted_output_head_stays_tied() -> None:
    """transformers ties again whenever it loads or resizes a model."""
    model = tiny_llama(tie_word_embeddings=True)
    expected = model(IDS).logits
    inject_adapters(model, MALORA, ["lm_head"])
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model(IDS).logits, expected)
    with pytest.raises(ConfigError, match="a weight of 70 outputs is put on an adapted linear of 61: resize a model"):
        model.resize_token_embeddings(70)
