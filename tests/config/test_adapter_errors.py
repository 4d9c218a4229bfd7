"""Each rule of the adapter: a recipe's error names the recipe's key, the library's error the argument."""

from typing import Any, get_args

import pytest

from malora_dist import MaloraConfig, inject_adapters
from malora_dist.adapters.methods import METHODS, register_method
from malora_dist.adapters.targets import check_targets
from malora_dist.config import AdapterConfig
from malora_dist.config.load import config_from_dict
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from tests.config.recipes import recipe
from tests.tiny_models import tiny_llama

# What breaks a rule, with the argument that both errors name and the value that they show.
BROKEN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "method": [({"method": "nope"}, "='nope'")],
    "num_experts": [({"num_experts": 0}, "=0")],
    "top_k": [({"top_k": 0}, "=0"), ({"top_k": 9}, "=9")],
    "r": [({"r": 0}, "=0")],
    "shared_r": [({"r": 8, "shared_r": 2}, "=2")],
    "compression_ratio": [({"compression_ratio": 1.5}, "=1.5"), ({"compression_ratio": 0.01}, "=0.01")],
    "lora_alpha": [({"lora_alpha": 0}, "=0")],
    "scaling": [({"scaling": "sum"}, "='sum'")],
    "beta": [({"beta": 0}, "=0")],
    "lora_dropout": [({"lora_dropout": 1}, "=1")],
    "router_aux_loss_coef": [({"router_aux_loss_coef": -1}, "=-1")],
    "router_input": [({"router_input": "y"}, "='y'")],
    "router_dtype": [({"router_dtype": "fp8"}, "='fp8'")],
    "computation": [({"computation": "fast"}, "='fast'")],
    "target_modules": [({"target_modules": []}, "="), ({"target_modules": ["(q"]}, "")],
}
# Rules that need a model.
BROKEN_ON_A_MODEL: list[tuple[dict[str, Any], str, str]] = [
    ({"shared_r": 500}, "shared_r=500", "must be at most the 48 inputs"),
    ({"target_modules": ("no_proj",)}, "target_modules: 'no_proj'", "matches no module"),
    ({"target_modules": ("mlp",)}, "target_modules: 'mlp'", "is not a linear layer"),
    ({"target_modules": ("q_proj", "self_attn.q_proj")}, "target_modules: 'q_proj' and", "both match"),
]
# Keys of a run, which the library does not take, and switches.
RECIPE_ONLY = {
    "router_aux_loss_reduction",
    "router_aux_loss_schedule",
    "router_aux_loss_ratio",
    "router_z_loss_coef",
    "balance_scope",
    "task_conflict",
}


def test_every_key_with_a_rule_is_here() -> None:
    fields = {name: field.annotation for name, field in AdapterConfig.model_fields.items()}
    switches = {name for name, annotation in fields.items() if annotation is bool or bool in get_args(annotation)}
    assert set(BROKEN) == set(fields) - switches - RECIPE_ONLY


@pytest.mark.parametrize(
    ("values", "key", "shown"), [(values, key, shown) for key, cases in BROKEN.items() for values, shown in cases]
)
def test_a_value_that_breaks_a_rule(values: dict[str, Any], key: str, shown: str) -> None:
    with pytest.raises(ConfigError) as of_recipe:
        config_from_dict(recipe(adapter=values))
    assert f"adapter.{key}" in str(of_recipe.value) and shown in str(of_recipe.value)
    with pytest.raises(ConfigError) as of_library:
        MaloraConfig(**values)
    assert str(of_library.value).startswith(f"{key}{shown}") and "adapter." not in str(of_library.value)


@pytest.mark.parametrize(("values", "key", "rule"), BROKEN_ON_A_MODEL)
def test_a_rule_of_the_model(values: dict[str, Any], key: str, rule: str) -> None:
    model = tiny_llama()
    config = config_from_dict(recipe(adapter={"target_modules": ["q_proj"], **values}))
    with pytest.raises(ConfigError) as of_recipe:
        check_targets(model, config.adapter.target_modules, adapter_spec(config))
    assert f"adapter.{key}" in str(of_recipe.value) and rule in str(of_recipe.value)
    library = MaloraConfig(**{"target_modules": ["q_proj"], **values})
    with pytest.raises(ConfigError) as of_library:
        inject_adapters(model, library.spec, library.target_modules or ())
    assert key in str(of_library.value) and rule in str(of_library.value) and "adapter." not in str(of_library.value)


def test_a_name_that_is_registered() -> None:
    with pytest.raises(ConfigError, match="^name='lora' is registered already"):
        register_method("lora", METHODS["dora"])
