"""What the loader makes of a tiny model of each family, and the page docs/models.md that says so.

`python -m tests.family_results --write` writes the page anew.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io.folder import AdapterInfo, save_adapter
from malora_dist.adapters.methods import mixture_spec
from malora_dist.adapters.targets import ALL_LINEAR, all_linear, leaf_of
from malora_dist.adapters.training_mode import train_adapters
from malora_dist.convert.job import convert
from malora_dist.convert.kinds import ConvertOptions
from malora_dist.errors import MaloraError
from malora_dist.models.attention import choose_attention
from malora_dist.models.load import load_base_model
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.models.packed_attention import FLASH_VARLEN, TORCH_VARLEN
from malora_dist.ops.nf4 import dequantize_nf4, quantize_nf4
from tests.evaluation.test_packing import ALONE, REFUSED, SEQUENCES
from tests.families import NOT_TINY, families, family_model, without_compiler
from tests.multiprocess import ROOT

PAGE = ROOT / "docs" / "models.md"
IDS = torch.tensor([[3, 5, 9, 11, 60, 7, 30, 4, 17, 8, 50, 21]])
WORDS = {TORCH_VARLEN: "varlen", FLASH_VARLEN: "varlen"}


@dataclass(frozen=True)
class Found:
    """Of one family: its class, its linears, the attention of `auto`, and how far logits are from transformers'.

    Differences are relative to the largest logit. again: of the model that our loader's model saved. merged: of the
    base with a LoRA on all its linears merged into it, None where that is refused. training: of our model in training
    mode, with everything that its configuration lets it draw at random.
    """

    class_name: str
    linears: tuple[str, ...]
    attention: str
    attention_on_gpu: str
    plain: float
    in_4bit: float
    again: float
    merged: float | None
    training: float


@cache
def look(name: str) -> Found:
    """Save a tiny model of the family, load it with our loader and with transformers, and compare."""
    with tempfile.TemporaryDirectory() as temporary, without_compiler():
        folder, copy = Path(temporary, "model"), Path(temporary, "copy")
        family_model(name).save_pretrained(folder)
        if name != "diffllama":  # transformers refuses dropout there
            _draw(folder / "config.json")
        theirs = _theirs(folder)
        attention, on_gpu = (
            choose_attention("auto", theirs.config, *where, False) for where in ((4, None), (2, (8, 0)))
        )
        ours = load_base_model(folder, dtype=torch.float32, load_in_4bit=False, attn_implementation=attention)
        wanted = logits(theirs)
        plain = _apart(logits(ours), wanted)
        training = _apart(_logits_in_training(ours), wanted)
        ours.save_pretrained(copy)
        again = _apart(logits(_theirs(copy)), wanted)
        merged = _merged(ours, folder, Path(temporary))
        ours = load_base_model(folder, dtype=torch.float32, attn_implementation=attention)
        _round(theirs, ours)
        return Found(
            class_name=type(theirs).__name__,
            linears=tuple(dict.fromkeys(map(leaf_of, all_linear(theirs)))),
            attention=WORDS.get(attention, attention),
            attention_on_gpu=WORDS.get(on_gpu, on_gpu),
            plain=plain,
            in_4bit=_apart(logits(ours), logits(theirs)),
            again=again,
            merged=merged,
            training=training,
        )


def _draw(path: Path) -> None:
    """Raise every rate of dropout and every size of noise in a config.json, those of parts too."""

    def raised(content: dict[str, Any]) -> dict[str, Any]:
        return {key: raised(value) if isinstance(value, dict) else _half(key, value) for key, value in content.items()}

    path.write_text(json.dumps(raised(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def _half(key: str, value: Any) -> Any:
    is_rate = any(word in key for word in ("drop", "jitter", "noise")) and "classifier" not in key
    return 0.5 if is_rate and (value is None or type(value) is float) else value


def _logits_in_training(model: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        train_adapters(model)
        found = logits(model)
    model.eval()
    return found


def _merged(model: Any, folder: Path, target: Path) -> float | None:
    """Put a LoRA on the model, and merge it into the folder it was loaded from."""
    spec = mixture_spec("lora", r=2)
    targets = inject_adapters(model, spec, [ALL_LINEAR]).target_modules
    for number, (_, parameter) in enumerate(adapter_parameters(model)):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    info = AdapterInfo(spec=spec, target_modules=targets, base_model=str(folder), lora_dropout=0.0)
    save_adapter(target / "adapter", info, adapter_state_dict(model), "card")
    try:
        convert("merged", (target / "adapter",), target / "merged", ConvertOptions(), lambda said: None)
    except MaloraError as error:
        if not any(why in str(error) for why in ("is tied to", "as a part of")):
            raise
        return None
    merged = load_base_model(target / "merged", dtype=torch.float32, load_in_4bit=False)
    return _apart(logits(merged), logits(model))


def logits(model: Any) -> Tensor:
    """The model's logits of one short row."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def _theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _round(theirs: Any, ours: Any) -> None:
    """Round the weights of their linears to the 4-bit values that ours has."""
    done: set[int] = set()
    for name, module in ours.named_modules():
        if isinstance(module, NF4Linear) and id(module.packed_weight) not in done:
            done.add(id(module.packed_weight))
            weight = theirs.get_submodule(name).weight.data
            packed = quantize_nf4(weight, module.double_quant)
            assert torch.equal(packed, module.packed_weight), name
            weight.copy_(dequantize_nf4(packed, tuple(weight.shape), torch.float32, module.double_quant))


def _in_a_row(name: str) -> str:
    """What tests/evaluation/test_packing.py finds; and Reformer cannot be trained on."""
    if name in REFUSED or name == "reformer":
        return "refused"
    return "one" if name in ALONE else "several" if name in SEQUENCES else "several that branch"


def page() -> str:
    """Return docs/models.md."""
    import transformers

    not_merged = [name for name in families() if look(name).merged is None]
    lines = [
        "# Models",
        "",
        f"Of the {len(families()) + len(NOT_TINY)} families of causal language models in transformers "
        f"{transformers.__version__}, the {len(families())} below are run by a test; "
        "others are loaded by the same code. A base is loaded from safetensors as transformers loads it: names and "
        "layouts of tensors, ties, and buffers that no file holds. `malora validate`, `prepare` and `train` refuse "
        "what cannot be loaded before a row is tokenised or a weight quantised.",
        "",
        "A folder's own Python code is never run, unless you set `model.trust_remote_code: true` in the recipe that "
        "you name, or on the command line. A run, a checkpoint or an adapter that sets it is not enough: for a run of "
        "yours, use `malora evaluate RUN --model.trust_remote_code true` and `malora convert RUN ... --recipe "
        "RUN/config.yaml`.",
        "",
        "A test makes this page from tiny models: each is saved by transformers and loaded by this package, in full "
        "precision and in 4 bits, gives the logits of transformers, in training mode too, and is saved and loaded "
        "again, also with an adapter merged into it. Merging is refused for families whose layers share weights or are "
        f"stored in one tensor: {', '.join(not_merged)}.",
        "",
        "- **linears**: the last parts of the names that `adapter.target_modules: all-linear` means: linears that "
        "training runs on every token and gives a gradient, as a test checks for all families but the refused ones, "
        "Reformer and RWKV. Another linear of such a name, such as the `dense` before BERT's head, is refused as a "
        "target. Experts that transformers keeps as one parameter are loaded but not adapted; the log names them.",
        "- **attention**: what `model.attn_implementation: auto` becomes on a CPU or in float32, and on a GPU in 16 "
        "bits.",
        "- **in a row**: several samples; several that branch (the choices of a question share their prompt); or one, "
        "so that `train.per_device_train_batch_size` must be 1. Refused are models that see tokens after the current "
        "one, or count positions from another number, and Reformer, which draws at random. Encoders decode if their "
        "configuration has `is_decoder: true`.",
        "",
        "| `model_type` | class | linears | attention | in a row |",
        "|---|---|---|---|---|",
    ]
    for name in families():
        found = look(name)
        kinds = " / ".join(dict.fromkeys((found.attention, found.attention_on_gpu)))
        lines.append(f"| {name} | {found.class_name} | {' '.join(found.linears)} | {kinds} | {_in_a_row(name)} |")
    lines += ["", "Not run, as they cannot be built tiny here: " + ", ".join(sorted(NOT_TINY)) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "python -m tests.family_results --write"
    PAGE.write_text(page(), encoding="utf-8")
