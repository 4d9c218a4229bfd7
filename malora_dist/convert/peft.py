"""`lora` and `dora` adapters to PEFT and back, number for number."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import CONFIG, AdapterTensors, fill_adapter_folder, open_adapter
from malora_dist.adapters.io.info import adapter_config
from malora_dist.adapters.io.peft import READ, SILENT, open_peft
from malora_dist.adapters.io.rules import SETTINGS
from malora_dist.adapters.loading import put_adapter
from malora_dist.convert.job import Job
from malora_dist.convert.peft_folder import lora_card
from malora_dist.convert.verify import Factors, logits_of, text_rows, verify_peft
from malora_dist.errors import ConfigError
from malora_dist.files.durable import write_text


def to_peft(job: Job) -> None:
    """Write a stock PEFT folder: lora_A, lora_B and, for dora, lora_magnitude_vector, bit for bit as in ours."""
    adapter = job.open_adapter()
    title = "DoRA" if adapter.info.spec.structure.magnitude else "LoRA"
    tasks = job.task_names()
    text = f"Trained on {', '.join(tasks)}." if tasks else ""
    fill_adapter_folder(
        job.folder, adapter.info, adapter.shapes, _values(adapter), lora_card(adapter.info, f"{title} for PEFT", text)
    )
    write_text(job.folder / CONFIG, json.dumps(_stock_config(adapter), indent=2) + "\n")
    if job.options.verify:
        _verify(job, adapter, job.folder)


def from_peft(job: Job) -> None:
    """Write an adapter folder of ours from a PEFT LoRA, DoRA or rank-stabilised LoRA: the same numbers, as fp32.

    Raises CheckpointError for what our layers cannot represent; the message names the key of PEFT's config.
    """
    source = open_peft(job.source)
    info = replace(source.info, base_model=job.options.base or source.info.base_model)
    if not info.base_model:
        raise ConfigError(f"{job.source / CONFIG}: base_model_name_or_path is empty; give the base model with --base")
    fill_adapter_folder(job.folder, info, source.shapes, _values(source), model_card(info, (), {}))
    if job.options.verify:
        _verify(job, open_adapter(job.folder), job.source)


def _values(adapter: AdapterTensors) -> Iterator[Tensor]:
    return (adapter.read(name) for name in adapter.shapes)


def _stock_config(adapter: AdapterTensors) -> Mapping[str, Any]:
    """Return the keys that PEFT has too; lora_alpha an integer where it is one, as PEFT declares it.

    The targets of the folder are narrowed already, so what has narrowed them is left out.
    """
    alpha = adapter.info.spec.lora_alpha
    known = (READ | SILENT) - SETTINGS.keys()
    config = {key: value for key, value in adapter_config(adapter.info).items() if key in known}
    return config | {"lora_alpha": int(alpha) if alpha == int(alpha) else alpha}


def _verify(job: Job, ours: AdapterTensors, peft_folder: Path) -> None:
    """Compare our layers with real peft on real text."""
    rows = text_rows(job, ours.info)
    model = job.load_base(ours.info)
    put_adapter(model, ours)
    wanted = {"peft": logits_of(model, rows)}
    remove_adapters(model)

    def delta(_: str, layer: str) -> Factors:
        factors = ours.read_layer(layer)
        return ours.info.spec.of_layer(layer).scaling * factors["B"][0].double(), factors["A"][0].double()

    verify_peft(job, model, rows, {"peft": peft_folder}, wanted, ours.layers(), delta)
