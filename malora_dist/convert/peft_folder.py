"""Stock PEFT LoRA folders: what PEFT, transformers and vLLM load without this package.

Every layer has the same r and lora_alpha here; `convert.peft` writes those that have not.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from malora_dist.adapters.io.folder import CONFIG, WEIGHTS, AdapterInfo
from malora_dist.adapters.io.info import PREFIX
from malora_dist.console.progress import tracked
from malora_dist.files.atomic import share_file
from malora_dist.files.durable import write_text
from malora_dist.files.tensor_file import write_tensors

Shapes = Mapping[str, tuple[int, int]]


def fill_peft_folder(
    folder: Path,
    info: AdapterInfo,
    shapes: Shapes,
    values: Iterable[Tensor],
    *,
    r: int,
    lora_alpha: float,
    use_rslora: bool = False,
    card: str,
) -> None:
    """Write a LoRA into an empty folder that exists; fp32, one tensor in memory.

    `shapes` are those of `<layer>.lora_A.weight` (r, I) and `<layer>.lora_B.weight` (O, r), `values` come in its order.
    Base and targets are those of `info`. PEFT adds lora_alpha / r (/ sqrt(r) with `use_rslora`) times B A.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base_model,
        "target_modules": list(info.target_modules),
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "inference_mode": True,
    }
    stored = {f"{PREFIX}{name}": (torch.float32, shape) for name, shape in shapes.items()}
    write_tensors(
        folder / WEIGHTS, stored, (value.float() for value in tracked("writing, tensors", values, len(stored)))
    )
    share_file(folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / "README.md", card)


def lora_shapes(layer: str, r: int, inputs: int, outputs: int) -> dict[str, tuple[int, int]]:
    """Return names and shapes of a layer's two tensors."""
    return {f"{layer}.lora_A.weight": (r, inputs), f"{layer}.lora_B.weight": (outputs, r)}


def lora_card(info: AdapterInfo, title: str, text: str) -> str:
    """Return the text of README.md of such a folder."""
    return (
        f"---\nbase_model: {info.base_model}\nlibrary_name: peft\n---\n\n# {title}\n\n{text}\n\n"
        "```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base, folder)\n```\n"
    )
