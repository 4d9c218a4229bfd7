"""What a step costs with more experts or more tokens, and the optimizer alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from malora_dist.bench.local.peers.baselines import Contestant
from malora_dist.bench.local.records import Record
from malora_dist.bench.local.step_stage import Stage, first_steps
from malora_dist.bench.local.timing import records_of, reference
from malora_dist.errors import ConfigError

EXPERTS = (8, 64)


@dataclass(frozen=True)
class StepCase:
    """How a case is measured, who takes part by default, and whether each is compared with itself alone."""

    measure: Callable[[Stage, Mapping[str, Contestant]], list[Record]]
    default: Sequence[str]
    to_itself: bool


def experts(stage: Stage, contestants: Mapping[str, Contestant]) -> list[Record]:
    """Each mixture with 8 and with 64 experts of the same ranks, at the same top_k; ratios are to its own 8."""
    without = [name for name, one in contestants.items() if "num_experts" not in one.numbers]
    if without:
        raise ConfigError(f"--case experts: {', '.join(without)} has no experts")
    many = {
        f"{name}_e{number}": replace(contestant, numbers={**contestant.numbers, "num_experts": number})
        for name, contestant in contestants.items()
        for number in EXPERTS
    }
    trainees = {name: stage.trainee(contestant) for name, contestant in many.items()}
    facts = first_steps(trainees, stage.dtype)
    times = stage.interleave(trainees)
    groups = [[f"{name}_e{number}" for number in EXPERTS] for name in contestants]
    return _against_the_first(stage.title("experts"), times, facts, groups)


def tokens(stage: Stage, contestants: Mapping[str, Contestant]) -> list[Record]:
    """Everyone on the batch and on twice as many rows; ratios are to its own step on the batch."""
    trainees = {name: stage.trainee(contestant) for name, contestant in contestants.items()}
    doubled = {f"{name}_2x": stage.trainee(contestant, times=2) for name, contestant in contestants.items()}
    facts = first_steps(trainees, stage.dtype) | first_steps(doubled, stage.dtype)
    times = stage.interleave({**trainees, **doubled})
    return _against_the_first(stage.title("tokens"), times, facts, [[name, f"{name}_2x"] for name in contestants])


def optimizer(stage: Stage, contestants: Mapping[str, Contestant]) -> list[Record]:
    """The optimizer's step alone, on the gradients of one step."""
    trainees = {name: stage.trainee(contestant) for name, contestant in contestants.items()}
    facts = first_steps(trainees, stage.dtype)
    steps: dict[str, Callable[[], object]] = {}
    for name, trainee in trainees.items():
        if trainee.optimizer is None:
            raise ConfigError(f"--case optimizer: {name} trains nothing")
        trainee.backward()
        steps[name] = trainee.optimizer.step
    times = stage.interleave(steps)
    against = stage.options.against or ("lora_equal" if "lora_equal" in contestants else None)
    return records_of(stage.title("optimizer alone"), times, reference(against, contestants), facts)


def _against_the_first(
    title: str,
    times: Mapping[str, Sequence[float]],
    facts: Mapping[str, Mapping[str, object]],
    groups: Sequence[Sequence[str]],
) -> list[Record]:
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
