"""Tokens are counted right, and the whole command runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from malora_dist.bench.local.data_rate import Drawn, all_tokens, prepare_twice, rates
from malora_dist.config import load_config
from malora_dist.data.build import build_data
from malora_dist.distributed.process_groups import World
from malora_dist.models.load import load_tokenizer
from malora_dist.training.setup import train_loader
from tests.e2e import RECIPE, make_folder, run_alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data_rate"))


def test_tokens_are_those_in_the_files_and_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config, tokenizer = load_config("recipe.yaml"), load_tokenizer(folder / "model")
    data, records = prepare_twice(config.data, tokenizer)
    build_data(config.data, tokenizer)
    stored = sum(len(np.load(path)) for path in (folder / "cache").rglob("*.ids.npy"))
    assert all_tokens(data) == stored
    assert [(record.name, record.facts["tokens"]) for record in records] == [
        ("first time", stored),
        ("from the cache", stored),
    ]
    drawn = Drawn(train_loader(config, data, World(0, 1, 0, torch.device("cpu"))), World(0, 1, 0, torch.device("cpu")))
    drawn()
    ids = drawn.loader.global_batch(RECIPE["train"]["global_batch_size"])
    assert drawn.tokens == [sum(len(data.train[int(i)].input_ids) for i in ids)]
    assert len(drawn.batches) == 4


def test_rates_are_compared_round_by_round() -> None:
    """Three rounds with 100, 400 and 900 times training's rate."""
    times = {"loader": [1.0, 0.5, 0.25], "training": [10.0, 20.0, 25.0]}
    loader, training = rates("case", times, {"loader": [100, 200, 225], "training": [10, 20, 25]})
    assert (loader.facts["times training's rate"], loader.facts["quartiles of it"]) == (400, "250-650")
    assert (loader.facts["tokens/s"], training.facts["tokens/s"]) == (400, 1)
    assert (loader.facts["tokens a step"], training.facts["tokens a step"]) == (175, 18)
    assert (loader.median_s, training.median_s) == (0.5, 20.0)


@pytest.mark.e2e
def test_the_command(folder: Path) -> None:
    command = ["bench", "data", "recipe.yaml", "--repeats", "1", "--warmup", "0", "--json", "rate.json"]
    done = run_alone("malora_dist.cli", [*command, "--train.seed", "7"], folder)
    assert done.code == 0, done.output
    result = json.loads((folder / "rate.json").read_text())
    assert result["command"] == "malora bench data recipe.yaml --repeats 1 --warmup 0 --train.seed 7"
    assert [record["name"] for record in result["records"]] == ["first time", "from the cache", "loader", "training"]
    assert all(record["median_s"] > 0 and record["facts"]["tokens/s"] > 0 for record in result["records"])
