from dataclasses import replace
from pathlib import Path

import pytest

from malora_dist.bench.ep_options import EpOptions
from malora_dist.errors import ConfigError

OPTIONS = EpOptions(recipe="r.yaml", overrides=("--adapter.r", "16", "x.y=-1"), topics=("ep", "zero"), steps=3)


def test_the_command_and_the_words_of_its_processes() -> None:
    given = "--steps 3 --warmup 2 --variants ep,zero"
    assert OPTIONS.command(2) == f"malora bench ep r.yaml --num_gpus 2 {given} --adapter.r 16 x.y=-1"
    words = replace(OPTIONS, json=Path("a b.json")).words()
    assert words == ["r.yaml", *given.split(), "--json", "a b.json", "--adapter.r", "16", "x.y=-1"]


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    replace(OPTIONS, json=tmp_path / "new.json").check_files()
    (tmp_path / "old.md").touch()
    with pytest.raises(ConfigError, match="--markdown .*old.md exists, and is not overwritten"):
        replace(OPTIONS, markdown=tmp_path / "old.md").check_files()
    with pytest.raises(ConfigError, match="--json .* is in a folder that does not exist"):
        replace(OPTIONS, json=tmp_path / "none" / "x.json").check_files()
