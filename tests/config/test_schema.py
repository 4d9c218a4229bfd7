import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from malora_dist.config import AdapterConfig, config_from_dict
from malora_dist.config.names import leaves, section_of
from malora_dist.config.schema import RunConfig
from malora_dist.errors import ConfigError
from tests.config.recipes import recipe

TASK = {"name": "t", "train": "t.jsonl"}


def test_every_leaf_says_what_it_is() -> None:
    for path in leaves():
        model = RunConfig
        for part in path[:-1]:
            model = section_of(model, part) or model
        assert len(model.model_fields[path[-1]].description or "") > 8, path
    assert len(list(leaves())) > 70


def test_aliases_point_at_fields_and_hide_none() -> None:
    sections = [RunConfig] + [section_of(RunConfig, key) for key in RunConfig.model_fields]
    for section in filter(None, sections):
        assert set(section.aliases.values()) <= set(section.model_fields)
        assert not set(section.aliases) & set(section.model_fields)


def test_defaults() -> None:
    config = config_from_dict(recipe())
    assert (config.adapter.method, config.adapter.num_experts, config.adapter.top_k, config.adapter.r) == (
        "malora",
        8,
        2,
        12,
    )
    assert config.train.num_train_epochs == 3 and config.train.max_steps is None
    assert config.data.tasks[0].train == ("boolq.jsonl",) and config.data.tasks[1].train == ("a.jsonl", "b.jsonl")
    assert config_from_dict(recipe(train={"max_steps": 5})).train.num_train_epochs is None


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config_from_dict(recipe()).train.seed = 1  # type: ignore[misc]


def broken(section: str, values: dict[str, object], *fragments: str) -> object:
    return pytest.param(section, values, fragments, id=f"{section}-{'-'.join(values)}")


@pytest.mark.parametrize(
    ("section", "values", "fragments"),
    [
        broken("model", {"dtype": "fp16"}, "model.dtype='fp16'", "one of auto, bfloat16 (bf16), float32 (fp32)"),
        broken("model", {"attn_implementation": "flash_attention_2", "dtype": "fp32"}, "needs model.dtype=bfloat16"),
        broken(
            "model", {"load_in_4bit": False, "bnb_4bit_use_double_quant": True}, "no meaning for model.load_in_4bit"
        ),
        broken("adapter", {"top_k": 9}, "adapter.top_k=9", "at most adapter.num_experts=8"),
        broken("adapter", {"r": 0}, "adapter.r=0", "greater than or equal to 1"),
        broken("adapter", {"r": True}, "adapter.r=True", "must not be true or false"),
        broken("adapter", {"r": None}, "adapter.r=None"),
        broken("adapter", {"shared_r": 8}, "adapter.shared_r=8", "at least adapter.r=12"),
        broken("adapter", {"lora_dropout": 1.0}, "adapter.lora_dropout=1.0", "less than 1"),
        broken("adapter", {"target_modules": []}, "adapter.target_modules=[]", "must not be empty"),
        broken("adapter", {"target_modules": ["q", "q"]}, "must not name a module twice"),
        broken(
            "adapter",
            {"method": "lora", "num_experts": 8},
            "adapter.num_experts=8: has no meaning for adapter.method=lora",
        ),
        broken("adapter", {"method": "lora", "router_aux_loss_coef": 0}, "router_aux_loss_coef=0: has no meaning"),
        broken("adapter", {"method": "lora", "scaling": "gate_sum"}, "adapter.scaling='gate_sum': has no meaning"),
        broken("adapter", {"scaling": "gate_sum", "use_rslora": True}, "contradicts adapter.use_rslora=true"),
        broken("adapter", {"method": "molora", "router_input": "h"}, "router_input='h': has no meaning"),
        broken("adapter", {"method": "lora", "router_dtype": "input"}, "router_dtype='input': has no meaning"),
        broken(
            "adapter", {"router_aux_loss_ratio": 0.2}, "has no meaning for adapter.router_aux_loss_schedule=constant"
        ),
        broken("adapter", {"method": "molora", "task_conflict": "project"}, "task_conflict='project': has no meaning"),
        broken("adapter", {"method": "hydralora", "router_z_loss_coef": 0.1}, "router_z_loss_coef=0.1: has no meaning"),
        broken("adapter", {"method": "molora", "beta": 2}, "adapter.beta=2: has no meaning for adapter.method=molora"),
        broken(
            "adapter", {"method": "dora", "num_experts": 8}, "num_experts=8: has no meaning for adapter.method=dora"
        ),
        broken("adapter", {"method": "hydralora", "top_k": 2}, "top_k=2: has no meaning for adapter.method=hydralora"),
        broken("data", {"tasks": []}, "at least one task"),
        broken("data", {"tasks": [TASK, TASK]}, "'t' is used 2 times"),
        broken("data", {"tasks": [{**TASK, "name": "../t"}]}, "data.tasks[0].name='../t'"),
        broken("data", {"tasks": [{**TASK, "train": []}]}, "data.tasks[0].train=[]", "must not be empty"),
        broken("data", {"tasks": [{**TASK, "test": "x", "test_size": 5}]}, "either test or test_size"),
        broken("data", {"tasks": [{**TASK, "test_size": 1.5}]}, "data.tasks[0].test_size=1.5", "fraction"),
        broken("data", {"tasks": [{**TASK, "test_size": 0.5, "validation_size": 0.5}]}, "leaves no row"),
        broken("data", {"tasks": [{**TASK, "prompt_template": "Q: {question}"}]}, "must contain {prompt}"),
        broken("data", {"tasks": [{**TASK, "prompt_template": "{prompt} }"}]}, "is not a template"),
        broken(
            "data", {"tasks": [{**TASK, "prompt_template": "{prompt:d}"}]}, "is not a template: Unknown format code"
        ),
        broken(
            "data",
            {"tasks": [{**TASK, "prompt_template": "{prompt:>9999999999}"}]},
            "is not a template: '>9999999999' has a number",
        ),
        broken("data", {"tasks": [{**TASK, "prompt_template": "{prompt[0]} {prompt}"}]}, "must be the plain name of a"),
        broken("data", {"tasks": [{**TASK, "prompt_template": "{Correct Answer} {prompt}"}]}, "plain name of a field"),
        broken("data", {"tasks": [{**TASK, "response_template": "{} {response}"}]}, "'' must be the plain name of a"),
        broken(
            "data",
            {"tasks": [{**TASK, "optional_fields": ["nope"]}]},
            "optional_fields=['nope']",
            "'nope' must be a field of",
        ),
        broken("data", {"tasks": [{**TASK, "response_template": "{response!x}"}]}, "is not a template: {response!x}"),
        broken("data", {"tasks": [{**TASK, "weight": 0}]}, "data.tasks[0].weight=0", "greater than or equal to"),
        broken("data", {"tasks": [{**TASK, "weight": 1e308}]}, "data.tasks[0].weight=1e+308", "less than or equal to"),
        broken(
            "data", {"tasks": [{**TASK, "choices": [False, True]}]}, "data.tasks[0].choices", "put true and false in"
        ),
        broken("data", {"tasks": [{**TASK, "choices": ["a"]}]}, "data.tasks[0].choices", "must be 2 to 26 texts"),
        broken("data", {"tasks": [{**TASK, "choices": ["a", "a "]}]}, "must not contain a choice twice"),
        broken("data", {"tasks": [{**TASK, "choices": ["a", "b"], "kind": "completion"}]}, "no meaning for kind"),
        broken("data", {"tasks": [{**TASK, "choices": ["a", "b"], "fields": {"choices": "x"}}]}, "not both"),
        broken("data", {"tasks": [{**TASK, "first_label": 2}]}, "data.tasks[0].first_label=2", "must be 0 or 1"),
        broken("data", {"tasks": [{**TASK, "fields": {"choices": []}}]}, "fields.choices=[]", "2 to 26 fields"),
        broken("data", {"tasks": {"boolq": TASK}}, "data.tasks=", "must be a list"),
        broken("data", {"temperature": 3}, "no meaning for data.mixture=proportional"),
        broken("train", {"global_batch_size": 10**23}, "train.global_batch_size=", "less than or equal to 1000000"),
        broken("train", {"max_steps": 10**15}, "train.max_steps=", "less than or equal to"),
        broken("train", {"num_train_epochs": 1e308}, "train.num_train_epochs=1e+308", "less than or equal to"),
        broken("adapter", {"num_experts": 10**23}, "adapter.num_experts=", "less than or equal to"),
        broken("adapter", {"r": 10**30}, "adapter.r=", "less than or equal to"),
        broken("parallel", {"zero_stage": 4}, "parallel.zero_stage=4", "less than or equal to 3"),
        broken("train", {"learning_rate": 0}, "train.learning_rate=0", "greater than 0"),
        broken("train", {"learning_rate": math.nan}, "train.learning_rate=nan", "finite"),
        broken("train", {"max_steps": 3, "num_train_epochs": 1}, "either max_steps or num_train_epochs=1.0"),
        broken("train", {"resume_from_checkpoint": ""}, "train.resume_from_checkpoint=''", "must not be empty"),
        broken(
            "train", {"best_baseline": "eval.json"}, "best_baseline='eval.json': has no meaning for train.best_metric"
        ),
        broken("train", {"best_metric": "best"}, "'average', 'worst_task' or 'worst_drop'"),
        broken("train", {"save_total_limit": 0}, "train.save_total_limit=0", "greater than or equal to 1"),
        broken("train", {"max_hours": 0}, "train.max_hours=0", "greater than 0"),
        broken("train", {"report_to": ["mlflow"]}, "'tensorboard' or 'wandb'"),
    ],
)
def test_a_broken_rule_names_key_value_and_rule(section: str, values: dict[str, object], fragments: tuple[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(recipe(**{section: values}))
    for fragment in fragments:
        assert fragment in str(error.value)
    assert not re.search(r"has \d+ errors", str(error.value)), "one mistake, one error"


def test_fields_and_choices_of_a_task() -> None:
    task = {**TASK, "fields": {"prompt": "question.stem", "choices": ["A", "B"]}, "optional_fields": "input"}
    task["prompt_template"] = "{input} {prompt}"
    (read,) = config_from_dict(recipe(data={"tasks": [task]})).data.tasks
    assert (read.fields.choices, read.optional_fields, read.choices, read.first_label) == (
        ("A", "B"),
        ("input",),
        None,
        0,
    )
    (read,) = config_from_dict(recipe(data={"tasks": [{**TASK, "choices": ["yes", 1, 2.5]}]})).data.tasks
    assert read.choices == ("yes", "1", "2.5") and read.fields.choices == "choices"


def test_values_people_write() -> None:
    config = config_from_dict(
        recipe(model={"dtype": "bf16"}, adapter={"target_modules": "q_proj, v_proj"}, train={"report_to": "none"})
    )
    assert config.model.dtype == "bfloat16"
    for given in ("float32", "fp32", "torch.float32"):
        assert config_from_dict(recipe(model={"dtype": given})).model.dtype == "float32"
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.train.report_to == ()


def test_keys_of_older_recipes_are_taken() -> None:
    """config.yaml and manifest.json of runs hold them too."""
    assert config_from_dict(recipe(adapter={"fuse_siblings": False})).adapter.fuse_projections is False
    assert config_from_dict(recipe(), ["--adapter.fuse_siblings=false"]).adapter.fuse_projections is False


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("all-linear", ("all-linear",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (r".*\.(q_proj|v_proj)", (r".*\.(q_proj|v_proj)",)),
        (r".*\.layers\.\d{1,2}\.mlp\..*,o_proj", (r".*\.layers\.\d{1,2}\.mlp\..*", "o_proj")),
        (["q_proj", r".*[0,1]\.mlp.*"], ("q_proj", r".*[0,1]\.mlp.*")),
    ],
)
def test_targets_are_names_patterns_or_all(given: Any, targets: tuple[str, ...]) -> None:
    assert AdapterConfig(target_modules=given).target_modules == targets


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r".*\.(q_proj", r"missing \)"),
        ("a{99999999999999999999}", "the repetition number is too large"),
        ("(" * 990 + ")" * 990, "it is nested too deep"),
        ("(q_proj|" * 2000, "it has 16000 characters, more than 2000"),
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValidationError, match=f"is not a valid regular expression: {why}"):
        AdapterConfig(target_modules=[pattern])


PLACES = ["output_dir", "model.name_or_path", "data.cache_dir", "parallel.ds_config"]
PLACES += ["train.resume_from_checkpoint", "train.best_baseline"]


def at_place(place: str, value: str) -> RunConfig:
    """A recipe with this value for a key."""
    section, _, key = place.rpartition(".")
    best = {"best_metric": "worst_drop"} if key == "best_baseline" else {}
    return config_from_dict(recipe(**{section: {key: value, **best}}) if section else recipe() | {key: value})


@pytest.mark.parametrize("place", PLACES)
def test_paths_that_no_system_takes_are_refused(place: str) -> None:
    """Bytes count, not letters."""
    at_place(place, "é" * 127)
    for path in ("é" * 128, "a/" * 2048 + "b"):
        with pytest.raises(ConfigError, match=rf"{re.escape(place)}=.*names of at most 255"):
            at_place(place, path)


@pytest.mark.parametrize("place", PLACES)
def test_a_home_stands_in_the_place_of_its_sign(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    section, _, key = place.rpartition(".")
    for given, path in {"~/x": "/home/me/x", "~": "/home/me", "./~x": "./~x", "a/~/b": "a/~/b"}.items():
        config = at_place(place, given)
        assert getattr(getattr(config, section) if section else config, key) == path
    with pytest.raises(
        ConfigError, match=rf"{re.escape(place)}='~nosuchuser/x': must start with the home folder of a user"
    ):
        at_place(place, "~nosuchuser/x")


def test_a_home_in_the_paths_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (task,) = config_from_dict(
        recipe(data={"tasks": [{**TASK, "train": ["~/a.jsonl", "b"], "test": "~/c"}]})
    ).data.tasks
    assert (task.train, task.test) == (("/home/me/a.jsonl", "b"), ("/home/me/c",))
    with pytest.raises(ConfigError, match=r"tasks\[0\]\.train.*must start with the home folder of a user"):
        config_from_dict(recipe(data={"tasks": [{**TASK, "train": "~nosuchuser/x.jsonl"}]}))
