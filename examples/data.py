"""Rows of text as tensors: what the examples train on."""

import json
from pathlib import Path
from typing import Any

import torch

IGNORED = -100


def read_rows(path: str, tokenizer: Any, max_length: int = 128) -> list[dict[str, torch.Tensor]]:
    """Read {"prompt": ..., "response": ...} rows of a .jsonl file; only the response is learned."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = (prompt + tokenizer(row["response"] + tokenizer.eos_token)["input_ids"])[:max_length]
        labels = ([IGNORED] * len(prompt) + ids[len(prompt) :])[:max_length]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad rows to the longest; `attention_mask` keeps padding out of attention and of the balance loss."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        parts = [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
        return torch.stack(parts)

    ones = [{"ones": torch.ones_like(row["input_ids"])} for row in rows]
    rows = [row | one for row, one in zip(rows, ones, strict=True)]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "attention_mask": padded("ones", 0),
    }
