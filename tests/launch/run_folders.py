"""Run folders as runs leave them."""

from pathlib import Path
from typing import Any

from malora_dist.tracking.metrics import MetricsWriter


def begun(run: Path, *records: dict[str, Any], total: int | None = 100) -> Path:
    """A run folder with the records of its first start."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("model: {}\n")
    with MetricsWriter(run / "metrics.jsonl") as writer:
        writer.write({"kind": "run", "world_size": 2} | ({} if total is None else {"max_steps": total}))
        for record in records:
            writer.write(record)
    return run


def steps(first: int, last: int, seconds: float = 2.0) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "step_seconds": seconds} for step in range(first, last + 1)]


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
