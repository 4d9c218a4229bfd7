"""A method that is one more row of METHODS, and nothing else, from validate to report.

The row is top-k routing over experts that act on one shared projection, which no shipped method is.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.adapters.methods import METHODS, Structure, mixture_spec, register_method
from malora_dist.config import AdapterConfig, config_from_dict
from malora_dist.config.template import recipe_text
from malora_dist.convert.kinds import KINDS, methods_that_fit
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.models.load import load_base_model
from tests.commands import malora
from tests.config.recipes import recipe
from tests.e2e import RECIPE, make_folder, run_ranks
from tests.tiny_models import tiny_llama

NAME = "sparse_hydra"
ROW = Structure(about="top_k experts act on one shared projection", shared_down=True, routed=True)
NUMBERS = {"method": NAME, "num_experts": 4, "top_k": 2, "r": 4, "lora_dropout": 0.1}


@pytest.fixture
def registered() -> Iterator[None]:
    register_method(NAME, ROW)
    yield
    del METHODS[NAME]


def train(arguments: Sequence[str]) -> int:
    """malora_dist.train in a process that registers the method first."""
    import malora_dist.train

    register_method(NAME, ROW)
    return malora_dist.train.main(arguments)


@pytest.mark.usefixtures("registered")
def test_config_follows_from_the_structure() -> None:
    config = config_from_dict(recipe(adapter={"method": NAME, "top_k": 3}))
    unused = set(config.adapter.inapplicable_fields()) - set(AdapterConfig().inapplicable_fields())
    assert unused == {"shared_r", "compression_ratio", "beta"}
    assert NAME in AdapterConfig.model_json_schema()["properties"]["method"]["enum"]
    assert f"malora, {NAME}." in " ".join(recipe_text().replace("#", " ").split())
    for key, value in (("shared_r", 8), ("beta", 2.0)):
        with pytest.raises(ConfigError, match=rf"adapter.{key}=.*: has no meaning for adapter.method={NAME}"):
            config_from_dict(recipe(adapter={"method": NAME, key: value}))
    with pytest.raises(ConfigError, match="adapter.top_k=9: must be at most adapter.num_experts=8"):
        config_from_dict(recipe(adapter={"method": NAME, "top_k": 9}))
    assert NAME in methods_that_fit(KINDS["peft-experts"]) and NAME not in methods_that_fit(KINDS["peft"])


def test_errors_list_the_registered_methods() -> None:
    with pytest.raises(ConfigError, match=f"adapter.method='{NAME}': must be one of lora, .*, malora$"):
        config_from_dict(recipe(adapter={"method": NAME}))
    register_method(NAME, ROW)
    try:
        with pytest.raises(ConfigError, match=f"adapter.method='other': must be one of lora, .*, malora, {NAME}$"):
            config_from_dict(recipe(adapter={"method": "other"}))
        with pytest.raises(ConfigError, match=f"name='{NAME}' is registered already"):
            register_method(NAME, METHODS["lora"])
    finally:
        del METHODS[NAME]


@pytest.mark.parametrize(
    ("switches", "rule"),
    [
        ({"expert_down": True, "routed": True}, "expert_down needs shared_down"),
        ({"dense": True}, "dense needs routed"),
        ({"shared_down": True}, "shared_down needs routed"),
        ({"routed": True, "magnitude": True}, "magnitude needs a single expert"),
    ],
)
def test_a_structure_that_no_layer_computes_is_refused(switches: dict[str, bool], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Structure(about="", **switches)


@pytest.mark.usefixtures("registered")
def test_an_adapted_model_learns() -> None:
    model = tiny_llama(torch.float32).train()
    inject_adapters(model, mixture_spec(NAME, num_experts=4, top_k=2, r=4), fuse_projections=True)
    assert {name.rpartition(".")[2] for name, _ in adapter_parameters(model)} == {"gate", "shared_A", "B"}
    assert all(layer.balanced and layer.top_k == 2 for _, layer in mixture_layers(model))
    optimizer = torch.optim.AdamW([parameter for _, parameter in adapter_parameters(model)], lr=1e-2)
    ids, losses = torch.arange(24).view(2, 12), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.e2e
@pytest.mark.usefixtures("registered")
def test_a_whole_run_with_experts_on_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path)
    content: dict[str, Any] = {**RECIPE, "adapter": NUMBERS, "parallel": {**RECIPE["parallel"], "ep_size": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder)
    assert malora("validate", "recipe.yaml", "--world-size", "2") == 0
    assert f"{NAME}: num_experts 4, top_k 2, r 4" in " ".join(capsys.readouterr().out.split())
    assert malora("plan", "recipe.yaml", "--gpus-per-node", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["alternatives"]
    done = run_ranks(2, "tests.test_new_method:train", ["recipe.yaml", "--train.max_steps", "3"], folder)
    assert done.code == 0, done.output
    run = folder / "runs" / "tiny"
    assert NAME in (run / "report" / "index.html").read_text()
    model = load_base_model(folder / "model", dtype=torch.float32, load_in_4bit=False)
    assert load_adapter(model, run).spec == mixture_spec(NAME, num_experts=4, top_k=2, r=4)
    assert all(parameter.abs().sum() > 0 for _, parameter in adapter_parameters(model))
    del METHODS[NAME]
    try:
        with pytest.raises(CheckpointError, match=f"malora.method='{NAME}' must be one of lora"):
            open_adapter(run)
    finally:
        register_method(NAME, ROW)
