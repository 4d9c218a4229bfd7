"""Trackers beside metrics.jsonl: TensorBoard and Weights & Biases, imported only when a recipe asks for them."""

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from malora_dist.errors import ConfigError, MaloraError
from malora_dist.files.atomic import write_text
from malora_dist.tracking.metrics import EVAL, KIND, RESUME, ROUTING, SHARE, STEP, TRAIN


class Tracker(Protocol):
    """Takes the records of metrics.jsonl as they are written."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl."""

    def close(self, *, failed: bool = False) -> None:
        """Write what is left, and take nothing more; `failed`: the run has ended by an error."""


class TensorBoardTracker:
    """Event files in `run_dir/tensorboard`; what was logged of steps that a resumed run does again is hidden."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._run_dir, self._config = run_dir, config
        self._make = _summary_writer()
        self._writer: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        if record[KIND] == RESUME:
            self.close()
            self._open(purge_step=record[STEP] + 1)
        for name, value in scalars(record).items():
            self._open().add_scalar(name, value, record[STEP])
        if self._writer is not None:
            self._writer.flush()

    def _open(self, **settings: Any) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self._run_dir / "tensorboard"), **settings)
            self._writer.add_text("config", _as_markdown(self._config))
        return self._writer

    def close(self, *, failed: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class WandbTracker:
    """A wandb run named as the run folder; WANDB_PROJECT, WANDB_MODE and the like are honoured.

    A run that goes on is the same run there, by the id in `run_dir/wandb-id`.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._run = _wandb().init(
            project=os.environ.get("WANDB_PROJECT", "malora_dist"),
            id=_wandb_id(run_dir / "wandb-id"),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
        )

    def log(self, record: Mapping[str, Any]) -> None:
        values = scalars(record)
        if values:
            self._run.log(values, step=record[STEP])

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(path: Path) -> str:
    """Return the id in a file, which gets a new one if it has none, or was left empty by a killed process."""
    known = path.read_text().strip() if path.exists() else ""
    if known:
        return known
    new = secrets.token_hex(8)
    write_text(path, new)
    return new


class _OptionalTracker:
    """A tracker that is dropped with one warning when it fails: whatever it raises, the run goes on."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = start()
        except MaloraError:
            # Its package is missing: a mistake in the recipe.
            raise
        except Exception as error:
            self._warn(error)

    def log(self, record: Mapping[str, Any]) -> None:
        tracker = self._tracker
        if tracker is None:
            return
        try:
            tracker.log(record)
        except Exception as error:
            self._tracker = None
            self._warn(error)
            with suppress(Exception):
                tracker.close(failed=True)

    def close(self, *, failed: bool = False) -> None:
        tracker, self._tracker = self._tracker, None
        try:
            if tracker is not None:
                tracker.close(failed=failed)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        logging.getLogger(__name__).warning(
            "train.report_to=%s failed, and gets no more records of this run; metrics.jsonl has them all: %r",
            self._name,
            error,
        )


_TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise ConfigError, naming what to install, if a tracker's package is missing; for use before a run."""
    imports: Mapping[str, Callable[[], Any]] = {"tensorboard": _summary_writer, "wandb": _wandb}
    for name in report_to:
        imports[name]()


def open_trackers(report_to: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Open a tracker for each name in `report_to`; `config` is stored with the run.

    A tracker that fails, now or later, is dropped with a warning. Raises MaloraError for an unknown name, or if a
    tracker's package is not installed; nothing is left open then.
    """
    unknown = [name for name in report_to if name not in _TRACKERS]
    if unknown:
        raise MaloraError(f"train.report_to={unknown[0]!r} must be one of {', '.join(_TRACKERS)}")
    opened: list[Tracker] = []
    try:
        for name in report_to:
            opened.append(_OptionalTracker(name, partial(_TRACKERS[name], run_dir, config)))
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name, `kind/` put before a plain one.

    Routing gives `routing/<task>/expert_<e>`, the mean over layers. A record of facts, without a step, gives nothing.
    """
    kind = record[KIND]
    if kind == ROUTING:
        return _routing_scalars(record)
    if kind not in (TRAIN, EVAL):
        return {}
    values = {name: value for name, value in record.items() if isinstance(value, int | float) and name != STEP}
    return {name if "/" in name else f"{kind}/{name}": value for name, value in values.items()}


def _routing_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"routing/{task}/expert_{expert}": sum(shares) / len(shares)
        for task, layers in record[SHARE].items()
        for expert, shares in enumerate(zip(*layers.values(), strict=True))
    }


def _summary_writer() -> Callable[[str], Any]:
    """Return torch.utils.tensorboard's SummaryWriter, or tensorboardX's where only that is installed."""
    for module in ("torch.utils.tensorboard", "tensorboardX"):
        try:
            writer: Callable[[str], Any] = import_module(module).SummaryWriter
            return writer
        except ImportError:
            continue
    raise _not_installed("tensorboard", "tensorboard")


def _wandb() -> Any:
    try:
        return import_module("wandb")
    except ImportError as error:
        raise _not_installed("wandb", "wandb") from error


def _not_installed(tracker: str, package: str) -> ConfigError:
    return ConfigError(
        f"train.report_to={tracker} needs the package {package}: pip install 'malora_dist[trackers]', "
        "or leave it out of train.report_to"
    )


def _as_markdown(config: Mapping[str, Any]) -> str:
    return "\n".join(f"* **{section}**: `{values}`" for section, values in config.items())
