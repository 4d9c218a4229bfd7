from pathlib import Path

import pytest
import yaml

from malora_dist.config import config_from_dict, config_text, load_config, split_arguments
from malora_dist.config.yaml_reader import RecipeDumper, parse_value
from malora_dist.errors import ConfigError
from tests.config.recipes import recipe

GOOD = """\
model: {name_or_path: some/model}
adapter:
  rank: 16
  alpha: 32
data:
  max_length: 512
  tasks:
    - {name: boolq, train: a.jsonl, weight: 2}
    - {task: piqa, train: b/*.jsonl}
train:
  lr: 5e-4
  micro_batch_size: 2
evaluation:
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_aliases_and_yaml_numbers(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.adapter.r, config.adapter.lora_alpha) == (16, 32)
    assert config.data.max_seq_length == 512 and config.data.tasks[1].name == "piqa"
    assert config.train.learning_rate == 5e-4 and config.train.per_device_train_batch_size == 2
    assert config.evaluation.base is True


def test_all_errors_at_once_in_file_order(tmp_path: Path) -> None:
    text = GOOD.replace("alpha: 32", "num_expert: 4\n  top_k: 9\n  dropout: x").replace("name: boolq", "name: a b")
    text = text.replace("evaluation:", "learning_rate: 1\nevaluation:").replace("lr: 5e-4", "warmup_ratio: 2")
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), ["--train.seed", "-1"])
    lines = str(error.value).splitlines()
    assert lines[0].endswith("has 7 errors:")
    expected = [
        "line 4: adapter.num_expert=4: unknown key; did you mean num_experts?",
        "line 6: adapter.lora_dropout='x': must be a valid number",
        "line 10: data.tasks[0].name='a b'",
        "line 13: train.warmup_ratio=2: must be less than 1",
        "line 15: learning_rate=1: unknown key here; did you mean train.learning_rate?",
        "train.seed=-1: must be greater than or equal to 0",
    ]
    rest = [line.strip() for line in lines[1:]]
    assert all(any(line.startswith(text) for line in rest) for text in expected), error.value
    # top_k is judged although another key of its section is wrong.
    assert any(line.startswith("line 5: adapter.top_k=9: must be at most") for line in rest)


def test_a_rule_that_reads_a_wrong_key_says_nothing() -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(recipe(adapter={"num_experts": "sixteen", "top_k": 12}))
    assert "num_experts='sixteen'" in str(error.value) and "top_k" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("adapter:\n  r: 1\n  r: 2\n", "line 3: adapter.r: is set twice, first on line 2", id="key-twice"),
        pytest.param("model: [", "line 1: is not valid YAML", id="yaml"),
        pytest.param("a: 1\nb: !!binary aGk=\n", "line 2: the tag '!!binary' is not allowed in a recipe", id="binary"),
        pytest.param("a: 1\nb: !x 3\n", "line 2: the tag '!x' is not allowed in a recipe", id="tag"),
        pytest.param("a: !!python/object:os.system ls", "the tag '!!python/object:os.system'", id="python"),
        pytest.param("\na: !!int 2x\n", "line 2: '2x' is no whole number", id="int"),
        pytest.param("a: !!int {b: 1}\n", "line 1: !!int must stand before a single word", id="int-structure"),
        pytest.param("\ntrue: x\n", "line 2: true='x': unknown key", id="key-true"),
        pytest.param("\n.nan: 1\n", "line 2: .nan=1: unknown key", id="key-nan"),
        pytest.param("\nnull: 1\n", "line 2: null=1: unknown key", id="key-null"),
        pytest.param("\n010: 1\n", "line 2: 010=1: unknown key", id="key-number"),
        pytest.param("\na: !!null 7\n", "line 2: '7' is not null", id="null-word"),
        pytest.param("\na: !!null {r: 4}\n", "line 2: !!null must stand before a single word", id="null-structure"),
        pytest.param("\na: !!map [1]\n", "line 2: !!map must stand before keys", id="map"),
        pytest.param("a: !!bool no\n", "'no' must be true or false", id="bool"),
        pytest.param(f"a: {'9' * 5000}\n", "is a number of more than 300 digits", id="digits"),
        pytest.param("a: b\x07\n", "line 1: is not valid YAML: the character '\\x07' must not be there", id="control"),
        pytest.param('a:\n - "b\\0c"\n', "line 2: text must not hold the character '\\x00'", id="null"),
        pytest.param('a: "\\ud83d"\n', "text must not hold the character '\\ud83d'", id="surrogate"),
        pytest.param("? {a: 1}\n: 2\n", "line 1: a key must be a single word", id="key"),
        pytest.param("a: " + "[" * 2000, "is nested more than 100 deep", id="deep"),
        pytest.param("a: &x [1, *x]\n", "contains itself through an alias", id="cycle"),
        pytest.param(
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "holds more than 100,000 values",
            id="aliases",
        ),
        pytest.param("a: 1\n--- \nb: 2\n", "line 2: is not valid YAML", id="two-documents"),
        pytest.param("a: 1\n  b: 2\n", "line 2: is not valid YAML: mapping values are not allowed here", id="indent"),
        pytest.param("a: *b\n", "line 1: is not valid YAML: found undefined alias 'b'", id="alias"),
        pytest.param("a: {<<: 3}\n", "line 1: is not valid YAML", id="merge"),
        pytest.param("- model\n", "must hold sections", id="list"),
        pytest.param("model: {name_or_path: x}\n", "data: is required", id="missing-section"),
        pytest.param(
            GOOD.replace("alpha: 32", "lora_r: 3"), "lora_r=3: is another name of r, and rank", id="two-aliases"
        ),
        pytest.param(GOOD.replace("alpha: 32", "r: 3"), "adapter.r=3: has another alias, rank", id="name-and-alias"),
        pytest.param(
            GOOD.replace("evaluation:", "evaluation: 3"), "evaluation=3: must be a section", id="scalar-section"
        ),
    ],
)
def test_what_a_file_can_get_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value) or "errors:" in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4), ("1e-4", 1e-4), ("5E-4", 5e-4), ("+5e-4", 5e-4), (".5", 0.5), ("5.", 5.0), ("1.5e3", 1500.0),
        ("1e3", 1000.0), (".5e-3", 5e-4), ("010", 10), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("-3", -3),
        ("0", 0), ("2024-01-31", "2024-01-31"), ("2024-13-45", "2024-13-45"), ("1:30:00", "1:30:00"), ("no", "no"),
        ("on", "on"),
        ("y", "y"), ("yes", "yes"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("1e", "1e"), ("0x", "0x"), ("1__0", "1__0"), ("1.2.3", "1.2.3"), ("e5", "e5"), ("-", "-"), ("=", "="),
        ("'5e-4'", "5e-4"), ("!!str 7", "7"), ("!!float 7", 7.0), ('"\\ud83d\\ude00"', "\U0001f600"),
        ('"a\\tb"', "a\tb"),
    ],
)  # fmt: skip
def test_words_are_read_as_people_mean_them(text: str, value: object) -> None:
    if text != "-":
        read = parse_value(text, "a.b")
        assert read == value and isinstance(read, type(value)) and isinstance(read, bool) == isinstance(value, bool)
    # As text, each is written so that it is read back, by readers of any version of YAML.
    written = yaml.dump({"a": text}, Dumper=RecipeDumper, allow_unicode=True)
    assert parse_value(written, "a.b") == yaml.safe_load(written) == {"a": text}


def test_where_text_belongs_a_number_is_the_word_that_is_written(tmp_path: Path) -> None:
    text = GOOD.replace("weight: 2", "weight: 2.0, choices: [1.50, 010, 0x10, 1e3, no, 1_000], fields: {prompt: 007}")
    config = load_config(write(tmp_path, text), ["--model.revision", "12e4567", "--data.tasks.piqa.name=2024"])
    task, other = config.data.tasks
    assert task.choices == ("1.50", "010", "0x10", "1e3", "no", "1_000") and task.fields.prompt == "007"
    assert (config.model.revision, other.name) == ("12e4567", "2024")
    assert [type(value) for value in (task.weight, config.train.learning_rate, config.adapter.r)] == [float, float, int]
    assert load_config(write(tmp_path, config_text(config))) == config


def test_a_switch_takes_every_word_for_yes_and_no() -> None:
    for word in ("yes", "on", "true", "True", "y"):
        assert config_from_dict(recipe(), [f"--evaluation.base={word}"]).evaluation.base is True
    for word in ("no", "off", "false", "n"):
        assert config_from_dict(recipe(), [f"--evaluation.base={word}"]).evaluation.base is False


def test_missing_file_and_bad_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: {name_or_path: \xe9}")
    with pytest.raises(ConfigError, match=r"latin.yaml: line 1: is not text in UTF-8 \(byte 0xe9\)"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "signed.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(tmp_path / "signed.yaml").adapter.r == 16


@pytest.mark.parametrize("adapter", [{}, {"method": "molora"}, {"method": "lora", "r": 64}, {"shared_r": 22}])
def test_a_written_config_loads_as_its_equal(tmp_path: Path, adapter: dict[str, object]) -> None:
    config = config_from_dict(
        recipe(adapter=adapter, model={"load_in_4bit": False}, data={"near_duplicate_threshold": None}),
        ["data.tasks.boolq.test_size=0.25", "--data.tasks.piqa.prompt_template", "'é {prompt}\\n'"],
    )
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", ["--train.seed", "1"]) != config


def test_split_arguments() -> None:
    assert split_arguments(["--local_rank=1", "r.yaml", "--adapter.r", "3"]) == ("r.yaml", ["--adapter.r", "3"])
    recipe, overrides = split_arguments(["r.yaml", "--new-run", "--adapter.r=3"])
    assert overrides == ["--train.resume_from_checkpoint=null", "--adapter.r=3"]
    for wrong in ([], ["--local_rank=0"], ["--adapter.r", "3", "r.yaml"]):
        with pytest.raises(ConfigError, match="must come first"):
            split_arguments(wrong)
