"""The loss in chunks against its naive twin, and against the loss of whole logits in the dtypes that train."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.ops.choices import chunk_rows
from malora_dist.ops.linear_cross_entropy import linear_cross_entropy
from tests.reference import linear_cross_entropy_reference

# (N, H, V, chunk): nothing to learn, one row, odd sizes, an exact division, a chunk above N, chunks of one row.
SIZES = [(0, 5, 7, 4), (1, 5, 7, 4), (13, 17, 31, 5), (12, 8, 10, 4), (9, 6, 33, 100), (3, 1, 2, 1)]


def inputs(N: int, H: int, V: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, ...]:
    """hidden, weight, bias, targets, and an upstream gradient."""
    generator = torch.Generator().manual_seed(N)
    hidden, weight, bias, upstream = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, H), (V, H), (V,), (N,))
    )
    targets = torch.randint(V, (N,), generator=generator)
    return (scale * hidden).to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype), targets, upstream


def gradient(losses: Tensor, hidden: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad((losses * upstream.to(losses.dtype)).sum(), hidden)[0]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_of_the_naive_twin(sizes: tuple[int, int, int, int], with_bias: bool) -> None:
    *shape, chunk = sizes
    hidden, weight, bias, targets, upstream = inputs(*shape)
    used = bias if with_bias else None
    found = linear_cross_entropy(hidden, weight, used, targets, chunk)
    wanted = linear_cross_entropy_reference(hidden, weight, used, targets.tolist())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    wanted_gradient = gradient(wanted, hidden, upstream) if len(hidden) else torch.zeros_like(hidden)
    torch.testing.assert_close(gradient(found, hidden, upstream), wanted_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_whole_logits(dtype: torch.dtype) -> None:
    """Against float64 on the same numbers the error is the plain path's; in bf16 the kept gradient is rounded too."""
    hidden, weight, bias, targets, upstream = inputs(200, 48, 301, dtype, scale=0.2)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = linear_cross_entropy_reference(exact_hidden, weight.double(), bias.double(), targets.tolist())
    plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    found = linear_cross_entropy(hidden, weight, bias, targets, 64)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=2e-6)
    exact_gradient = gradient(exact, exact_hidden, upstream)
    errors = [(gradient(losses, hidden, upstream) - exact_gradient).norm() for losses in (found, plain)]
    assert errors[0] < (1.1 if dtype == torch.float32 else 1.35) * errors[1]
    assert errors[1] < (1e-6 if dtype == torch.float32 else 1e-2) * exact_gradient.norm()


def test_logits_far_apart_stay_finite() -> None:
    """exp of their differences is 0 in fp32; the loss is the difference all the same."""
    hidden, weight, _, _, _ = inputs(4, 6, 9, torch.float32, scale=1e4)
    logits = F.linear(hidden, weight)
    targets = logits.argmin(dim=1)
    losses = linear_cross_entropy(hidden, weight, None, targets, 3)
    torch.testing.assert_close(losses, logits.amax(dim=1) - logits.amin(dim=1))
    assert torch.isfinite(gradient(losses, hidden, torch.ones(4))).all()


def test_what_is_not_finite_shows() -> None:
    hidden, weight, _, targets, upstream = inputs(5, 6, 9)
    bad = hidden.detach().clone()
    bad[2, 1] = torch.inf
    losses = linear_cross_entropy(bad.requires_grad_(), weight, None, targets, 2)
    assert torch.isfinite(losses).tolist() == [True, True, False, True, True]
    assert torch.isfinite(gradient(losses, bad, upstream)).all(dim=1).tolist() == [True, True, False, True, True]


def test_backward_twice_gives_the_same() -> None:
    hidden, weight, _, targets, upstream = inputs(5, 6, 9, torch.float32)
    losses = linear_cross_entropy(hidden, weight, None, targets, 2)
    first, second = (
        torch.autograd.grad(losses, hidden, upstream.float() * factor, retain_graph=True)[0] for factor in (1, 2)
    )
    torch.testing.assert_close(2 * first, second, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Bytes of the storages behind results of at least `numel` numbers, and how many products there were."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.products = numel, 0
        self.nbytes: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.products += operation in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
        if isinstance(result, Tensor) and result.numel() >= self.numel:
            self.nbytes[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, [4]), (torch.bfloat16, [2, 4])])
@pytest.mark.parametrize("learning", [True, False])
def test_a_chunk_of_logits_is_all_there_ever_is(dtype: torch.dtype, sizes: list[int], learning: bool) -> None:
    """The weight's transpose is a view of it; without a gradient to make there is one product a chunk."""
    N, H, V, chunk = 20, 8, 301, 6
    hidden, weight, bias, targets, _ = inputs(N, H, V, dtype)
    weight_pointer = weight.untyped_storage().data_ptr()
    with torch.set_grad_enabled(learning), Largest(V * 2) as largest:
        losses = linear_cross_entropy(hidden, weight, bias, targets, chunk)
        assert losses.requires_grad == learning
        if learning:
            losses.sum().backward()
    largest.nbytes.pop(weight_pointer, None)
    assert sorted(largest.nbytes.values()) == [chunk * V * size for size in sizes]
    assert largest.products == 4 * (2 if learning else 1)


def test_what_it_cannot_do_is_refused() -> None:
    hidden, weight, bias, targets, _ = inputs(3, 4, 5)
    for learned in (weight, bias):
        learned.requires_grad_()
        with pytest.raises(ValueError, match="freeze"):
            linear_cross_entropy(hidden, weight, bias, targets, 2)
        learned.requires_grad_(False)
    with pytest.raises(ValueError, match="not torch.float16"):
        linear_cross_entropy(hidden.half(), weight.half(), bias.half(), targets, 2)
    with pytest.raises(ValueError, match="4 targets for 3 rows"):
        linear_cross_entropy(hidden, weight, bias, torch.zeros(4, dtype=torch.long), 2)


@pytest.mark.parametrize(
    ("vocab_size", "cpu", "cuda"), [(32_000, 524, 2097), (49_152, 341, 1365), (128_256, 130, 523), (10**9, 1, 1)]
)
def test_rows(vocab_size: int, cpu: int, cuda: int) -> None:
    """Of a chunk, as documented for the vocabularies of real models, and never none."""
    assert (chunk_rows(vocab_size, "cpu"), chunk_rows(vocab_size, "cuda")) == (cpu, cuda)
