"""The model card says what the adapter is, what it was trained on and what it reached."""

from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import AdapterInfo
from malora_dist.adapters.methods import mixture_spec


def info_of(method: str) -> AdapterInfo:
    spec = mixture_spec(method, num_experts=4, r=3, shared_r=6, lora_alpha=7.5)
    return AdapterInfo(spec=spec, target_modules=("q_proj", "up_proj"), base_model="some/base", lora_dropout=0.1)


def test_card_of_an_evaluated_mixture() -> None:
    tuned = {"tasks": {"boolq": {"n": 300, "accuracy": 0.71149}, "text": {"n": 9, "loss": 1.0}}, "average": 0.711}
    card = model_card(info_of("malora"), ["boolq", "text"], {"base": {}, "tuned": tuned})
    front, body = card.removeprefix("---\n").split("\n---\n")
    assert "base_model: some/base" in front.splitlines()
    assert "# malora adapter" in body
    for fact in ("4 experts, top-2", "r 3, shared_r 6", "lora_alpha 7.5", "q_proj, up_proj", "boolq, text"):
        assert fact in body
    assert "| boolq | 300 | 0.711 |" in body.splitlines()
    assert "| text" not in body  # a completion task has no accuracy


def test_card_of_a_lora_names_no_experts_and_no_table_without_results() -> None:
    card = model_card(info_of("lora"), ["boolq"], {})
    assert "experts" not in card and "shared_r" not in card and "|" not in card
