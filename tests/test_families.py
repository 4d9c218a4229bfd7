"""Every family of transformers that can be built tiny: our loader's numbers are those of transformers."""

import pytest

from tests.families import families
from tests.family_results import PAGE, look, page

# Of the largest logit; most are equal to the bit.
CLOSE = 1e-5
# Of weights that are rounded again.
MERGED = 1e-4
# Several layers share weights, or their files hold them in one.
NOT_MERGED = {"hrm_text", "zamba", "zamba2"}


@pytest.mark.parametrize("name", families())
def test_logits_are_those_of_transformers(name: str) -> None:
    found = look(name)
    assert max(found.plain, found.in_4bit, found.again, found.training) <= CLOSE, found
    assert (found.merged is None) == (name in NOT_MERGED) and (found.merged or 0) <= MERGED, found


def test_the_page_says_what_is_found() -> None:
    import transformers

    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}, the" not in text:
        pytest.skip("docs/models.md is about another version of transformers")
    assert text == page(), "python -m tests.family_results --write"
