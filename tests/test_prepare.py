"""`malora prepare` as a user runs it: with the network first, then without, and a run that starts from what it left."""

import json
import re
from pathlib import Path

import pytest

from tests.e2e import Finished, contents, files, launch, make_folder, run_alone, run_ranks
from tests.hub import local_hub

pytestmark = pytest.mark.e2e

MODEL = ("--model.name_or_path", "org/tiny")
SHORT = ("--train.max_steps", "2", "--train.eval_steps", "null", "--train.save_steps", "null",
         "--evaluation.base", "false", "--evaluation.tuned", "false")  # fmt: skip
HUB = {"HF_HOME": "hub", "MALORA_CACHE": "prepared"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("prepare"))


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Finished:
    with local_hub({"org/tiny": folder / "model"}) as url:
        done = launch(["malora", "prepare", "recipe.yaml", *MODEL], folder, HF_ENDPOINT=url, **HUB)
    assert done.code == 0, done.output
    return done


def test_it_says_what_it_made_and_where(prepared: Finished, folder: Path) -> None:
    said = " ".join(prepared.output.split())
    assert re.search(r"model: .*hub/hub/models--org--tiny/snapshots/", said)
    assert "training samples, tokenised: colour 2" in said and "Traceback" not in said
    assert re.search(r"base: prepared/base/tiny-nf4-[0-9a-f]{24} \(0.0\d GiB, written\)", said)
    base = next((folder / "prepared" / "base").glob("tiny-nf4-*[0-9a-f]"))
    assert files(base) == {"manifest.json", "model.safetensors.index.json", "weights-00001.safetensors"}
    assert json.loads((base / "manifest.json").read_text())["dtype"] == "float32"


def test_a_run_without_network_starts_from_it(prepared: Finished, folder: Path) -> None:
    """Each of two processes reads half of the base, and the tasks are not tokenised again."""
    before = {name: content for name, content in contents(folder).items() if name.startswith(("prepared/", "cache/"))}
    offline = HUB | {"HF_HUB_OFFLINE": "1"}
    done = run_ranks(2, "malora_dist.train", ["recipe.yaml", *MODEL, *SHORT], folder, **offline)
    assert done.code == 0, done.output
    said = re.search(r"base model: prepared in prepared/base/\S+; this process read ([\d.]+) MiB", done.output)
    size = next((folder / "prepared" / "base").glob("*/weights-*")).stat().st_size / 2**20
    assert said is not None and float(said[1]) == pytest.approx(size / 2, abs=0.1)
    after = {name: content for name, content in contents(folder).items() if name.startswith(("prepared/", "cache/"))}
    assert after == before

    elsewhere = ["recipe.yaml", *SHORT, "--output_dir", "runs/plain"]
    plain = run_ranks(2, "malora_dist.train", elsewhere, folder, MALORA_CACHE="nothing")
    assert plain.code == 0 and "quantised now" in plain.output, plain.output
    adapter = "adapter/adapter_model.safetensors"
    assert (folder / "runs/tiny" / adapter).read_bytes() == (folder / "runs/plain" / adapter).read_bytes()


def test_again_it_finds_everything_there(prepared: Finished, folder: Path) -> None:
    before = contents(folder / "prepared")
    again = run_alone("malora_dist.cli", ["prepare", "recipe.yaml", *MODEL], folder, HF_HUB_OFFLINE="1", **HUB)
    assert again.code == 0 and "was there" in again.output, again.output
    assert contents(folder / "prepared") == before


def test_without_network_and_model_it_says_so_at_once(folder: Path) -> None:
    other = ["prepare", "recipe.yaml", "--model.name_or_path", "org/other"]
    done = run_alone("malora_dist.cli", other, folder, HF_HUB_OFFLINE="1", **HUB)
    assert done.code == 2 and "Traceback" not in done.output
    assert "model.name_or_path='org/other'" in done.output and "HF_HUB_OFFLINE=1" in done.output
