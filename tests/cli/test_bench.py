"""The command line of the benchmarks; what the commands do is tested beside their modules."""

import inspect
from dataclasses import fields
from importlib import import_module

import pytest

from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.cli.bench import bench
from tests.commands import malora_without_torch


@pytest.mark.e2e
@pytest.mark.parametrize("verb", ["layer", "step"])
def test_help_needs_no_torch_and_names_everyone(verb: str) -> None:
    done = malora_without_torch("bench", verb, "--help", COLUMNS="400", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("--repeats", "--json", ",".join(BASELINES)))


@pytest.mark.parametrize(
    ("verb", "name"), [("layer", "LayerOptions"), ("step", "StepOptions"), ("launches", "LaunchOptions")]
)
def test_the_command_has_the_options_of_its_module_and_their_defaults(verb: str, name: str) -> None:
    options = getattr(import_module(f"malora_dist.bench.local.{verb}"), name)
    (command,) = [one.callback for one in bench.registered_commands if one.callback.__name__ == verb]
    parameters = inspect.signature(command).parameters
    given = {key: parameter.default for key, parameter in parameters.items() if key != "context"}
    assert given == {option.name: option.default for option in fields(options)} | {"as_json": None, "markdown": None}
