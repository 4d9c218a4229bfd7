"""Which form of the sum over experts is chosen."""

import pytest

from malora_dist.functional.cost import prefer_grouped


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cost_model(device: str) -> None:
    """Grouped pays only where many experts are computed in vain: not for k = N or low rank, but for wide experts."""
    assert not prefer_grouped(num_experts=8, top_k=8, r=256, in_width=4096, out_width=4096, device=device)
    assert not prefer_grouped(num_experts=8, top_k=2, r=12, in_width=32, out_width=1536, device=device)
    assert prefer_grouped(num_experts=8, top_k=2, r=192, in_width=4096, out_width=4096, device=device)
    assert prefer_grouped(num_experts=64, top_k=2, r=24, in_width=128, out_width=4096, device=device)


def test_a_gpu_multiplies_more_before_it_moves() -> None:
    sizes = {"num_experts": 64, "top_k": 2, "r": 12, "in_width": 32, "out_width": 4096}
    assert prefer_grouped(**sizes, device="cpu") and not prefer_grouped(**sizes, device="cuda")
