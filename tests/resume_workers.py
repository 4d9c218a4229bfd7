"""What the processes of the resume proof do: save in every topology, and go on in every other one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from malora_dist.adapters.io.folder import AdapterInfo
from malora_dist.adapters.methods import mixture_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.snapshot import snapshot
from malora_dist.training.best_checkpoint import Best
from malora_dist.training.checkpoint_saver import Description, Saver
from malora_dist.training.random_state import random_state
from malora_dist.training.resume import open_checkpoint
from malora_dist.training.step_metrics import StepMetrics
from malora_dist.training.training_state import LoopState, TrainingParts, restore_training, training_state
from tests.training.workers import ACCUMULATION, RecordingTrainStep, new_train_step

SAVED, LAST = 3, 5
TASK_SIZES, GLOBAL_BATCH = [8, 6, 5], 8  # an epoch is 2.4 steps: the save is in the middle of one


class Run:
    """An engine with its loader and metrics, as training has them."""

    def __init__(self, world: World, folder: str, case: dict[str, Any]) -> None:
        self.world, self.case = world, case
        self.train_step: RecordingTrainStep = new_train_step(world, folder, {**case, "lr_scheduler_type": "linear"})
        self.parts = TrainingParts.of(self.train_step, loader(world), case.get("optim", "adamw_torch"))
        self.tensors, self.optimizer = self.parts.tensors, self.parts.optimizer
        self.start_anew()

    def start_anew(self) -> None:
        self.results: list[dict[str, float]] = []
        self.loader, self.step_metrics, self.state = loader(self.world), StepMetrics(self.train_step), LoopState()
        self.parts = replace(self.parts, loader=self.loader, step_metrics=self.step_metrics)

    def train(self, last: int) -> None:
        """To step `last`, keeping what each step gave."""
        while self.state.step < last:
            number = self.state.step + 1
            batches = [batch.to(self.world.device) for batch in next(self.loader)]
            result = self.train_step.run(number, batches)
            self.step_metrics.add(result, 1.0)
            self.state = LoopState(number, True, self.loader.state_dict(), random_state(), Best(0.5, 1))
            numbers = (result.loss, result.aux_loss, result.grad_norm, result.learning_rate)
            self.results.append(dict(zip(("loss", "aux_loss", "grad_norm", "learning_rate"), numbers, strict=True)))

    def saver(self, folder: str, **settings: Any) -> tuple[Saver, list[dict[str, Any]]]:
        """What saves the run into a folder, and the records it will give."""
        records: list[dict[str, Any]] = []
        topology = {"world_size": self.world.size, "ep_size": self.case.get("ep_size", 1)}
        saver = Saver(
            self.tensors,
            self.optimizer,
            self.world,
            Path(folder),
            Description(
                config={"train": {"seed": 1}},
                base={"name": "tiny", "revision": None, "fingerprint": "0" * 32, "dtype": "float32"},
                topology=topology | {"zero_stage": self.case["zero_stage"]},
                adapter=AdapterInfo(
                    spec=mixture_spec("malora"), target_modules=("q_proj",), base_model="", lora_dropout=0
                ),
            ),
            saved=records.append,
            **settings,
        )
        return saver, records

    def json_state(self) -> dict[str, Any]:
        """What the manifest says of where the run is."""
        return training_state(self.parts, self.state)

    def restore(self, folder: str) -> None:
        """Become the run that was saved there."""
        checkpoint = open_checkpoint(Path(folder), self.world)
        self.start_anew()
        restore_training(checkpoint, self.parts, self.state)

    def whole_state(self) -> dict[str, Tensor]:
        """Weights and moments, whole, on every process."""
        return {f"{kind}.{name}": t for kind, name, t in snapshot(self.tensors, self.optimizer, lambda name: True)}

    def counts(self) -> dict[str, int]:
        """Steps by everything that counts them."""
        engine, groups = self.train_step.engine, self.train_step.engine.optimizer.param_groups
        ratios = {group.get("lr_ratio", 1.0) for group in groups}
        assert ratios == {1.0, *self.case.get("lr_ratios", {}).values()}
        assert len({round(group["lr"] / group.get("lr_ratio", 1.0), 12) for group in groups}) == 1
        return {
            "optimizer": self.optimizer.step_count(),
            "scheduler": engine.lr_scheduler.last_epoch,
            "engine": engine.global_steps,
            "micro": engine.micro_steps // engine.gradient_accumulation_steps(),
        }


def loader(world: World) -> TrainLoader:
    """Samples of widely different lengths; the global micro-batches are the same for every number of processes."""
    draw = np.random.default_rng(3)
    tasks = np.repeat(np.arange(len(TASK_SIZES)), TASK_SIZES)
    samples = [
        Sample(i, int(task), draw.integers(0, 96, 6 + 5 * (i % 4)).astype(np.int32), 3 + i % 3)
        for i, task in enumerate(tasks)
    ]
    return TrainLoader(
        samples,
        task_sizes=TASK_SIZES,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH // ACCUMULATION // world.size,
        rank=world.rank,
        world_size=world.size,
        seed=5,
    )


def save_all(world: World, folder: str, output: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each case to the end, with a checkpoint on the way; what each step gave, and the last state in a file."""
    found = {}
    for name, case in cases.items():
        run = Run(world, folder, case)
        run.train(SAVED)
        # Shards small enough that every process writes one.
        saver, records = run.saver(f"{output}/{name}", shard_bytes=20_000)
        saver.save(run.state.step, run.json_state(), run.state.random, best=True)
        saver.complete()
        run.train(LAST)
        state = run.whole_state()
        if world.is_main:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, f"{output}/{name}.safetensors")
        share = run.step_metrics.routing(LAST)["share"]
        found[name] = {"steps": run.results, "records": records, "routing": share}
    return found


def go_on_from_all(
    world: World, folder: str, output: str, cases: dict[str, dict[str, Any]], sources: list[str], reference: str
) -> dict[str, Any]:
    """In each case go on from every source: steps, counts, and how far the last state is from those it should equal.

    A case that is `alone` goes on from itself only.
    """
    found: dict[str, Any] = {}
    for name, case in cases.items():
        run = Run(world, folder, case)
        own = load_file(f"{output}/{name}.safetensors")
        wanted = own if case.get("alone") else load_file(f"{output}/{reference}.safetensors")
        for source in [name, *(other for other in sources if other != name and not case.get("alone"))]:
            run.restore(f"{output}/{source}/step-{SAVED:06d}")
            counts, collected = run.counts(), len(run.step_metrics.results)
            run.train(LAST)
            state = run.whole_state()
            found[f"{source} -> {name}"] = {
                "steps": run.results,
                "counts": counts,
                "window": collected,
                "routing": run.step_metrics.routing(LAST)["share"],
                "apart": distances(state, wanted),
                "bit_equal": source == name and all(torch.equal(state[key], own[key]) for key in own),
            }
    return found


def distances(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of any element, by kind of tensor."""
    kinds = ("adapter", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    assert state.keys() == wanted.keys()
    return {
        kind: max(float((state[key] - wanted[key]).abs().max()) for key in wanted if key.startswith(kind))
        for kind in kinds
    }
