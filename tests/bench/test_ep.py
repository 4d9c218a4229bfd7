"""The whole command on two processes, and on one; no time is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest

from malora_dist.bench.ep_options import EpOptions
from malora_dist.bench.local.output import Output
from tests.e2e import RECIPE, make_folder, run_alone
from tests.multiprocess import run_distributed

STEPS, WARMUP, BLOCKS, EXPERTS = 2, 1, 2, RECIPE["adapter"]["num_experts"]
REFERENCE, SPREAD, FULL = "ZeRO-3, ep 1, NF4", "ZeRO-3, ep 2, NF4", "ZeRO-3, ep 1, not quantised"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The JSON file, and what each process saw."""
    recipe = (folder / "recipe.yaml").read_text()
    for name in ("model", "data", "cache"):
        recipe = recipe.replace(f": {name}\n", f": {folder / name}\n").replace(f" {name}/", f" {folder / name}/")
    (folder / "absolute.yaml").write_text(recipe)
    options = EpOptions(
        recipe=str(folder / "absolute.yaml"),
        steps=STEPS,
        warmup=WARMUP,
        output=Output(folder / "two.json", folder / "two.md"),
    )
    seen = run_distributed("tests.bench.workers:recorded_bench", 2, options=options)
    return json.loads((folder / "two.json").read_text()), seen


@pytest.mark.distributed
def test_every_variant_is_what_its_name_says(measured: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result, seen = measured
    assert len(result["variants"]) == 11
    for name, variant in result["variants"].items():
        spread, sets = variant["ep_size"] > 1, (3 if variant["share"] else 6) * BLOCKS
        assert seen[0]["found"][name] == {
            "zero_stage": variant["zero_stage"],
            "load_in_4bit": variant["load_in_4bit"],
            "experts": EXPERTS // variant["ep_size"],
            "overlap": variant["overlap"],
            "dispatches": sets if spread else 0,
        }


@pytest.mark.distributed
def test_bytes_are_those_of_the_messages(measured: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result, seen = measured
    for name, variant in result["variants"].items():
        written = [sum(record["sent_bytes"].values()) for record in variant["records"]]
        assert written == [sum(both) for both in zip(*(process["sent"][name] for process in seen), strict=True)]
        assert min(written) > 0 if variant["ep_size"] > 1 else written == [0] * (STEPS + WARMUP)
        for record in variant["records"]:
            assert record["uniform_bytes"] == pytest.approx(record["sent_bytes"], rel=0.25)


@pytest.mark.distributed
def test_all_variants_of_one_base_have_one_loss(measured: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    variants = measured[0]["variants"]
    losses = {name: [record["loss"] for record in variant["records"]] for name, variant in variants.items()}
    assert all(len(values) == STEPS + WARMUP for values in losses.values())
    assert max(losses[REFERENCE]) - min(losses[REFERENCE]) > 1e-3, "batches differ"
    for name, values in losses.items():
        if name != FULL:
            assert values == pytest.approx(losses[REFERENCE], abs=1e-5), name
    assert losses[FULL] != pytest.approx(losses[REFERENCE], abs=1e-3)


@pytest.mark.distributed
def test_rows_follow_from_the_records(measured: tuple[dict[str, Any], list[dict[str, Any]]], folder: Path) -> None:
    result, _ = measured
    assert [c["topic"] for c in result["comparisons"]] == ["ep", "overlap", "share", "base", "zero"]
    first, second = result["comparisons"][0]["rows"]
    a, b = (result["variants"][name]["records"][WARMUP:] for name in (REFERENCE, SPREAD))
    assert first["variant"] == REFERENCE and first["ratio"] == 1 and first["loss_difference"] == 0
    ratios = [right["seconds"] / left["seconds"] for left, right in zip(a, b, strict=True)]
    assert second["ratio"] == pytest.approx(sum(ratios) / STEPS), "the median of two is their mean"
    returned = [record["sent_bytes"]["returns"] for record in b]
    assert second["sent_bytes"]["returns"] == sum(returned) / STEPS / 2 and first["sent_bytes"] == {}
    assert 0 < second["waiting_share"] < 1 and first["waiting_share"] == 0
    rows = {row["variant"]: row for comparison in result["comparisons"] for row in comparison["rows"]}
    assert rows["ZeRO-0, ep 1, NF4"]["kept_bytes"] > 1.9 * rows[REFERENCE]["kept_bytes"]
    text = (folder / "two.md").read_text()
    assert text.count("### ") == 6 and all(f"| {name} |" in text for name in result["variants"])


@pytest.mark.e2e
def test_one_process_and_nothing_is_overwritten(folder: Path) -> None:
    command = ["bench", "ep", "recipe.yaml", "--num_gpus", "1", "--variants", "ep", "--steps", "1"]
    settings = ["--warmup", "0", "--json", "one.json", "--train.seed", "7"]
    done = run_alone("malora_dist.cli", [*command, *settings], folder)
    assert done.code == 0 and "step 1/1" in done.output, done.output
    result = json.loads((folder / "one.json").read_text())
    assert list(result["variants"]) == [REFERENCE] and result["world_size"] == 1
    done = run_alone("malora_dist.bench.run", ["recipe.yaml", *command[3:], "--json", "one.json"], folder)
    assert done.code == 2 and "--json one.json exists, and is not overwritten" in done.output
