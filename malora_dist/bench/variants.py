"""What `malora bench ep` compares: sets of variants of one recipe, each set against its first. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from malora_dist.config import RunConfig
from malora_dist.config.compatibility import check_plan
from malora_dist.errors import ConfigError, MaloraError, TopologyError

TOPICS = {
    "ep": "experts spread over processes",
    "overlap": "sums are sent back while the base layer computes, or before it",
    "share": "linears that read one tensor send together, or each by itself",
    "base": "the frozen base in 4 bits, or as it is",
    "zero": "ZeRO stages",
}
EP_SIZES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the recipe. overlap, share: see `distributed.expert_parallel.connect_experts`."""

    zero_stage: int
    ep_size: int
    load_in_4bit: bool
    overlap: bool = True
    share: bool = True

    @property
    def name(self) -> str:
        base = "NF4" if self.load_in_4bit else "not quantised"
        switched_off = [text for text, on in (("no overlap", self.overlap), ("not shared", self.share)) if not on]
        return ", ".join([f"ZeRO-{self.zero_stage}", f"ep {self.ep_size}", base, *switched_off])

    def of(self, config: RunConfig) -> RunConfig:
        """Return the recipe with this variant's settings in place of its own."""
        parallel = config.parallel.model_copy(update={"zero_stage": self.zero_stage, "ep_size": self.ep_size})
        model = config.model.model_copy(update={"load_in_4bit": self.load_in_4bit})
        return config.model_copy(update={"parallel": parallel, "model": model})


@dataclass(frozen=True)
class Comparison:
    """Variants that differ in one thing; the first is what the others are compared with."""

    topic: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Selection:
    """What is measured, and the variants left out, each reason once."""

    comparisons: tuple[Comparison, ...]
    left_out: tuple[str, ...]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant once, in the order in which they take their turns."""
        return tuple(dict.fromkeys(variant for comparison in self.comparisons for variant in comparison.variants))


def recipe_variant(config: RunConfig) -> Variant:
    """Return the variant of the recipe with all experts on every process."""
    return Variant(zero_stage=config.parallel.zero_stage, ep_size=1, load_in_4bit=config.model.load_in_4bit)


def select(config: RunConfig, world_size: int, topics: Sequence[str] = ()) -> Selection:
    """Select the comparisons of these topics, or of all, with the variants that `world_size` processes can run.

    Raises ConfigError for an unknown topic, or if the recipe cannot run at all; TopologyError if a topic that was
    asked for has nothing to compare.
    """
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise ConfigError(f"--variants {unknown[0]}: must be one or more of {','.join(TOPICS)}")
    own = recipe_variant(config)
    check_plan(own.of(config), world_size)
    left_out: dict[str, list[str]] = {}
    found = []
    for comparison in _all_comparisons(own):
        if comparison.topic not in (topics or TOPICS):
            continue
        refused = {v: reason for v in comparison.variants if (reason := _refusal(v, config, world_size)) is not None}
        for variant, reason in refused.items():
            names = left_out.setdefault(reason, [])
            names += [] if variant.name in names else [variant.name]
        possible = tuple(variant for variant in comparison.variants if variant not in refused)
        if comparison.variants[0] in possible and len(possible) > 1:
            found.append(Comparison(comparison.topic, possible))
    sentences = tuple(f"{'; '.join(names)}: {reason}" for reason, names in left_out.items())
    empty = [topic for topic in topics if topic not in {comparison.topic for comparison in found} | {"ep"}]
    if empty:
        raise TopologyError("\n".join([f"--variants {empty[0]}: nothing to compare here", *sentences]))
    # One process can still measure itself.
    return Selection(tuple(found) or (Comparison("ep", (own,)),), sentences)


def _all_comparisons(own: Variant) -> list[Comparison]:
    spread = [replace(own, ep_size=ep_size) for ep_size in EP_SIZES[1:]]
    stages = [replace(own, zero_stage=stage, ep_size=ep_size) for ep_size in (1, 2) for stage in (3, 2, 1, 0)]
    return [
        Comparison("ep", (own, *spread)),
        *(Comparison("overlap", (variant, replace(variant, overlap=False))) for variant in spread),
        *(Comparison("share", (variant, replace(variant, share=False))) for variant in spread),
        Comparison("base", (own, replace(own, load_in_4bit=not own.load_in_4bit))),
        Comparison("zero", tuple(dict.fromkeys((own, *stages)))),
    ]


def _refusal(variant: Variant, config: RunConfig, world_size: int) -> str | None:
    try:
        check_plan(variant.of(config), world_size)
    except MaloraError as error:
        return str(error)
    return None
