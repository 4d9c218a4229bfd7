"""The shipped recipes are valid."""

from pathlib import Path

import pytest

from malora_dist.config.load import load_config
from tests.config.recipes import RECIPES


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path) -> None:
    assert len(load_config(path).data.tasks) >= 5


def test_demo_recipe_reads_what_the_demo_writes() -> None:
    from malora_dist.recipes.demo import MODEL_FILE
    from malora_dist.recipes.demo_tasks import TASKS
    from malora_dist.recipes.questions import SPLITS

    config = load_config(RECIPES / "demo.yaml")
    assert config.model.name_or_path == f"demo/{MODEL_FILE}"
    files = {file for task in config.data.tasks for file in (*task.train, *(task.validation or ()), *(task.test or ()))}
    assert files == {f"demo/tasks/{task}/{split}.jsonl" for task in TASKS for split in SPLITS}
