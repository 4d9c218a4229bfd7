"""A run folder with made-up numbers: every value comes from a seeded generator, none from a real run."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from malora_dist.tracking.metrics import MetricsWriter

TASKS = ("alpha", "beta", "gamma", "delta", "epsilon")
EXPERTS = 8


def write_run(folder: Path, *, tasks: Sequence[str] = TASKS, steps: int = 200, layers: int = 4, seed: int = 0) -> Path:
    """Write config.yaml, data.json, metrics.jsonl, eval.json and adapter/adapter_config.json; returns the folder."""
    chance = random.Random(seed)
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(tasks, steps), sort_keys=False))
    (folder / "data.json").write_text(json.dumps({task: counts(chance) for task in tasks}))
    (folder / "eval.json").write_text(json.dumps(evaluations(tasks, chance)))
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config()))
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        metrics.write({"kind": "run", "world_size": 2, "device": "cpu", "trainable_parameters": 4_321_000,
                       "base_parameters": 134_000_000})  # fmt: skip
        for step in range(10, steps + 1, 10):
            metrics.write(train_record(tasks, step, steps, chance))
            if step % 50 == 0:
                metrics.write(validation_record(tasks, step, chance))
        metrics.write(routing_record(tasks, steps, layers, chance))
    return folder


def config(tasks: Sequence[str], steps: int) -> dict[str, Any]:
    return {
        "model": {"name_or_path": "made/up-model", "dtype": "bfloat16", "load_in_4bit": True,
                  "bnb_4bit_quant_type": "nf4"},
        "adapter": {"method": "malora", "num_experts": EXPERTS, "top_k": 2, "r": 12, "shared_r": None,
                    "target_modules": ["q_proj", "up_proj"], "router_aux_loss_reduction": "mean"},
        "data": {"tasks": [{"name": task, "train": f"{task}.jsonl"} for task in tasks], "mixture": "uniform"},
        "parallel": {"zero_stage": 3},
        "train": {"max_steps": steps, "global_batch_size": 16, "per_device_train_batch_size": 8, "seed": 42,
                  "learning_rate": 2e-3, "lr_scheduler_type": "linear", "loss_normalization": "sample"},
    }  # fmt: skip


def adapter_config() -> dict[str, Any]:
    block = {"format_version": 1, "method": "malora", "num_experts": EXPERTS, "top_k": 2, "r": 12, "shared_r": 32,
             "lora_alpha": 24.0}  # fmt: skip
    return {"base_model_name_or_path": "made/up-model", "target_modules": ["q_proj", "up_proj"], "malora": block}


def counts(chance: random.Random) -> dict[str, int]:
    train = chance.randrange(400, 1600)
    return {"rows_read": train + 520, "duplicates_removed": chance.randrange(20), "bad_rows_skipped": 0, "train": train,
            "validation": 200, "test": 300, "samples_per_epoch": 900}  # fmt: skip


def evaluations(tasks: Sequence[str], chance: random.Random) -> dict[str, Any]:
    """Each later task gains less than the one before; the last gains nothing."""
    sides: dict[str, dict[str, Any]] = {"base": {}, "tuned": {}}
    for index, task in enumerate(tasks):
        before, n = chance.uniform(0.25, 0.4), 300
        gain = 0.45 * (1 - index / max(1, len(tasks) - 1))
        majority = chance.uniform(0.25, 0.45)
        for side, p in (("base", before), ("tuned", before + gain)):
            accuracy = round(p * n) / n
            sides[side][task] = {"n": n, "accuracy": accuracy, "accuracy_norm": accuracy - 1 / n, "majority": majority,
                                 "stderr": math.sqrt(accuracy * (1 - accuracy) / n), "loss": 2.5 - p}  # fmt: skip
    return {
        side: {"tasks": rows, "average": sum(row["accuracy"] for row in rows.values()) / len(rows)}
        for side, rows in sides.items()
    }


def train_record(tasks: Sequence[str], step: int, steps: int, chance: random.Random) -> dict[str, Any]:
    losses = {
        f"train/{task}/loss": 0.4 + (2.2 - 0.3 * index) * math.exp(-step / (20 + 12 * index)) + chance.gauss(0, 0.06)
        for index, task in enumerate(tasks)
        if chance.random() > 0.1
    }
    warmup, left = min(1.0, step / (0.05 * steps)), 1 - step / steps
    return {
        "kind": "train",
        "step": step,
        "epoch": step / 120,
        "loss": sum(losses.values()) / max(1, len(losses)),
        "aux_loss": 1 + 0.4 * math.exp(-step / 60) + abs(chance.gauss(0, 0.01)),
        "grad_norm": 0.6 + 2 * math.exp(-step / 30) + abs(chance.gauss(0, 0.1)),
        "learning_rate": 2e-3 * warmup * left,
        "tokens_per_second": chance.gauss(420, 18),
        "step_seconds": chance.gauss(2.1, 0.1),
        "peak_memory_gib": 1.9 + 0.4 * min(1.0, step / 80),
        **losses,
    }


def validation_record(tasks: Sequence[str], step: int, chance: random.Random) -> dict[str, Any]:
    values = {f"eval/{task}/accuracy": min(1.0, 0.3 + step / 400 + chance.gauss(0, 0.02)) for task in tasks}
    return {"kind": "eval", "step": step, **values}


def routing_record(tasks: Sequence[str], step: int, layers: int, chance: random.Random) -> dict[str, Any]:
    names = [f"model.layers.{n}.{module}" for n in range(layers) for module in ("self_attn.q_proj", "mlp.up_proj")]
    share = {task: {name: shares(chance) for name in names} for task in tasks}
    return {"kind": "routing", "step": step, "tasks": list(tasks), "share": share}


def shares(chance: random.Random) -> list[float]:
    weights = [chance.gammavariate(1.5, 1.0) for _ in range(EXPERTS)]
    return [weight / sum(weights) for weight in weights]
