"""Norms and cosines of experts against whole matrices."""

import pytest
import torch

from malora_dist.ops.expert_gram import expert_gram, norms_and_cosines
from tests.cases import CASES, make_inputs


@pytest.mark.parametrize("method", ["malora", "molora", "hydralora", "lora"])
def test_equals_the_whole_matrices(method: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in make_inputs(CASES["primes"], method).items()}
    if method == "malora":
        A = tensors["P"] @ tensors["shared_A"]
    else:
        A = tensors.get("A", tensors.get("shared_A"))
    whole = (tensors["B"] @ A).flatten(1)
    gram = expert_gram(tensors)
    torch.testing.assert_close(gram, whole @ whole.T)
    norms, cosines = norms_and_cosines(gram)
    torch.testing.assert_close(norms, whole.norm(dim=1))
    torch.testing.assert_close(cosines, torch.nn.functional.cosine_similarity(whole[:, None], whole[None], dim=2))


def test_an_expert_of_norm_zero_is_like_no_other() -> None:
    norms, cosines = norms_and_cosines(torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert norms.tolist() == [2.0, 0.0] and cosines.tolist() == [[1.0, 0.0], [0.0, 0.0]]
