from dataclasses import replace
from pathlib import Path

from malora_dist.bench.ep_options import EpOptions
from malora_dist.bench.local.output import Output

OPTIONS = EpOptions(recipe="r.yaml", overrides=("--adapter.r", "16", "x.y=-1"), topics=("ep", "zero"), steps=3)


def test_the_command_and_the_words_of_its_processes() -> None:
    given = "--steps 3 --warmup 2 --variants ep,zero"
    assert OPTIONS.command(2) == f"malora bench ep r.yaml --num_gpus 2 {given} --adapter.r 16 x.y=-1"
    words = replace(OPTIONS, output=Output(json=Path("a b.json"))).words()
    assert words == ["r.yaml", *given.split(), "--json", "a b.json", "--adapter.r", "16", "x.y=-1"]
