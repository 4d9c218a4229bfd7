"""What the cases of `malora bench step` share: the base, the batch, and who trains on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.bench.local.equal_work import check_losses
from malora_dist.bench.local.losses import Batch
from malora_dist.bench.local.models import SMOLLM2, load_model
from malora_dist.bench.local.options import labelled_share
from malora_dist.bench.local.output import log
from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.peers.build import Base, build
from malora_dist.bench.local.timing import interleave
from malora_dist.bench.local.trainee import Trainee
from malora_dist.config.dtypes import long_name


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The command line of `malora bench step`."""

    case: str = "step"
    model: str = SMOLLM2
    batch: int = 4
    length: int = 256
    dtype: str = "bf16"
    base: str = "full"
    dropout: float = 0.0
    labels: str = "all"
    loss: str = "hf"
    only: str | None = None
    against: str | None = None
    repeats: int = 10
    warmup: int = 2
    threads: int | None = None
    device: str = "cpu"


class StepSetup:
    """The shared base and batch of a run, on which baselines become trainees."""

    def __init__(self, options: StepOptions, device: torch.device, *, peft: bool) -> None:
        self.options, self.device, self.dtype = options, device, getattr(torch, long_name(options.dtype))
        model = load_model(options.model, self.dtype, device)
        self.vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        self.base = Base.of(model, DEFAULT_TARGETS, load_in_4bit=options.base == "nf4", peft=peft)

    def title(self, case: str) -> str:
        """Describe case and conditions in words."""
        given = self.options
        conditions = (
            f"{given.batch} x {given.length} tokens, {given.dtype}, {given.base} base, dropout {given.dropout:g}"
        )
        return f"{case}: {given.model}, {conditions}, labels {given.labels}, loss {given.loss}"

    def trainee(self, baseline: Baseline, *, times: int = 1) -> Trainee:
        """Return the baseline with a batch of `times` as many rows."""
        given = self.options
        rows, share = times * given.batch, labelled_share(given.labels)
        batch = Batch.of(rows, given.length, self.vocabulary, share, self.device)
        return Trainee(
            build(baseline, self.base, dropout=given.dropout), batch, loss=given.loss, dropout=given.dropout > 0
        )

    def interleave(self, subjects: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return seconds by subject and round."""
        log(f"{self.options.warmup} + {self.options.repeats} rounds of {', '.join(subjects)}")
        return interleave(subjects, repeats=self.options.repeats, warmup=self.options.warmup, device=self.device)


def first_steps(trainees: Mapping[str, Trainee], dtype: torch.dtype) -> dict[str, dict[str, object]]:
    """Run each trainee's first step, check that all do the same work, and return the facts of each."""
    log(f"first steps of {', '.join(trainees)}")
    losses = {name: float(trainee()) for name, trainee in trainees.items()}
    check_losses(losses, dtype)
    return {
        name: {
            **trainee.adapted.facts,
            "tokens": trainee.batch.tokens,
            "learned": trainee.batch.targets,
            "first loss": losses[name],
        }
        for name, trainee in trainees.items()
    }
