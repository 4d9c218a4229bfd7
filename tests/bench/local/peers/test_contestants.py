import pytest

from malora_dist.bench.local.peers.contestants import CONTESTANTS, chosen
from malora_dist.errors import ConfigError
from malora_dist.methods import count_parameters, mixture_spec

SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 1536), (576, 1536), (1536, 576)] * 30


def test_equal_contestants_train_as_much_as_malora() -> None:
    malora = CONTESTANTS["malora"].spec(SMOLLM2)
    assert malora == mixture_spec("malora", num_experts=8, top_k=2, r=12, shared_r=32)
    assert CONTESTANTS["peft_lora_equal"].spec(SMOLLM2).r == CONTESTANTS["lora_equal"].spec(SMOLLM2).r == 71
    counts = [sum(count_parameters(CONTESTANTS[name].spec(SMOLLM2), *size) for size in SMOLLM2)
              for name in ("malora", "peft_lora_equal", "molora")]  # fmt: skip
    assert counts[1] == pytest.approx(counts[0], rel=0.01) and counts[2] == pytest.approx(counts[0], rel=0.05)


def test_names() -> None:
    assert list(chosen("malora, base")) == ["malora", "base"]
    assert list(chosen(None)) == list(CONTESTANTS) and list(chosen(None, ["base"])) == ["base"]
    for wrong in ("malora,mylora", ""):
        with pytest.raises(ConfigError, match="--only .* is not one of base, peft_lora"):
            chosen(wrong)
