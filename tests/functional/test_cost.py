"""Which form of the sum over experts is chosen."""

from malora_dist.functional.cost import prefer_grouped


def test_cost_model() -> None:
    """Grouped pays only where many experts are computed in vain: not for k = N or low rank, but for wide experts."""
    assert not prefer_grouped(num_experts=8, top_k=8, r=256, in_width=4096, out_width=4096)
    assert not prefer_grouped(num_experts=8, top_k=2, r=12, in_width=32, out_width=1536)
    assert prefer_grouped(num_experts=8, top_k=2, r=96, in_width=4096, out_width=4096)
    assert prefer_grouped(num_experts=64, top_k=2, r=12, in_width=128, out_width=4096)
