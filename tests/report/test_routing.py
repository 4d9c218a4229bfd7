import random
import re

import pytest

from malora_dist.report.routing import (
    layer_heat_maps,
    mean_heat_map,
    mean_shares,
    sample_layers,
    separation,
    separation_chart,
    short_layer,
)
from tests.report.run_folder import EXPERTS, TASKS, routing_record

RECORD = {
    "tasks": ["a", "b", "unseen"],
    "share": {
        "a": {"l0": [1.0, 0.0], "l1": [0.5, 0.5]},
        "b": {"l0": [0.0, 1.0], "l1": [0.5, 0.5]},
        "unseen": {"l0": [0.0, 0.0], "l1": [0.0, 0.0]},
    },
}


def test_mean_over_layers_leaves_out_tasks_without_tokens() -> None:
    assert mean_shares(RECORD) == {"a": [0.75, 0.25], "b": [0.25, 0.75]}


def test_separation_is_the_mean_distance_from_the_common_choice() -> None:
    assert separation({"a": [1.0, 0.0], "b": [0.0, 1.0]}) == pytest.approx(0.5)
    assert separation({"a": [0.3, 0.7], "b": [0.3, 0.7]}) == 0.0
    apart = {str(task): [float(task == expert) for expert in range(8)] for task in range(8)}
    assert separation(apart) == pytest.approx(1 - 1 / 8)


def test_a_cell_for_each_task_and_expert_darker_with_its_share() -> None:
    record = routing_record(TASKS, 1, 3, random.Random(0))
    svg = mean_heat_map(record)
    shares = [value for row in mean_shares(record).values() for value in row]
    opacities = [float(value) for value in re.findall(r"fill: var\(--accent\); opacity: ([\d.]+)", svg)]
    assert len(opacities) == len(TASKS) * EXPERTS
    full = opacities[0] / shares[0]
    assert opacities == pytest.approx([full * share for share in shares], abs=1e-5)
    assert all(f">{task}</text>" in svg for task in TASKS)


def test_single_layers() -> None:
    record = routing_record(TASKS, 1, 30, random.Random(0))
    layers = sample_layers(record)
    assert len(layers) == 6 and layers[0].startswith("model.layers.0.") and layers[-1].startswith("model.layers.29.")
    assert list(layer_heat_maps(record, TASKS)) == layers
    assert sample_layers(RECORD) == ["l0", "l1"]
    assert short_layer("model.layers.3.self_attn.q_proj") == "layer 3, q_proj" and short_layer("proj") == "proj"


def test_one_task_has_nothing_to_part_from() -> None:
    assert separation_chart(routing_record(["a"], 1, 3, random.Random(0))) is None
