"""Stage train: real runs on the device: the CPU's losses, a 4-bit run under the launcher, and one that is resumed."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.gpu.measure import GPU
from benchmarks.gpu.verdicts import Verdicts, log_folder
from tests.gpu.runs import SMALL, environment, make_run_folder, records, train_command

WORK = Path(os.environ.get("WORK", "/tmp")) / "malora_train"
LAUNCHER = ("deepspeed", "--num_gpus", "1", "--module")
# Those of SmolLM2-135M.
LARGE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
STEPS = 8
TRAIN = {"logging_steps": 1, "gradient_checkpointing": False, "eval_steps": 3, "save_steps": 3}
EXACT = {"train": {**TRAIN, "max_steps": 6}, "model": {"load_in_4bit": False}}
BATCH = {"global_batch_size": 16, "per_device_train_batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-3}
QUANTISED = {
    "model": {"dtype": "bfloat16"},
    "adapter": {"num_experts": 8, "r": 12, "shared_r": 32, "lora_dropout": 0.05},
    "train": {**TRAIN, **BATCH, "eval_steps": 4, "save_steps": 4, "deterministic": True},
    "evaluation": {"batch_tokens": 2048},
}


def make(name: str, sizes: dict[str, int], changes: dict[str, Any]) -> Path:
    """A new folder with model, tasks and recipe."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return make_run_folder(folder, sizes, changes)


def start(folder: Path, name: str, *settings: str, gpu: bool = GPU, launched: bool = False) -> subprocess.Popen[bytes]:
    """Start a run in runs/`name`; what it says goes to the logs."""
    command = train_command(f"runs/{name}", *settings, launcher=LAUNCHER if launched else ())
    with (log_folder() / f"train_{folder.name}_{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=environment(gpu=gpu), stdout=log, stderr=log)


def wait(verdicts: Verdicts, started: dict[str, subprocess.Popen[bytes]], wanted: int = 0) -> None:
    for name, process in started.items():
        code = process.wait()
        verdicts.check(f"run {name}", code == wanted, f"exit code {code}")


def compare_losses(verdicts: Verdicts, folder: Path) -> None:
    """Losses of the same run in fp32 here and on the CPU."""
    found, wanted = ([row["loss"] for row in records(folder / "runs" / name)] for name in ("gpu", "cpu"))
    whole = len(found) == len(wanted) > 0
    apart = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)] if whole else []
    detail = (
        f"{len(found)} steps here, {len(wanted)} on the CPU; relative differences {' '.join(f'{d:.1e}' for d in apart)}"
    )
    # Each by itself: a maximum may pass over what is no number.
    verdicts.check("losses as on the CPU", whole and all(d < 1e-4 for d in apart), detail)


def describe_run(verdicts: Verdicts, folder: Path) -> None:
    """Whether the 4-bit run learns; its speed, its memory and the plan's, and what checkpoints cost."""
    rows = records(folder / "runs" / "whole")
    losses = [row["loss"] for row in rows]
    learns = bool(losses) and all(loss == loss for loss in losses) and losses[-1] < losses[0]
    verdicts.check("the 4-bit run learns", learns, " ".join(f"{loss:.3f}" for loss in losses))
    for row in rows[-1:]:
        verdicts.log(
            f"{row['tokens_per_second']:.0f} tokens/s, {row['step_seconds']:.2f} s a step, nothing else running; peak "
            f"{row['peak_memory_gib']:.2f} GiB"
        )
    verdicts.attempt("malora plan", partial(planned, folder))
    for row in records(folder / "runs" / "whole", "checkpoint")[-1:]:
        verdicts.log(f"checkpoint {row['bytes'] / 2**20:.0f} MiB, training waited {row['stall_seconds']:.2f} s")


def planned(folder: Path) -> str:
    command = [sys.executable, "-m", "malora_dist.cli", "plan", "recipe.yaml", "--json", "--gpus-per-node", "1"]
    done = subprocess.run(command, cwd=folder, env=environment(gpu=GPU), capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr)
        raise RuntimeError(f"exit code {done.returncode}: {''.join(done.stderr.strip().splitlines()[-1:])}")
    return f"expects {json.loads(done.stdout)['bytes_per_rank']['total'] / 2**30:.2f} GiB"


def compare_adapters(verdicts: Verdicts, folder: Path) -> None:
    """A run that was stopped and resumed against the one that was not; train.deterministic is on."""
    files = [folder / "runs" / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts")]
    if not all(file.exists() for file in files):
        verdicts.check("stopped and resumed is the same run", False, "no adapters")
        return
    whole, parts = map(load_file, files)
    apart = max(float((parts[k].float() - t.float()).norm() / (t.float().norm() + 1e-9)) for k, t in whole.items())
    same = files[0].read_bytes() == files[1].read_bytes()
    verdicts.check("stopped and resumed is the same run", same, f"same bytes: {same}, weights apart {apart:.1e}")


def main() -> int:
    verdicts = Verdicts()
    exact, large = make("exact", SMALL, EXACT), make("nf4", LARGE if GPU else SMALL, QUANTISED)
    # Alone, since its speed is measured.
    wait(verdicts, {"4-bit, deepspeed --num_gpus 1, ZeRO-3": start(large, "whole", launched=True)})
    exact_runs = {
        "on the CPU in fp32": start(exact, "cpu", gpu=False),
        "here in fp32, ZeRO-3": start(exact, "gpu"),
    }
    stopped = start(large, "parts", "--train.stop_after_steps", "4")
    wait(verdicts, exact_runs)
    wait(verdicts, {"stopped after 4 steps": stopped}, wanted=75)
    wait(verdicts, {"goes on": start(large, "parts")})
    compare_losses(verdicts, exact)
    describe_run(verdicts, large)
    compare_adapters(verdicts, large)
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
