"""Recipes, settings on the command line, DeepSpeed's settings and hostfiles that are almost right: taken, or refused
in words that name the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from malora_dist.config import config_from_dict, config_text, load_config, plain_config
from malora_dist.config.compatibility import check_plan, suggest_world_sizes
from malora_dist.config.deepspeed import deepspeed_config, read_ds_config
from malora_dist.config.names import leaves
from malora_dist.config.summary import adapter_spec, missing_files, summary_table
from malora_dist.errors import ConfigError, TopologyError
from malora_dist.launch.ssh import hostfile
from malora_dist.launch.ssh.hostfile import choose_hosts, read_hostfile, slots_per_host
from tests.config.recipes import recipe
from tests.fuzz.mutate import BROKEN, ODD, broken_text, mutated
from tests.multiprocess import ROOT

RECIPES = sorted((ROOT / "malora_dist" / "recipes").glob("*.yaml"))


def check_message(error: Exception, *words: str) -> None:
    """One line, or one for each mistake; with these words."""
    said = str(error)
    assert all(word in said for word in words), said
    assert said.count("\n") == 0 or "errors:\n" in said or said.count("\n") <= 5, said
    assert all(len(line) < 2500 for line in said.splitlines()), said


def use(path: Path, overrides: list[str]) -> None:
    """What `malora validate` does with a recipe, and what a run writes of it."""
    config = load_config(path, overrides)
    assert load_config_of(config_text(config), path) == config
    worlds = suggest_world_sizes(config)
    plan = check_plan(config, worlds[0] if worlds else 1)
    adapter_spec(config)
    assert isinstance(list(missing_files(config)), list)
    assert summary_table(config, plan, worlds, world_size_given=False).row_count


def load_config_of(text: str, path: Path) -> Any:
    written = path.with_name("written.yaml")
    written.write_text(text, encoding="utf-8")
    return load_config(written)


def test_recipes(draws: Iterator[Random], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    texts = [path.read_text() for path in RECIPES]
    taken = 0
    for draw in draws:
        text = draw.choice(texts)
        if draw.random() < 0.5:
            text = broken_text(draw, text)
        else:
            dump = yaml.safe_dump if draw.random() < 0.5 else json.dumps
            text = dump(mutated(draw, plain_config(config_from_dict(yaml.safe_load(text)))))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            use(path, [])
            taken += 1
        except ConfigError as error:
            check_message(error)
        except TopologyError:
            pass
    assert taken


@pytest.mark.parametrize("path", [path for path in leaves() if path[:2] != ("data", "tasks")], ids=".".join)
def test_every_setting_takes_or_refuses_every_odd_number(path: tuple[str, ...], tmp_path: Path) -> None:
    """None of them makes a list of 10**40 items, or anything else that never ends."""
    check_numbers(f"--{'.'.join(path)}", tmp_path)


@pytest.mark.parametrize("key", [path[2] for path in leaves() if path[:2] == ("data", "tasks") and len(path) == 3])
def test_every_setting_of_a_task_takes_or_refuses_every_odd_number(key: str, tmp_path: Path) -> None:
    check_numbers(f"--data.tasks.boolq.{key}", tmp_path)


def check_numbers(flag: str, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_text(config_text(config_from_dict(recipe())))
    for value in (value for value in ODD if isinstance(value, int | float)):
        try:
            use(path, [f"{flag}={json.dumps(value)}"])
        except ConfigError as error:
            check_message(error)
        except TopologyError:
            pass


def test_settings_on_the_command_line(draws: Iterator[Random], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(config_text(config_from_dict(recipe())))
    keys = [".".join(leaf) for leaf in leaves()] + [
        "data.tasks.boolq.weight",
        "data.tasks.0.train",
        "data.tasks",
        "x",
        "",
    ]
    taken = 0
    for draw in draws:
        overrides = []
        for _ in range(draw.choice((1, 1, 2, 4))):
            key = draw.choice(keys) if draw.random() < 0.8 else broken_text(draw, draw.choice(keys))
            value = draw.choice((str(draw.choice(ODD)), json.dumps(draw.choice(ODD)), draw.choice(BROKEN), "a\udce9"))
            overrides += draw.choice(([f"--{key}={value}"], [f"--{key}", value], [f"{key}={value}"]))
        try:
            use(path, overrides)
            taken += 1
        except ConfigError as error:
            check_message(error)
        except TopologyError:
            pass
    assert taken


def test_deepspeed_settings(draws: Iterator[Random], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = config_from_dict(recipe(parallel={"ds_config": str(path)}))
    files = [json.loads(file.read_text()) for file in sorted((ROOT / "ds_configs").glob("*.json"))]
    taken = 0
    for draw in draws:
        value = mutated(draw, draw.choice(files)) if draw.random() < 0.9 else draw.choice(files)
        text = json.dumps(value) if draw.random() < 0.6 else broken_text(draw, json.dumps(value))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            made = deepspeed_config(config, 2)
            assert made["train_batch_size"] == config.train.global_batch_size
            assert isinstance(read_ds_config(path), dict)
            taken += 1
        except ConfigError as error:
            assert str(path) in str(error)
            assert all(len(line) < 2500 for line in str(error).splitlines())
    assert taken


def test_hostfiles(draws: Iterator[Random], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Names that the network knows are not what is drawn here.
    monkeypatch.setattr(hostfile, "addresses", lambda host: set())
    path = tmp_path / "hosts"
    taken = 0
    for draw in draws:
        hosts = "".join(f"host{n} slots={draw.choice((1, 2, 8))}\n" for n in range(draw.choice((1, 3))))
        path.write_bytes(broken_text(draw, f"# ours\n{hosts}").encode("utf-8", "surrogatepass"))
        chosen = broken_text(draw, draw.choice(("host0", "host0:0", "host1@host0:0,1")))
        try:
            found = read_hostfile(path)
            assert found and all(slots >= 1 for slots in found.values())
            include, exclude = draw.choice(((chosen, None), (None, chosen), (None, None)))
            assert slots_per_host(choose_hosts(found, include, exclude)) >= 1
            taken += 1
        except ConfigError as error:
            assert str(error)
    assert taken
