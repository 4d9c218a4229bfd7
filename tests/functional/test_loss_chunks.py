"""Rows of a chunk: as documented for the vocabularies of real models, and never none."""

import pytest

from malora_dist.functional.loss_chunks import chunk_rows


@pytest.mark.parametrize(
    ("vocab_size", "cpu", "cuda"), [(32_000, 524, 2097), (49_152, 341, 1365), (128_256, 130, 523), (10**9, 1, 1)]
)
def test_rows(vocab_size: int, cpu: int, cuda: int) -> None:
    assert (chunk_rows(vocab_size, "cpu"), chunk_rows(vocab_size, "cuda")) == (cpu, cuda)
