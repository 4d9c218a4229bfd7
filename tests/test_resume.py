"""A run saved in any topology goes on in any other one, over a 4-bit base, in the middle of an epoch.

At the same topology every bit is that of a run that was never stopped; otherwise numbers agree to rounding.
"""

from pathlib import Path
from typing import Any

import pytest

from malora_dist.checkpoint.read import Checkpoint
from tests.multiprocess import run_distributed
from tests.resume_workers import LAST, SAVED
from tests.training.workers import make_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow("every topology goes on from every other one")]

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]
# Several parameter groups, of routers and S_A alone, of experts alone, and of both.
RATES: dict[str, Any] = {"lr_ratios": {"gate": 0.5, "B": 4.0}}
CASES: dict[str, dict[str, Any]] = {
    f"w{world}ep{ep}z{stage}": {"world": world, "ep_size": ep, "zero_stage": stage, "load_in_4bit": True} | RATES
    for world, ep in LAYOUTS
    for stage in (0, 2, 3)
}
REFERENCE = "w1ep1z0"
# Other optimizers and methods, each gone on from itself.
ALONE: dict[str, dict[str, Any]] = {
    "offloaded at 2": {"zero_stage": 2, "offload": True},
    "offloaded at 3": {"zero_stage": 3, "offload": True},
    "dora": {"zero_stage": 3, "method": "dora", "shape": {"num_experts": 1, "top_k": 1, "shared_r": None}},
    "hydralora": {"zero_stage": 2, "method": "hydralora", "shape": {"shared_r": None}},
    "molora": {"zero_stage": 3, "ep_size": 2, "method": "molora", "shape": {"shared_r": None}},
    "frozen router": {"zero_stage": 3, "ep_size": 2, "tied_router": True},
    "router on h": {"zero_stage": 3, "ep_size": 2, "shape": {"router_input": "h"}},
    "kept whole": {"zero_stage": 3, "default_persistence": True},
}
PAIRS = [f"{source} -> {target}" for target in CASES for source in CASES]


def of_world(world: int) -> dict[str, dict[str, Any]]:
    alone = {name: {**case, "load_in_4bit": True, "alone": True} for name, case in ALONE.items()} if world == 2 else {}
    return {name: case for name, case in CASES.items() if case["world"] == world} | alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model")
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """Every case trained without a stop, with a checkpoint on the way."""
    found: dict[str, Any] = {}
    for world in (1, 2, 4):
        arguments = {"folder": str(folder / "model"), "output": str(folder / "out"), "cases": of_world(world)}
        found |= run_distributed("tests.resume_workers:save_all", world, **arguments)[0]
    return found


@pytest.fixture(scope="module")
def resumed(folder: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Every case gone on from the checkpoint of every case."""
    found: dict[str, Any] = {}
    for world in (1, 2, 4):
        found |= run_distributed(
            "tests.resume_workers:go_on_from_all",
            world,
            folder=str(folder / "model"),
            output=str(folder / "out"),
            cases=of_world(world),
            sources=list(CASES),
            reference=REFERENCE,
        )[0]
    return found


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_goes_on_in_any_topology(pair: str, resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    source, _, target = pair.partition(" -> ")
    found = resumed[pair]
    assert found["counts"] == {"optimizer": SAVED, "scheduler": SAVED, "engine": SAVED, "micro": SAVED}
    assert found["window"] == SAVED and len(found["steps"]) == LAST - SAVED
    for step, wanted in zip(found["steps"], whole[REFERENCE]["steps"][SAVED:], strict=True):
        assert step["learning_rate"] == wanted["learning_rate"] > 0
        for name, tolerance in (("loss", 2e-6), ("aux_loss", 2e-6), ("grad_norm", 5e-6)):
            assert step[name] == pytest.approx(wanted[name], abs=tolerance), name
    apart = found["apart"]
    assert apart["adapter"] < 4e-6 and apart["optimizer.exp_avg."] < 1e-7 and apart["optimizer.exp_avg_sq."] < 1e-10
    if source == target:
        assert found["bit_equal"] and found["steps"] == whole[target]["steps"][SAVED:]
        assert found["routing"] == whole[target]["routing"]


@pytest.mark.parametrize("name", ALONE)
def test_other_optimizers_and_methods_go_on_bit_by_bit(
    name: str, resumed: dict[str, Any], whole: dict[str, Any]
) -> None:
    found = resumed[f"{name} -> {name}"]
    assert found["bit_equal"] and found["steps"] == whole[name]["steps"][SAVED:]
    assert found["counts"]["optimizer"] == SAVED and found["routing"] == whole[name]["routing"]


@pytest.mark.parametrize("name", CASES)
def test_a_large_state_is_written_by_several_processes(name: str, folder: Path, whole: dict[str, Any]) -> None:
    checkpoint = Checkpoint.open(folder / "out" / name / f"step-{SAVED:06d}")
    checkpoint.verify()
    world = CASES[name]["world"]
    shards = {file for file in checkpoint.manifest.files if file.startswith("adapter-")}
    assert shards == {f"adapter-{number + 1:05d}-of-{world:05d}.safetensors" for number in range(world)}
    assert {rng.partition(".")[0] for rng in checkpoint.names("rng")} == {str(rank) for rank in range(world)}
    (record,) = whole[name]["records"]
    assert record["step"] == SAVED and record["bytes"] == sum(f.bytes for f in checkpoint.manifest.files.values())
