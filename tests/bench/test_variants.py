import pytest

from malora_dist.bench.variants import TOPICS, Selection, select
from malora_dist.config import RunConfig
from malora_dist.config.load import config_from_dict
from malora_dist.errors import ConfigError, TopologyError
from tests.e2e import RECIPE


def config(**settings: object) -> RunConfig:
    return config_from_dict(RECIPE, [f"{name.replace('__', '.')}={value}" for name, value in settings.items()])


def ep_sizes(selection: Selection) -> set[int]:
    return {variant.ep_size for variant in selection.variants}


def test_two_processes_compare_everything() -> None:
    selection = select(config(), 2)
    assert [comparison.topic for comparison in selection.comparisons] == list(TOPICS)
    ep, overlap, share, base, zero = (comparison.variants for comparison in selection.comparisons)
    assert [v.name for v in ep] == ["ZeRO-3, ep 1, NF4", "ZeRO-3, ep 2, NF4"]
    assert [v.name for v in overlap] == ["ZeRO-3, ep 2, NF4", "ZeRO-3, ep 2, NF4, no overlap"]
    assert [v.name for v in share] == ["ZeRO-3, ep 2, NF4", "ZeRO-3, ep 2, NF4, not shared"]
    assert [v.name for v in base] == ["ZeRO-3, ep 1, NF4", "ZeRO-3, ep 1, not quantised"]
    assert {(v.zero_stage, v.ep_size) for v in zero} == {(stage, ep) for stage in range(4) for ep in (1, 2)}
    assert zero[0] == ep[0] and len(selection.variants) == len({v.name for v in selection.variants}) == 11
    assert len(selection.left_out) == 1 and "ep_size=4 must divide the number of processes=2" in selection.left_out[0]


def test_what_fits_depends_on_processes_experts_and_method() -> None:
    assert ep_sizes(select(config(), 4)) == {1, 2, 4} and ep_sizes(select(config(), 1)) == {1}
    assert ep_sizes(select(config(adapter__num_experts=6), 4)) == {1, 2}
    lora = config_from_dict({**RECIPE, "adapter": {"method": "lora"}})
    assert [v.name for v in select(lora, 4, ["ep"]).variants] == ["ZeRO-3, ep 1, NF4"]


def test_variants_replace_only_what_they_name() -> None:
    recipe = config(parallel__ep_size=4, parallel__zero_stage=1, train__learning_rate=0.125)
    first, second = select(recipe, 2, ["base"]).variants
    assert (first.of(recipe).parallel.ep_size, first.of(recipe).parallel.zero_stage) == (1, 1)
    assert first.of(recipe).train == recipe.train and not second.of(recipe).model.load_in_4bit


@pytest.mark.parametrize(
    ("world_size", "topics", "kind", "message"),
    [
        (3, (), TopologyError, "cannot be split"),
        (1, ("overlap",), TopologyError, "--variants overlap: nothing to compare here"),
        (2, ("speed",), ConfigError, "--variants speed: must be one or more of ep,overlap,share,base,zero"),
    ],
)
def test_refusals(world_size: int, topics: tuple[str, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        select(config(), world_size, topics)
