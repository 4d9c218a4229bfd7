"""The golden numbers: launches, waits and atomics of a linear, q k v, a block and a step, for each method.

    python -m tests.strict.counts --write

counts them anew and rewrites counts.json, after a change that is meant to change them: the diff shows what it does. A
row of a linear also says what is above the frozen base's own; `block of a step` is what a block more costs a step.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from malora_dist.adapters.methods import METHODS
from malora_dist.bench.local.launch_cases import BASELINES, CASES, LaunchCase, above
from malora_dist.bench.strict.backend import register
from malora_dist.bench.strict.counts import KINDS
from malora_dist.bench.strict.device import StrictDevice
from malora_dist.distributed.process_groups import World
from malora_dist.training.train_step import TrainStep
from tests.multiprocess import run_distributed
from tests.training.workers import make_model, new_train_step, run_steps

FILE = Path(__file__).with_name("counts.json")
HIDDEN, TOKENS = 64, 16
DROPOUTS = (0.0, 0.05)
BASES = {"bf16": False, "nf4": True}
# Those whose counts differ only where linears read one input have no row of a linear.
ROWS = [name for name, baseline in BASELINES.items() if baseline.maker != "peft"]
# ZeRO stage and base of the steps that are counted, in bf16.
PLANS: dict[str, dict[str, Any]] = {
    "zero0, bf16": {"zero_stage": 0},
    "zero3, nf4": {"zero_stage": 3, "load_in_4bit": True},
}
STEPS: dict[str, dict[str, Any]] = {
    f"{plan}, {method}, dropout {dropout:g}": {**settings, "method": method, "dropout": dropout, "dtype": "bfloat16"}
    for (plan, settings), method, dropout in product(PLANS.items(), METHODS, DROPOUTS)
}
STEPS["zero3, nf4, malora apart, dropout 0.05"] = {
    **STEPS["zero3, nf4, malora, dropout 0.05"],
    "fuse_projections": False,
}
Table = dict[str, dict[str, int]]


def count_all() -> Table:
    """Every row, as it is now."""
    return dict(sorted({**dict(_layers()), **_steps()}.items()))


def _layers() -> Iterator[tuple[str, dict[str, int]]]:
    register()
    with StrictDevice() as device:
        for case, (base, load_in_4bit) in product(CASES, BASES.items()):
            launch_case = LaunchCase.of(case, HIDDEN, TOKENS, torch.bfloat16, load_in_4bit=load_in_4bit)
            bare = _kinds(launch_case.counts(BASELINES["base"], 0.0, device))
            for name, dropout in product(ROWS, DROPOUTS):
                if name == "base" and dropout or name == "malora_fused" and case == "linear":
                    continue
                row = _kinds(launch_case.counts(BASELINES[name], dropout, device))
                more = {f"{kind} above base": n for kind, n in above(row, bare).items()} if case == "linear" else {}
                yield f"{case}, {base}, {name}, dropout {dropout:g}", row | more


def _kinds(totals: Mapping[str, int]) -> dict[str, int]:
    return {kind: totals[kind] for kind in KINDS}


def _steps() -> Table:
    with TemporaryDirectory() as folder:
        folders = [str(_model(Path(folder, f"{blocks}"), blocks)) for blocks in (1, 2)]
        (found,) = run_distributed("tests.strict.counts:count_steps", 1, device="strict", folders=folders, cases=STEPS)
    one, two = found
    blocks = {f"block of a step, {name}": above(row, one[name]) for name, row in two.items()}
    return {f"step, {name}": row for name, row in two.items()} | blocks


def _model(folder: Path, blocks: int) -> Path:
    """The tiny model of two blocks, or its first alone."""
    make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    return folder


def count_steps(world: World, folders: list[str], cases: dict[str, dict[str, Any]]) -> list[Table]:
    """Of each model, a step of every case."""
    return [{name: _count_step(world, folder, case) for name, case in cases.items()} for folder in folders]


def _count_step(world: World, folder: str, case: dict[str, Any]) -> dict[str, int]:
    """The third step, of one micro-batch: DeepSpeed learns the order of modules in the first two."""
    device, case = StrictDevice.active[-1], case | {"accumulation": 1}
    train_step = new_train_step(world, folder, case, TrainStep)
    run_steps(train_step, case, [1, 2])
    device.counts.reset()
    run_steps(train_step, case, [3])
    return _kinds(device.counts.totals())


def read() -> Table:
    """The golden numbers."""
    table: Table = json.loads(FILE.read_text())
    return table


def write(table: Table) -> None:
    """One row a line, so that a diff names the rows that change."""
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def differences(found: Table, wanted: Table) -> list[str]:
    """A line for each number that is not as in the golden table."""
    lines = [f"{name}: {'not in the file' if name in found else 'not counted'}" for name in set(found) ^ set(wanted)]
    for name in found.keys() & wanted.keys():
        changed = [
            f"{kind} {wanted[name].get(kind)} -> {number}"
            for kind, number in found[name].items()
            if wanted[name].get(kind) != number
        ]
        lines += [f"{name}: {', '.join(changed)}"] if changed else []
    return sorted(lines)


if __name__ == "__main__":
    now = count_all()
    print("\n".join(differences(now, read() if FILE.exists() else {})) or "as in the file")
    if "--write" in sys.argv:
        write(now)
