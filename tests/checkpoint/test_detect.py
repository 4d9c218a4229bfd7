"""Of a path that is no checkpoint, the message says what it is."""

from pathlib import Path

import pytest

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.errors import CheckpointError

FOUND = {
    "nothing": ([], "does not exist"),
    "an empty folder": (["x/"], "it is empty"),
    "adapter": (["x/adapter_config.json", "x/adapter_model.safetensors"], "an adapter folder"),
    "run": (["x/config.yaml", "x/adapter/adapter_config.json", "x/checkpoints/latest"], "a run folder"),
    "checkpoints": (["x/latest", "x/step-000010/manifest.json", "x/step-000020/a"], "the newest is step-000020"),
    "DeepSpeed": (["x/latest", "x/global_step10/mp_rank_00_model_states.pt", "x/zero_to_fp32.py"], "DeepSpeed"),
    "DeepSpeed inside": (["x/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
    "pickles": (["x/optimizer.pt", "x/scheduler.pt"], "pickles, which are never unpickled"),
    "model": (["x/config.json", "x/model-00001-of-00002.safetensors"], "model weights"),
    "other": (["x/b", "x/a"], "it holds a, b"),
    "file": (["x"], "a file, not a folder"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_path_is(tmp_path: Path, name: str) -> None:
    paths, words = FOUND[name]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).mkdir() if path.endswith("/") else (tmp_path / path).touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'x'} is not a checkpoint.*{words}"):
        Checkpoint.open(tmp_path / "x")


def test_a_pickle_and_leftovers(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match="a pickle, which is never unpickled"):
        Checkpoint.open(tmp_path / "model.pt")
    for name in (".step-000003.partial", ".step-000003.removed"):
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match="unfinished or partly removed"):
            Checkpoint.open(tmp_path / name)
