"""What a step costs with more experts or more tokens, and the optimizer alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.records import Measurement
from malora_dist.bench.local.step_setup import StepSetup, first_steps
from malora_dist.bench.local.timing import records_of, reference
from malora_dist.errors import ConfigError

EXPERTS = (8, 64)


@dataclass(frozen=True)
class StepCase:
    """How a case is measured, who takes part by default, and whether each is compared with itself alone."""

    measure: Callable[[StepSetup, Mapping[str, Baseline]], list[Measurement]]
    default: Sequence[str]
    to_itself: bool


def experts(setup: StepSetup, baselines: Mapping[str, Baseline]) -> list[Measurement]:
    """Time each mixture with 8 and with 64 experts of the same ranks, at the same top_k; ratios are to its own 8."""
    without = [name for name, one in baselines.items() if "num_experts" not in one.numbers]
    if without:
        raise ConfigError(f"--case experts: {', '.join(without)} has no experts")
    many = {
        f"{name}_e{number}": replace(baseline, numbers={**baseline.numbers, "num_experts": number})
        for name, baseline in baselines.items()
        for number in EXPERTS
    }
    trainees = {name: setup.trainee(baseline) for name, baseline in many.items()}
    facts = first_steps(trainees, setup.dtype)
    times = setup.interleave(trainees)
    groups = [[f"{name}_e{number}" for number in EXPERTS] for name in baselines]
    return _against_the_first(setup.title("experts"), times, facts, groups)


def tokens(setup: StepSetup, baselines: Mapping[str, Baseline]) -> list[Measurement]:
    """Time each baseline on the batch and on twice as many rows; ratios are to its own step on the batch."""
    trainees = {name: setup.trainee(baseline) for name, baseline in baselines.items()}
    doubled = {f"{name}_2x": setup.trainee(baseline, times=2) for name, baseline in baselines.items()}
    facts = first_steps(trainees, setup.dtype) | first_steps(doubled, setup.dtype)
    times = setup.interleave({**trainees, **doubled})
    return _against_the_first(setup.title("tokens"), times, facts, [[name, f"{name}_2x"] for name in baselines])


def optimizer(setup: StepSetup, baselines: Mapping[str, Baseline]) -> list[Measurement]:
    """Time the optimizer's step alone, on the gradients of one step."""
    trainees = {name: setup.trainee(baseline) for name, baseline in baselines.items()}
    facts = first_steps(trainees, setup.dtype)
    steps: dict[str, Callable[[], object]] = {}
    for name, trainee in trainees.items():
        if trainee.optimizer is None:
            raise ConfigError(f"--case optimizer: {name} trains nothing")
        trainee.backward()
        steps[name] = trainee.optimizer.step
    times = setup.interleave(steps)
    against = setup.options.against or ("lora_equal" if "lora_equal" in baselines else None)
    return records_of(setup.title("optimizer alone"), times, reference(against, baselines), facts)


def _against_the_first(
    title: str,
    times: Mapping[str, Sequence[float]],
    facts: Mapping[str, Mapping[str, object]],
    groups: Sequence[Sequence[str]],
) -> list[Measurement]:
    return [
        record
        for group in groups
        for record in records_of(title, {name: times[name] for name in group}, group[0], facts)
    ]


CASES = {
    "experts": StepCase(experts, ("malora", "malora_grouped"), to_itself=True),
    "tokens": StepCase(tokens, ("base", "peft_lora", "malora"), to_itself=True),
    "optimizer": StepCase(optimizer, ("lora_equal", "peft_lora_equal", "malora"), to_itself=False),
}
