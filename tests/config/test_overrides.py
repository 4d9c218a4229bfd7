import pytest

from malora_dist.config import config_from_dict
from malora_dist.config.overrides import parse_overrides
from malora_dist.errors import ConfigError
from tests.config.recipes import recipe


def test_every_spelling_and_later_ones_win() -> None:
    spellings = (
        ["--adapter.r", "16"],
        ["--adapter.r=16"],
        ["adapter.r=16"],
        ["adapter.r=4", "--adapter.lora_rank", "16"],
    )
    for arguments in spellings:
        assert config_from_dict(recipe(adapter={"rank": 8}), arguments).adapter.r == 16


def test_values_are_read_as_yaml() -> None:
    config = config_from_dict(
        recipe(),
        ["--train.learning_rate=1e-3", "--model.load_in_4bit", "false", "--adapter.target_modules", "[q_proj, o_proj]",
         "--data.near_duplicate_threshold", "null", "--output_dir", "runs/x", "--data.tasks.piqa.weight", "2",
         "--data.tasks.0.scoring=letter"],
    )  # fmt: skip
    assert config.train.learning_rate == 1e-3 and config.model.load_in_4bit is False
    assert config.adapter.target_modules == ("q_proj", "o_proj") and config.output_dir == "runs/x"
    assert config.data.near_duplicate_threshold is None
    assert config.data.tasks[1].weight == 2 and config.data.tasks[0].scoring == "letter"


def test_null_takes_the_files_value_away() -> None:
    """A baseline from another method's recipe needs no edited file."""
    data = recipe(adapter={"num_experts": 16, "beta": 2})
    overrides = ["--adapter.method", "lora", "--adapter.num_experts", "null", "--adapter.beta=null"]
    config = config_from_dict(data, overrides)
    assert config.adapter.method == "lora" and config.adapter.beta == 1.0
    assert data["adapter"] == {"num_experts": 16, "beta": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--adapter.rankk", "3"], "adapter.rankk=3: unknown key; did you mean r?", id="typo"),
        pytest.param(["--learning_rate", "3"], "did you mean train.learning_rate?", id="no-section"),
        pytest.param(["--adapter.r"], "--adapter.r needs a value", id="no-value"),
        pytest.param(["--adapter.r", "--train.seed", "1"], "--adapter.r needs a value", id="flag-as-value"),
        pytest.param(["adapter.r", "3"], "'adapter.r' is not an override", id="no-dashes"),
        pytest.param(["--adapter", "3"], "is a section; set one of its keys", id="section"),
        pytest.param(["--adapter.r.x", "3"], "is a single value", id="too-deep"),
        pytest.param(["--data.tasks.none.weight", "3"], "the tasks are boolq, piqa", id="unknown-task"),
        pytest.param(["--adapter.r", "[1"], "--adapter.r='[1': line 1: is not valid YAML", id="yaml"),
        pytest.param(["--adapter.r=!!binary x"], "line 1: the tag '!!binary' is not allowed", id="tag"),
        pytest.param(["--output_dir=a\udce9"], "the character '\\udce9' must not be there", id="bytes"),
        pytest.param(["--data.tasks.\u00b2.weight=3"], "the tasks are boolq, piqa", id="digit"),
        pytest.param(
            ["data.tasks=[1]", "data.tasks.0.weight=2"], "data.tasks[0] is 1, which has no keys", id="no-task"
        ),
        pytest.param(["--train.seed=99999999999999999999"], "must be less than 9223372036854775808", id="seed"),
        pytest.param(["--parallel.timeout_seconds=1e300"], "timeout_seconds=1e+300: ", id="timeout"),
        pytest.param(["--output_dir", "### runs"], "--output_dir='### runs': '### runs' is a comment", id="comment"),
        pytest.param(["--output_dir=a #b"], "'#b' is a comment in YAML; write the value in quotes", id="half"),
        pytest.param(["--adapter.r=0"], "adapter.r=0: must be greater", id="range"),
    ],
)
def test_wrong_overrides(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(recipe(), arguments)
    assert message in str(error.value)


def test_a_number_sign_that_is_no_comment_is_text() -> None:
    values = ["runs/#3", "'### {x}'", '"a #b"', "[a, '#b']"]
    pairs = parse_overrides([f"--output_dir={value}" for value in values])
    assert [value for _, value in pairs] == ["runs/#3", "### {x}", "a #b", ["a", "#b"]]
