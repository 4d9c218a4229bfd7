"""Every key of a recipe is either of no consequence for a resumed run, or a matter of rounding, or refused."""

import pytest

from malora_dist.config import config_from_dict, plain_config
from malora_dist.config.names import leaves
from malora_dist.config.resume_compatibility import HARMLESS, TOPOLOGY, changes, decisive
from tests.config.recipes import recipe

REFUSED = {
    "evaluation.split", "model.trust_remote_code",
    "model.load_in_4bit", "model.bnb_4bit_quant_type", "model.bnb_4bit_use_double_quant",
    "adapter.method", "adapter.num_experts", "adapter.top_k", "adapter.r", "adapter.shared_r",
    "adapter.compression_ratio", "adapter.lora_alpha", "adapter.use_rslora", "adapter.scaling", "adapter.beta",
    "adapter.lora_dropout",
    "adapter.target_modules", "adapter.router_aux_loss_coef", "adapter.router_aux_loss_reduction",
    "adapter.router_aux_loss_schedule", "adapter.router_aux_loss_ratio", "adapter.router_z_loss_coef",
    "adapter.router_input",
    "adapter.router_dtype", "adapter.task_conflict", "adapter.balance_scope",
    "adapter.normalize_gates", "data.mixture", "data.temperature",
    "train.max_steps", "train.num_train_epochs", "train.global_batch_size", "train.learning_rate",
    "train.lr_ratios.router", "train.lr_ratios.shared_A", "train.lr_ratios.P", "train.lr_ratios.A",
    "train.lr_ratios.B", "train.lr_scheduler_type", "train.warmup_ratio", "train.weight_decay",
    "train.adam_beta1", "train.adam_beta2",
    "train.adam_epsilon", "train.optim", "train.max_grad_norm", "train.loss_normalization", "train.seed",
}  # fmt: skip


def test_every_key_is_of_one_kind() -> None:
    keys = {".".join(path) for path in leaves()}
    known = {key for key in keys if any(key == name or key.startswith(f"{name}.") for name in (*HARMLESS, *TOPOLOGY))}
    assert keys - known == REFUSED
    assert not set(HARMLESS) & set(TOPOLOGY)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("--train.learning_rate=0.1", "refused"),
        ("--adapter.r=4", "refused"),
        ("--parallel.zero_stage=1", "topology"),
        ("--train.save_steps=7", "harmless"),
        ("--evaluation.batch_tokens=7", "harmless"),
        ("--data.max_seq_length=99", "harmless"),
        ("--output_dir=elsewhere", "harmless"),
        ("--data.tasks[1].max_eval_samples=9", "harmless"),
        ("--data.tasks[1].weight=3.0", "refused"),
    ],
)
def test_a_change_names_its_key_and_both_values(override: str, kind: str) -> None:
    written = override.replace("[1]", ".piqa")
    before, now = (plain_config(config_from_dict(recipe(), overrides)) for overrides in ([], [written]))
    (change,) = changes(before, now)
    key, _, value = override.removeprefix("--").partition("=")
    assert (change.key, change.kind, str(change.now)) == (key, kind, value)
    assert str(change) == f"{key}: {change.before!r} -> {change.now!r}"


def test_the_keys_that_decide_are_those_whose_change_is_refused() -> None:
    found = decisive(plain_config(config_from_dict(recipe(), ["--data.tasks.piqa.weight=2"])))
    weights = {key: found.pop(key) for key in list(found) if key.startswith("data.tasks")}
    assert (
        set(found) <= REFUSED
        and found["train.learning_rate"] == 5e-4
        and {"adapter.r", "model.load_in_4bit"} < set(found)
    )
    assert weights["data.tasks[1].weight"] == 2 and all(key.endswith(".weight") for key in weights)


def test_nothing_changed_and_keys_of_other_versions() -> None:
    config = plain_config(config_from_dict(recipe()))
    assert changes(config, config) == []
    older = {**config, "train": {k: v for k, v in config["train"].items() if k != "seed"}}
    (change,) = changes(older, config)
    assert (change.key, change.before, change.kind) == ("train.seed", None, "refused")
