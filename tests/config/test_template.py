import re
from pathlib import Path

from malora_dist.config import config_from_dict, load_config
from malora_dist.config.names import leaves
from malora_dist.config.template import recipe_text


def test_the_recipe_loads_and_holds_a_dozen_tasks(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text("my/model"))
    config = load_config(path)
    assert config.model.name_or_path == "my/model" and len(config.data.tasks) == 12


def test_commented_lines_hold_the_defaults(tmp_path: Path) -> None:
    """With every '#key:' line made active the run is the same, apart from keys that need another one first."""
    text = recipe_text()
    active = re.sub(r"(?m)^( *)#(?=[a-z]\w*: )", r"\1", text)
    for needs_another in ("temperature: 2.0", "router_aux_loss_ratio: 0.1"):
        active = active.replace(f"\n  {needs_another}\n", "\n")
    assert active.count("\n  seed: 42\n") == 1
    before, after = tmp_path / "a.yaml", tmp_path / "b.yaml"
    before.write_text(text)
    after.write_text(active)
    assert load_config(before) == load_config(after)


def _in_line() -> set[tuple[str, ...]]:
    """Keys of sections that are written in one line."""
    return {path for path in leaves() if path[:3] == ("data", "tasks", "fields") or path[:2] == ("train", "lr_ratios")}


def test_every_key_is_there() -> None:
    text = recipe_text()
    for path in leaves():
        assert re.search(rf"(?m)^ *#? *{path[-1]}:", text) or path in _in_line(), path


def test_only_the_model_and_the_tasks_are_needed() -> None:
    data = {"model": {"name_or_path": "m"}, "data": {"tasks": [{"name": "t", "train": "t.jsonl"}]}}
    assert config_from_dict(data).adapter.method == "malora"
