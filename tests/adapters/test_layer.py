"""The adapted linear against the naive twin, its start, and its dropout."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import METHODS, MixtureSpec, mixture_spec
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.dropout import dropout_mask, token_keys
from malora_dist.ops.nf4 import quantize_nf4
from malora_dist.ops.routing import route
from tests.cases import ADAPTER_CASES, CASES, DROPOUT_P, AdapterCase, make_inputs, output_gradient
from tests.reference import adapter_reference, dora_reference, gradients

SCALING = 1.5
SALT = 77
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
METHODS_AND_FORMS = [("malora", "dense"), ("malora", "grouped"), ("molora", "dense"), ("molora", "grouped"),
                     ("hydralora", "dense"), ("hydralora", "grouped"), ("lora", "auto"), ("dora", "auto")]  # fmt: skip


def _spec(case: AdapterCase, method: str, beta: float = 1.0, normalize_gates: bool = False) -> MixtureSpec:
    """The method with the sizes of the case, its output scaled by SCALING."""
    numbers = {"num_experts": case.E, "top_k": case.K, "r": case.r, "lora_alpha": SCALING * case.r}
    shared_r = case.D if METHODS[method].expert_down else None
    return mixture_spec(method, **numbers, shared_r=shared_r, beta=beta, normalize_gates=normalize_gates)


def _layer(base: nn.Module, case: AdapterCase, spec: MixtureSpec, computation: str, **switches: Any) -> MixtureLinear:
    sizes = {"in_features": case.I, "out_features": case.O}
    return MixtureLinear(base, spec, **sizes, computation=computation, **switches)


def _filled(
    case: AdapterCase, method: str, computation: str, tensors: dict[str, Tensor], normalize: bool = False
) -> Any:
    """A training layer in float64 whose parameters are those of `tensors`, on a base with bias."""
    with torch.device("meta"):
        base = nn.Linear(case.I, case.O)
        spec = _spec(case, method, normalize_gates=normalize)
        layer = _layer(base, case, spec, computation, dropout=DROPOUT_P, input_salt=SALT)
    generator = torch.Generator().manual_seed(5)
    state = {name: tensor.detach() for name, tensor in tensors.items() if name not in ("x", "base", "mask")}
    for name, parameter in base.named_parameters():
        state[f"base_layer.{name}"] = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    names = {"gate": "input_projection.gate", "shared_A": "input_projection.shared_A", "magnitude": "dora.magnitude"}
    layer.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()}, assign=True)
    if layer.dora is not None:
        layer.dora.measure(base)
    return layer.train()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("method", "computation"), METHODS_AND_FORMS)
@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_layer_equals_the_twin(case: AdapterCase, method: str, computation: str, normalize: bool) -> None:
    """Outputs and every gradient, with the layer's own dropout mask handed to the twin."""
    tensors = make_inputs(case, method)
    layer = _filled(case, method, computation, tensors, normalize)
    assert layer.grouped == (computation == "grouped")
    layer.token_keys = token_keys(1, 2, torch.arange(case.T) // 3, torch.arange(case.T) % 3)
    x = tensors["x"]
    y = layer(x[None])
    assert y.shape == (1, case.T, case.O)

    named = {re.sub(r"^(input_projection|dora)\.", "", name): parameter for name, parameter in layer.named_parameters()}
    twin = {name: parameter for name, parameter in named.items() if not name.startswith("base_layer")}
    twin |= {"x": x, "base": F.linear(x, named["base_layer.weight"], named["base_layer.bias"])}
    twin["mask"] = dropout_mask(layer.token_keys, SALT, case.I, DROPOUT_P).bool().double()
    if method == "dora":
        base = named["base_layer.weight"], named["base_layer.bias"]
        expected = dora_reference(twin, *base, scaling=SCALING, dropout_p=DROPOUT_P)
    else:
        numbers = {"top_k": case.K, "scaling": SCALING, "dropout_p": DROPOUT_P}
        expected = adapter_reference(method, twin, normalize=normalize, **numbers)
    torch.testing.assert_close(y[0], expected, **CLOSE)
    leaves, direction = {"x": x, **named}, output_gradient(case)
    # Without allow_unused: each rank's backward must touch every parameter.
    ours = torch.autograd.grad(y, list(leaves.values()), direction[None])
    for name, got, want in zip(leaves, ours, gradients(expected, list(leaves.values()), direction), strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize("base_kind", ["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "computation"), METHODS_AND_FORMS)
def test_starts_as_its_base_bit_for_bit(method: str, computation: str, dtype: torch.dtype, base_kind: str) -> None:
    case = CASES["plain"]
    base: nn.Module = nn.Linear(case.I, case.O, dtype=dtype)
    if base_kind == "nf4":
        base = NF4Linear(quantize_nf4(base.weight), base.bias.detach(), case.I, case.O, False)
    layer = _layer(base, case, _spec(case, method), computation, dropout=0.5).train()
    assert {p.dtype for _, p in layer.factors()} == {torch.float32}
    x = torch.randn(2, 7, case.I, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, base(x))
    # It is B that makes it so, not a switch.
    layer.B.data.fill_(0.1)
    assert not torch.equal(layer(x), base(x))
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_initial_values(beta: float) -> None:
    n = 1024
    case = AdapterCase(T=1, I=n, O=3, E=8, K=2, r=12, D=32)
    generator = torch.Generator().manual_seed(0)
    layer = _layer(nn.Linear(n, 3), case, _spec(case, "malora", beta), "auto", generator=generator)
    for t, product in enumerate(layer.P.detach() @ layer.input_projection.shared_A.detach()):
        assert product.var().item() == pytest.approx(1 / (3 * n), rel=0.04), f"expert {t}"
    S_A = layer.input_projection.shared_A
    torch.testing.assert_close(S_A @ S_A.T, beta**2 * torch.eye(32), rtol=1e-5, atol=1e-4)
    molora = _layer(nn.Linear(n, 3), case, _spec(case, "molora"), "auto", generator=generator.manual_seed(0))
    for kaiming in (layer.input_projection.gate.detach(), molora.input_projection.gate.detach(), *molora.A.detach()):
        assert kaiming.abs().max().item() == pytest.approx(1 / n**0.5, rel=0.01)
        assert kaiming.var().item() == pytest.approx(1 / (3 * n), rel=0.05)
    assert not layer.B.any() and not molora.B.any()


@pytest.mark.parametrize(
    ("method", "drawn"),
    [
        ("malora", ("gate", "shared_A", "P")),
        ("molora", ("gate", "A")),
        ("hydralora", ("gate", "shared_A")),
        ("lora", ("A",)),
    ],
)
def test_factors_depend_on_the_generator_alone(method: str, drawn: tuple[str, ...]) -> None:
    case = CASES["plain"]

    def parameters(seed: int) -> dict[str, Tensor]:
        torch.rand(1)  # moves the global generator
        layer = _layer(nn.Identity(), case, _spec(case, method), "auto", generator=torch.Generator().manual_seed(seed))
        return {name: parameter.detach() for name, parameter in layer.factors()}

    first, same, other = parameters(0), parameters(0), parameters(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_routing_is_kept_and_reads_x_before_dropout() -> None:
    case = CASES["plain"]
    tensors = make_inputs(case, "malora")
    layer = _filled(case, "malora", "auto", tensors)
    layer.token_keys = token_keys(1, 2, torch.zeros(case.T), torch.arange(case.T))
    layer(tensors["x"])
    expected = route(tensors["x"], layer.input_projection.gate, case.K)
    assert all(torch.equal(got, want) for got, want in zip(layer.routing, expected, strict=True))
    assert layer.routing.probs_TE.requires_grad
    lora = _filled(case, "lora", "auto", make_inputs(case, "lora"))
    lora(tensors["x"])
    assert lora.routing is None


def test_dropout_is_off_in_evaluation_and_random_without_keys() -> None:
    case = CASES["plain"]
    tensors = make_inputs(case, "malora")
    layer, x = _filled(case, "malora", "dense", tensors), tensors["x"]
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    twin = dict(layer.factors()) | {"x": x, "base": layer.base_layer(x)}
    expected = adapter_reference("malora", twin, top_k=case.K, scaling=SCALING)
    torch.testing.assert_close(layer.eval()(x), expected, **CLOSE)


def test_backward_through_bf16_leaves_fp32_gradients() -> None:
    case = CASES["plain"]
    layer = _layer(nn.Linear(case.I, case.O, dtype=torch.bfloat16), case, _spec(case, "malora"), "auto")
    layer.B.data.normal_(generator=torch.Generator().manual_seed(0))
    layer(torch.randn(5, case.I).bfloat16()).float().sum().backward()
    for name, parameter in layer.factors():
        gradient = parameter.grad
        assert gradient.dtype == torch.float32 and gradient.any(), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["malora", "molora", "lora"])
def test_the_dense_layer_compiles_without_a_graph_break(method: str, dropout: float) -> None:
    case = CASES["plain"]
    base = nn.Linear(case.I, case.O).requires_grad_(False)
    layer = _layer(base, case, _spec(case, method), "dense", dropout=dropout).train()
    layer.B.data.normal_(generator=torch.Generator().manual_seed(0))
    layer.token_keys = token_keys(1, 2, torch.zeros(case.T), torch.arange(case.T))
    x = torch.randn(2, case.T // 2, case.I, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *(parameter for _, parameter in layer.factors())]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    plain, traced = layer(x), compiled(x)
    torch.testing.assert_close(traced, plain)
    for got, want in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (traced, plain)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("method", "computation"), METHODS_AND_FORMS)
def test_under_autocast(method: str, computation: str, dropout: float) -> None:
    """fp32 input and parameters, products in bf16, logits in fp32; gradients reach all of them."""
    case = CASES["plain"]
    layer = _layer(nn.Linear(case.I, case.O), case, _spec(case, method), computation, dropout=dropout).train()
    layer.B.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, case.I, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.routing is None or layer.routing.probs_TE.dtype == torch.float32
    y.float().sum().backward()
    for gradient in (x.grad, *(parameter.grad for _, parameter in layer.factors())):
        assert gradient.dtype == torch.float32 and gradient.any()


def test_the_base_gives_no_gradient_that_nobody_wants_and_may_have_hooks() -> None:
    case = CASES["plain"]
    layer = _layer(nn.Linear(case.I, case.O).requires_grad_(False), case, _spec(case, "malora"), "dense")
    seen: list[Any] = []
    handle = layer.base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    x = torch.randn(5, case.I)
    layer(x)
    layer(x.requires_grad_())
    assert seen == [False, True]
    handle.remove()
    plain = layer(x).detach()
    layer.base_layer.register_full_backward_hook(lambda *arguments: seen.append("backward"))
    y = layer(x)
    y.sum().backward()
    assert seen[-1] == "backward" and torch.equal(y, plain)


def test_auto_makes_no_host_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many experts are grouped on a CPU alone; Triton's kernels, which no GPU has run, are asked for by name."""
    monkeypatch.setattr("malora_dist.ops.devices.missing_for_triton", lambda _: None)
    spec = mixture_spec("malora", num_experts=64, top_k=2, r=32, shared_r=32)
    layer = MixtureLinear(torch.nn.Linear(64, 512), spec, in_features=64, out_features=512)
    assert layer.form == "grouped"
    assert layer.to("meta").form == "dense"
    layer.computation = "grouped"
    assert layer.form == "grouped"
