import pytest

from malora_dist.bench.local.layer import LayerOptions
from malora_dist.bench.local.options import (
    BASES,
    command_line,
    default_names,
    labelled_share,
    names_on_one_linear,
    one_of,
    short_dtype,
    sizes,
    whole_numbers,
)
from malora_dist.errors import ConfigError


def test_lists() -> None:
    assert sizes("576, 4096x11008") == [(576, 576), (4096, 11008)]
    assert whole_numbers("--tokens", "512,8192") == [512, 8192]
    assert labelled_share("all") == 1 and labelled_share("0.25") == 0.25
    assert set(default_names("bf16")) - set(default_names("fp32")) == {"peft_lora_fp32", "peft_lora_fp32_equal"}
    assert default_names("fp64") == default_names("fp32")
    assert set(default_names("bf16")) - set(names_on_one_linear("bf16")) == {"malora_fused"}


@pytest.mark.parametrize("wrong", ["", "8x", "8x8x8", "0", "-8", "a"])
def test_wrong_sizes_are_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--size"):
        sizes(wrong)


def test_other_wrong_words_are_named() -> None:
    for text in ("0", "1.5", "", "a"):
        with pytest.raises(ConfigError, match="--tokens"):
            whole_numbers("--tokens", text)
    for text in ("0", "1.1", "some"):
        with pytest.raises(ConfigError, match="--labels"):
            labelled_share(text)
    with pytest.raises(ConfigError, match="--base 'int8' must be one of full, nf4"):
        one_of("--base", "int8", BASES)
    with pytest.raises(ConfigError, match=r"--dtype 'fp16' must be one of float32 \(fp32\), bfloat16 \("):
        short_dtype("fp16")


def test_a_dtype_has_its_long_and_its_short_name() -> None:
    for names in (("float32", "fp32"), ("bfloat16", "bf16"), ("float64", "fp64")):
        assert {short_dtype(name) for name in (*names, f"torch.{names[0]}")} == {names[1]}


def test_the_command_says_what_differs_from_the_defaults() -> None:
    options = LayerOptions(size="8x16", dtype="bf16", dropout=0.05, only="base,malora", threads=2)
    assert command_line("layer", LayerOptions()) == "malora bench layer"
    assert command_line("layer", options) == (
        "malora bench layer --size 8x16 --dtype bf16 --dropout 0.05 --only base,malora --threads 2"
    )
