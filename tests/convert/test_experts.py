"""Each expert as a stock LoRA in real peft: the mixture with its gate forced to that expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.config import load_config
from malora_dist.convert.gates import constant_gates
from malora_dist.data.build import build_data
from malora_dist.errors import ConfigError
from malora_dist.models.load import load_tokenizer
from malora_dist.ops.routing import route
from tests.convert.made import base, logits, run_kind, token_rows

ROWS = token_rows()


def in_peft(model: Any, folders: dict[str, Path]) -> Any:
    from peft import PeftModel

    names = list(folders)
    peft_model = PeftModel.from_pretrained(model, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        peft_model.load_adapter(folders[name], adapter_name=name)
    return peft_model.eval()


@pytest.mark.parametrize("method", ["malora", "molora", "hydralora"])
def test_one_hot_gates_are_the_folders(workspace: Path, tmp_path: Path, method: str) -> None:
    source = workspace / "runs" / method
    said = run_kind("peft-experts", source, tmp_path / "out", verify=True)
    assert [line.split(":")[0] for line in said[:-1]] == [f"verified expert-{t}" for t in range(4)]
    spec = open_adapter(source).info.spec
    ours = base(workspace)
    load_adapter(ours, source)
    theirs = in_peft(base(workspace), {f"expert-{t}": tmp_path / "out" / f"expert-{t}" for t in range(4)})
    for expert in range(4):
        config = json.loads((tmp_path / "out" / f"expert-{expert}" / "adapter_config.json").read_text())
        alpha = spec.scaling * spec.r if method == "molora" else 6.0  # whose scaling PEFT does not know
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (spec.r, alpha, spec.use_rslora)
        theirs.set_adapter(f"expert-{expert}")
        one_hot = torch.eye(4)[expert]
        with constant_gates(ours, {name: one_hot for name, _ in mixture_layers(ours)}):
            torch.testing.assert_close(logits(theirs, ROWS), logits(ours, ROWS), atol=5e-5, rtol=0)


def mean_gates(workspace: Path, source: Path) -> dict[str, Tensor]:
    """Sample by sample: 8 evenly spread training samples of each task, every token counted once."""
    config = load_config(source / "config.yaml")
    data = build_data(config.data, load_tokenizer(workspace / "model"))
    model = base(workspace)
    load_adapter(model, source)
    layers, sums, tokens = dict(mixture_layers(model)), dict[str, Tensor](), 0
    inputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][0]}))
    first = 0
    for size in data.train_sizes:
        for number in range(8):
            ids = torch.tensor(data.train[first + number * size // 8].input_ids.tolist())
            tokens += len(ids)
            with torch.no_grad():
                model(input_ids=ids[None], use_cache=False)
                for name, layer in layers.items():
                    gate = layer.input_projection.gate
                    routing = route(inputs[name], gate, layer.top_k, layer.input_projection.normalize_gates)
                    for expert in range(4):
                        weight = routing.gates_TK[routing.expert_ids_TK == expert].double().sum()
                        sums.setdefault(name, torch.zeros(4, dtype=torch.float64))[expert] += weight
        first += size
    return {name: total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("method", ["malora", "molora"])
def test_mean_gates_are_in_B_and_add_up(workspace: Path, tmp_path: Path, method: str) -> None:
    source = workspace / "runs" / method
    run_kind("peft-experts", source, tmp_path / "plain")
    said = run_kind("peft-experts", source, tmp_path / "out", gate="mean", calibration=8, verify=True)
    assert said[0] == "mean gates over 24 samples of colour, animal, spell"
    gates = mean_gates(workspace, source)
    for expert in range(4):
        name = f"expert-{expert}/adapter_model.safetensors"
        weighed, plain = load_file(tmp_path / "out" / name), load_file(tmp_path / "plain" / name)
        for key, tensor in plain.items():
            layer = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            factor = gates[layer][expert] if key.endswith("lora_B.weight") else 1
            torch.testing.assert_close(weighed[key], (factor * tensor.double()).float(), atol=1e-6, rtol=1e-5)
    ours = base(workspace)
    load_adapter(ours, source)
    theirs = in_peft(base(workspace), {f"e{t}": tmp_path / "out" / f"expert-{t}" for t in range(4)})
    theirs.base_model.set_adapter([f"e{t}" for t in range(4)])
    with constant_gates(ours, gates):
        torch.testing.assert_close(logits(theirs, ROWS), logits(ours, ROWS), atol=5e-5, rtol=0)


def test_options_that_cannot_be(workspace: Path, tmp_path: Path) -> None:
    source = workspace / "runs" / "malora"
    with pytest.raises(ConfigError, match="--gate maen must be one of one, mean"):
        run_kind("peft-experts", source, tmp_path / "out", gate="maen")
    with pytest.raises(ConfigError, match="--calibration N is for --gate mean"):
        run_kind("peft-experts", source, tmp_path / "out", calibration=4)
    with pytest.raises(ConfigError, match="names none, so give --recipe"):
        (tmp_path / "alone").mkdir()
        for file in (source / "adapter").iterdir():
            (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
        run_kind("peft-experts", tmp_path / "alone", tmp_path / "out", gate="mean")
    assert {path.name for path in tmp_path.iterdir()} == {"alone"}
