"""The oracle against closed forms, and against torch, transformers and bitsandbytes where they define the same."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.cases import ADAPTER_CASES, DROPOUT_P, AdapterCase, make_inputs, output_gradient

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


# ---------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_init_is_eqs_8_to_10(beta: float) -> None:
    n, d, r = 768, 32, 12
    K_EDI = reference.kaiming_reference(4, d, n, seed=0)
    shared_A, P = reference.init_reference(K_EDI, r, beta)
    assert shared_A.shape == (d, n) and P.shape == (4, r, d)
    torch.testing.assert_close(P[0] @ shared_A, K_EDI[0, :r], **CLOSE)
    torch.testing.assert_close(shared_A @ shared_A.T, beta**2 * torch.eye(d, dtype=torch.float64), **CLOSE)
    products = P @ shared_A
    # V_0 has orthonormal rows, so it keeps the length of each row of U_t Sigma_t, which is that of the row of K_t.
    torch.testing.assert_close(products.norm(dim=2), K_EDI[:, :r].norm(dim=2), **CLOSE)
    for product in products:
        assert product.var().item() == pytest.approx(1 / (3 * n), rel=0.05)


def test_kaiming_is_torch_kaiming_uniform_with_a_sqrt_5() -> None:
    theirs = torch.empty(40, 500, dtype=torch.float64)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    ours = reference.kaiming_reference(1, 40, 500, seed=3)[0]
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=1e-3)
    assert ours.abs().max().item() == pytest.approx(1 / math.sqrt(500), rel=1e-3)
    assert ours.var().item() == pytest.approx(1 / 1500, rel=0.03)


# ------------------------------------------------------------------------------------------ routing and adapter


def test_routing_keeps_softmax_values_of_the_top_k() -> None:
    logits, gate = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]).log(), torch.eye(3)
    gates, ids, probs = reference.routing_reference(logits, gate, top_k=2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(gates, torch.tensor([[3 / 6, 2 / 6], [1 / 3, 1 / 3]]))
    torch.testing.assert_close(probs, torch.tensor([[1 / 6, 3 / 6, 2 / 6], [1 / 3, 1 / 3, 1 / 3]]))
    normalized, _, _ = reference.routing_reference(logits, gate, top_k=1, normalize=True)
    assert normalized.tolist() == [[1.0], [1.0]]


def test_routing_of_bf16_is_computed_in_fp32() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    gates, _, probs = reference.routing_reference(x, gate, top_k=2)
    assert gates.dtype == probs.dtype == torch.float32
    torch.testing.assert_close(probs, torch.softmax(x.float() @ gate.float().T, dim=1))


@pytest.mark.parametrize("method", ["malora", "molora", "hydralora", "lora"])
def test_adapter_with_zero_B_is_base(method: str) -> None:
    tensors = make_inputs(AdapterCase(9, 6, 5, 4, 2, 3, 4), method)
    tensors["B"] = torch.zeros_like(tensors["B"])
    y = reference.adapter_reference(method, tensors, top_k=2, scaling=2.0, dropout_p=DROPOUT_P)
    assert torch.equal(y, tensors["base"])


@pytest.mark.parametrize("case", ADAPTER_CASES)
@pytest.mark.parametrize(
    ("method", "normalize"),
    [("malora", False), ("malora", True), ("molora", False), ("hydralora", False), ("lora", False)],
)
def test_adapter_equals_dense_matrices(method: str, normalize: bool, case: AdapterCase) -> None:
    """With gates scattered to (T, E), the same sum over all experts' whole Delta W, in outputs and every gradient."""
    tensors = make_inputs(case, method)
    y = reference.adapter_reference(
        method, tensors, top_k=case.K, scaling=1.5, normalize=normalize, dropout_p=DROPOUT_P
    )
    products = {"malora": lambda: tensors["P"] @ tensors["shared_A"], "hydralora": lambda: tensors["shared_A"]}
    A = products.get(method, lambda: tensors["A"])()
    gates_TE = torch.ones(case.T, 1, dtype=torch.float64)
    if method != "lora":
        top_k = case.E if method == "hydralora" else case.K
        gates, ids, probs = reference.routing_reference(tensors["x"], tensors["gate"], top_k, normalize)
        gates_TE = torch.zeros_like(probs).scatter(1, ids, gates)
    dropped = tensors["x"] * tensors["mask"] / (1 - DROPOUT_P)
    y_dense = tensors["base"] + 1.5 * torch.einsum("te,eoi,ti->to", gates_TE, tensors["B"] @ A, dropped)
    torch.testing.assert_close(y, y_dense, **CLOSE)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    for got, expected in zip(
        reference.gradients(y, leaves, output_gradient(case)),
        reference.gradients(y_dense, leaves, output_gradient(case)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_cases_route_as_they_say(case: AdapterCase) -> None:
    tensors = make_inputs(case, "malora")
    _, ids, probs = reference.routing_reference(tensors["x"], tensors["gate"], case.K)
    counts = torch.bincount(ids.flatten(), minlength=case.E)
    assert int(counts.sum()) == case.T * case.K
    if case.routing == "starved":
        assert counts[-1] == 0 and probs[:, -1].min() > 0
    if case.routing == "one_expert":
        assert bool((ids[:, 0] == case.E - 1).all()) and probs.max() < 1
    if case.routing == "equal":
        assert ids.tolist() == [list(range(case.K))] * case.T


def test_router_reads_x_without_dropout() -> None:
    tensors = make_inputs(AdapterCase(4, 6, 5, 4, 2, 3, 4), "malora") | {"mask": torch.zeros(4, 6)}
    y = reference.adapter_reference("malora", tensors, top_k=2, scaling=2.0, dropout_p=DROPOUT_P)
    assert torch.equal(y, tensors["base"])
    tensors["mask"][:, 0] = 1.0
    y = reference.adapter_reference("malora", tensors, top_k=2, scaling=2.0, dropout_p=DROPOUT_P)
    gate_gradient, x_gradient = reference.gradients(y.sum(), [tensors["gate"], tensors["x"]], torch.tensor(1.0))
    assert bool((gate_gradient[:, 1:] != 0).all()) and bool((x_gradient[:, 1:] != 0).all())


# ------------------------------------------------------------------------------------------------- balance loss


def test_balance_of_uniform_routing_is_one() -> None:
    probs = torch.full((12, 4), 0.25, dtype=torch.float64)
    ids = torch.tensor([[t % 4, (t + 1) % 4] for t in range(12)])
    assert reference.balance_reference(probs, ids).item() == 1.0


def test_balance_of_one_expert_is_n_times_its_mean_probability() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.9, 0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = reference.balance_reference(probs, torch.tensor([[0], [0]]))
    assert loss.item() == pytest.approx(3 * 0.8, rel=1e-15)
    (gradient,) = reference.gradients(loss, [probs], torch.tensor(1.0, dtype=torch.float64))
    assert gradient.tolist() == [[1.5, 0.0, 0.0], [1.5, 0.0, 0.0]]


def test_balance_ignores_masked_tokens_and_takes_none() -> None:
    probs = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    ids = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0], [2, 0], [2, 1]])
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    kept = reference.balance_reference(probs[mask], ids[mask])
    assert reference.balance_reference(probs, ids, mask).item() == kept.item()
    assert kept.item() != reference.balance_reference(probs, ids).item()
    assert reference.balance_reference(probs[:0], ids[:0]).item() == 0.0
    assert reference.balance_reference(probs, ids, torch.zeros(6)).item() == 0.0


# ----------------------------------------------------------------------------------------------- quantisation


def test_nf4_codes_are_normal_quantiles() -> None:
    """Equal-mass quantiles of N(0, 1), 8 positive and 7 negative ones and an exact 0, divided by the largest."""
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-NormalDist().inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = sorted([*positive, 0.0, *negative])
    assert reference.NF4_CODES == pytest.approx([v / values[-1] for v in values], abs=2e-7)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_returns_what_is_made_of_codes(double_quant: bool) -> None:
    """Blocks whose numbers are codes times one absmax: with one absmax for all, its mean is it and 8 bits hold 0."""
    codes = torch.tensor(reference.NF4_CODES, dtype=torch.float64)
    weight = 0.75 * codes.repeat(4 * 5 + 1).reshape(21, 16)  # 5 whole blocks and a quarter of one
    torch.testing.assert_close(reference.nf4_reference(weight, double_quant=double_quant), weight, **CLOSE)


def test_nf4_rounds_to_the_nearest_code_of_its_block() -> None:
    weight = torch.zeros(3, 64, dtype=torch.float64)
    weight[0, :4] = torch.tensor([-2.0, 0.07, 0.09, 0.16])  # absmax 2: 0.035 -> 0, 0.045 and 0.08 -> 0.0796
    weight[1, :2] = torch.tensor([10.0, 0.3])  # absmax 10: 0.03 -> 0; row 2 is all zero
    expected = torch.zeros(3, 64, dtype=torch.float64)
    expected[0, :4] = torch.tensor([-2.0, 0.0, 2 * reference.NF4_CODES[8], 2 * reference.NF4_CODES[8]])
    expected[1, 0] = 10.0
    assert torch.equal(reference.nf4_reference(weight), expected)


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map

    torch.testing.assert_close(reference.dynamic_map_reference().float(), create_dynamic_map(), rtol=1e-6, atol=1e-9)


def _blocks_far_from_halfway(absmax: Tensor) -> Tensor:
    """True for the blocks whose absmax no kernel's rounding moves to another 8-bit code."""
    codes = reference.dynamic_map_reference()
    centred = absmax.double() - absmax.double().mean()
    scaled = torch.cat([block / block.abs().max() for block in centred.split(256)])
    halfway = (codes[1:] + codes[:-1]) / 2
    return (scaled[:, None] - halfway[None, :]).abs().amin(dim=1) > 3e-5


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (96, 200), (768, 128)])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], double_quant: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    ours, theirs = reference.nf4_reference(weight, double_quant=double_quant), dequantize_4bit(packed, state).double()
    if double_quant:
        absmax = torch.stack([block.abs().max() for block in weight.flatten().split(64)])
        clear = _blocks_far_from_halfway(absmax)
        assert clear.double().mean() > 0.98
        compared = clear.repeat_interleave(64)[: weight.numel()]
        ours, theirs = ours.flatten()[compared], theirs.flatten()[compared]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------------------------------- a training step

UNEQUAL = [
    [  # one step: rank 0 with 1 token of loss 8 and 3 of loss 2, rank 1 with 200 tokens of loss 1, rank 2 with none
        [[[8.0]], [[2.0, 2.0, 2.0]]],
        [[[1.0] * 150, []], [[1.0] * 50]],
        [[[]], [[], []]],
    ]
]
UNEQUAL_TASKS = [[[[0], [1]], [[1, 0], [1]], [[2], [2, 0]]]]


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("token", (8 + 3 * 2 + 200) / 204),
        ("sample", (8 + 2 + 1 + 1) / 4),
        ("task", (8 + (3 * 2 + 200) / 203) / 2),  # task 2 has no supervised token
    ],
)
def test_loss_by_hand(normalization: str, expected: float) -> None:
    (loss,) = reference.loss_reference(UNEQUAL, normalization, UNEQUAL_TASKS)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("normalization", ["token", "sample", "task"])
def test_loss_of_many_steps(normalization: str) -> None:
    losses = reference.loss_reference(
        [*UNEQUAL, [[[[]]]], [[[[3.0]]]]], normalization, [*UNEQUAL_TASKS, [[[0]]], [[[1]]]]
    )
    assert [loss.item() for loss in losses[1:]] == [0.0, 3.0]


def test_token_loss_carries_each_tokens_gradient() -> None:
    tokens = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (1, 200)]
    (loss,) = reference.loss_reference([[[[tokens[0]]], [[tokens[1]]]]], "token")
    for gradient in torch.autograd.grad(loss, tokens):
        torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 201), **CLOSE)


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in (7, 1, 30)]


def test_adamw_and_clip_are_those_of_torch() -> None:
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours = [p.detach().clone() for p in parameters]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in ours]
    generator = torch.Generator().manual_seed(1)
    for step, size in enumerate((5.0, 0.01, 1.0, 3.0), start=1):  # 0.01: below the limit, not scaled
        grads = [size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in ours]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        their_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        grads, norm = reference.clip_reference(grads, 1.0)
        torch.testing.assert_close(norm, their_norm, **CLOSE)
        for i, (p, g, (m, v)) in enumerate(zip(ours, grads, moments, strict=True)):
            ours[i], *moments[i] = reference.adamw_reference_step(
                p, g, m, v, step, learning_rate=0.05, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1
            )
            torch.testing.assert_close(ours[i], parameters[i].detach(), **CLOSE)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "ratio"), [(23, 0.1), (10, 0.0), (5, 1.0), (1, 0.1)])
def test_learning_rate_is_that_of_transformers(kind: str, total: int, ratio: float) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD(_parameters(), lr=5e-4)
    scheduler = get_scheduler(kind, optimizer, math.ceil(ratio * total), total)
    for step in range(total):
        expected = scheduler.get_last_lr()[0]
        assert reference.learning_rate_reference(kind, 5e-4, step, total, ratio) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()
