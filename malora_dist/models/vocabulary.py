"""Whether a tokenizer and a model belong together: every token that a text can give has a row in the embedding."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from malora_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from malora_dist.data.build import PreparedData

# Tokens by which a tokenizer itself marks texts; others of a name of their own stand for pictures and sounds.
OF_TEXTS = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
SHOWN = 5


def embedding_rows(model: "PreTrainedModel") -> int:
    """Return how many tokens a model knows: the rows of its embedding or of its head, where that has fewer."""
    rows = [
        layer.weight.shape[0]
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if getattr(layer, "weight", None) is not None
    ]
    return int(min(rows)) if rows else int(model.config.get_text_config().vocab_size)


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", rows: int) -> dict[int, str]:
    """Return the tokens beyond `rows`, by id, which no text gives unless it spells them out.

    Such are padding and the places of pictures and sounds.

    Raises ConfigError for others beyond it.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    named = tokenizer.special_tokens_map.items()
    # Padding is often the token that ends texts.
    spare = {str(token) for name, token in named if name not in OF_TEXTS}
    spare -= {str(token) for name, token in named if name in OF_TEXTS}
    lost = {number: token for number, token in sorted(beyond.items()) if token not in spare}
    if lost:
        shown = ", ".join(f"{token} {number}" for number, token in list(lost.items())[:SHOWN])
        raise ConfigError(
            f"model.name_or_path: the tokenizer has {len(lost)} token{'s' if len(lost) > 1 else ''} for which the "
            f"model has no row ({shown}{', ...' if len(lost) > SHOWN else ''}): its embedding has {rows}. Use the "
            "model's own tokenizer, or save the model after resize_token_embeddings(len(tokenizer))"
        )
    return beyond


def check_tokens(data: "PreparedData", beyond: dict[int, str]) -> None:
    """Raise DataError if a row of a task holds a token for which the model has no row."""
    if not beyond:
        return
    for task, ids in _ids(data):
        check_row(ids, beyond, f"task {task}: a row")


def check_row(ids: Sequence[int], beyond: Mapping[int, str], where: str) -> None:
    """Raise DataError if a row of token ids, which is `where` they are, holds one for which the model has no row."""
    highest = max(ids, default=0)
    if beyond and highest >= min(beyond):
        raise DataError(f"{where} holds {beyond.get(highest, highest)}, for which the model has no row")


def _ids(data: "PreparedData") -> Iterator[tuple[str, list[int]]]:
    """Yield the task and the token ids of every row."""
    for sample in data.train:
        yield data.task_names[sample.task_id], sample.input_ids.tolist()
    for tasks in data.evaluation.values():
        for task, rows in tasks.items():
            for row in rows:
                parts = [row.input_ids] if hasattr(row, "input_ids") else [row.prompt_ids, *row.choice_ids]
                yield task, [int(number) for part in parts for number in part]
