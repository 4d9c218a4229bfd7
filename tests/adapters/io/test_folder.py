"""Adapter folders: what is written comes back bit for bit, in PEFT too, and what is damaged is refused by name."""

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict, mixture_layers
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io import folder as folder_module
from malora_dist.adapters.io.folder import CONFIG, WEIGHTS, AdapterInfo, open_adapter, read_adapter_info, save_adapter
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.loading import load_adapter, put_adapter
from malora_dist.adapters.methods import METHODS, mixture_spec
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.errors import CheckpointError
from tests.checkpoint.samples import save
from tests.processes import start, wait
from tests.tiny_models import tiny_llama

IDS = torch.arange(40)[None] % 61
TARGETS = ("q_proj", "v_proj", "down_proj")
LAYER = "model.layers.1.mlp.down_proj"


def info_of(method: str) -> AdapterInfo:
    spec = mixture_spec(method, num_experts=4, r=3, lora_alpha=5.0, normalize_gates=True)
    return AdapterInfo(spec=spec, target_modules=TARGETS, base_model="some/base", lora_dropout=0.1)


def adapted(base: Any, info: AdapterInfo) -> Any:
    """The base with an adapter of which no tensor is zero."""
    options: dict[str, Any] = {"lora_dropout": info.lora_dropout, "seed": 5, "fuse_projections": False}
    inject_adapters(base, info.spec, info.target_modules, **options)
    for name, parameter in adapter_parameters(base):
        if name.endswith(".B"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return base.eval()


def saved(folder: Path, model: Any, info: AdapterInfo) -> dict[str, Tensor]:
    state = adapter_state_dict(model)
    save_adapter(folder, info, state, "# card\n")
    return state


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_onto_a_new_base(tmp_path: Path, method: str) -> None:
    info = info_of(method)
    model = adapted(tiny_llama(), info)
    state = saved(tmp_path / "new" / "adapter", model, info)
    other = tiny_llama()
    assert load_adapter(other, tmp_path / "new" / "adapter") == info == read_adapter_info(tmp_path / "new" / "adapter")
    loaded = adapter_state_dict(other)
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        assert not torch.allclose(other(IDS).logits, tiny_llama()(IDS).logits, atol=1e-2)
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.parametrize("method", ["malora", "dora"])
def test_nothing_is_initialised_and_everything_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    info = info_of(method)
    model = adapted(tiny_llama(), info)
    saved(tmp_path, model, info)
    monkeypatch.setattr(MixtureLinear, "reset_parameters", lambda *_: pytest.fail("initial values of what is loaded"))
    loaded, gathered = tiny_llama(), list[nn.Module]()

    @contextmanager
    def whole(module: nn.Module) -> Iterator[None]:
        gathered.append(module)
        yield

    torch.use_deterministic_algorithms(True)  # memory that nobody has written holds NaN
    try:
        assert torch.empty(1).isnan()
        put_adapter(loaded, open_adapter(tmp_path), whole)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))
    measured = {layer.base_layer for _, layer in mixture_layers(loaded) if layer.dora is not None}
    assert set(gathered) == measured and bool(measured) == (method == "dora")


def test_stock_lora_opens_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    info = info_of("lora")
    model = adapted(tiny_llama(), info)
    saved(tmp_path, model, info)
    with pytest.warns(UserWarning, match="malora"):  # PEFT says that it ignores our block of the config
        peft_model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["malora"] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def cut_in_half(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


KEY = f"base_model.model.{LAYER}.P"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (edit_weights(lambda t: t.pop(KEY)), [WEIGHTS, f"lacks {LAYER}.P", "1 missing, 0 unknown"]),
    "unknown tensor": (edit_weights(lambda t: t.update({f"{KEY}x": t[KEY].clone()})), [WEIGHTS, f"{LAYER}.Px"]),
    "wrong shape": (edit_weights(lambda t: t.update({KEY: t[KEY][:, :2].clone()})), [f"{LAYER}.P", "(4, 2,", "(4, 3,"]),
    "half the weights": (cut_in_half(WEIGHTS), [WEIGHTS]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "half the config": (cut_in_half(CONFIG), [CONFIG]),
    "no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{}"), [CONFIG]),
    "no block of ours": (lambda folder: (folder / CONFIG).write_text('{"r": 8}'), [CONFIG, "malora"]),
    "newer format": (edit_config(format_version=3), [CONFIG, "format_version 3"]),
    "newer method": (edit_config(method="newlora"), [CONFIG, "newlora"]),
    "no config": (lambda folder: (folder / CONFIG).unlink(), [CONFIG]),
    "no folder": (shutil.rmtree, ["adapter"]),
    "no folder but a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), ["adapter"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    info, folder = info_of("malora"), tmp_path / "adapter"
    saved(folder, adapted(tiny_llama(), info), info)
    hurt, words = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(tiny_llama(), folder)
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    info = info_of("malora")
    saved(tmp_path, adapted(tiny_llama(), info), info)
    other = tiny_llama(intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"has shape \(\d+, 80\), this base needs \(\d+, 96\)"):
        load_adapter(other, tmp_path)
    assert not dict(adapter_parameters(other))  # nothing half filled is left
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2.*\d+ missing, 0 unknown"):
        load_adapter(tiny_llama(num_hidden_layers=3), tmp_path)


def save_under_a_limit(folder: Path, numbers: int, characters: int) -> None:
    """Save an adapter of so many numbers and a card of so many characters where the kernel kills who writes 1 MiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    save_adapter(folder, info_of("malora"), {"layer.B": torch.ones(numbers)}, "x" * characters)


@pytest.mark.distributed
@pytest.mark.parametrize("numbers, characters", [(2**19, 1), (1, 2**21)], ids=[WEIGHTS, "README.md"])
def test_killed_while_writing_leaves_the_former_file_whole(
    tmp_path: Path, request: pytest.FixtureRequest, numbers: int, characters: int
) -> None:
    name, folder = request.node.callspec.id, tmp_path / "adapter"
    save_adapter(folder, info_of("malora"), {"layer.B": torch.arange(9.0)}, "# former card\n")
    former = (folder / name).read_bytes()
    log = tmp_path / "log"
    writer = start("tests.adapters.io.test_folder:save_under_a_limit", [folder, numbers, characters], log)
    assert wait([writer]) == [-signal.SIGXFSZ], log.read_text()
    assert (folder / name).read_bytes() == former
    save_adapter(folder, info_of("malora"), {"layer.B": torch.zeros(9)}, "# new card\n")
    assert (folder / name).read_bytes() != former


def test_a_kill_between_two_files_leaves_no_adapter_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without an adapter is that of its newest checkpoint."""
    run, model = tmp_path / "run", tiny_llama()
    state = saved(run / "adapter", adapted(model, info_of("lora")), info_of("lora"))
    save(CheckpointStore(run / "checkpoints"), 7)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for place, name in ((Path, "replace"), (folder_module, "write_text")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, killed)
            save_adapter(run / "adapter", info_of("lora"), {key: 1 + value for key, value in state.items()}, "# new\n")
        with pytest.raises(CheckpointError, match="step-000007/adapter_config.json"):
            open_adapter(run)
        save_adapter(run / "adapter", info_of("lora"), state, "# card\n")
        assert open_adapter(run).checkpoint is None


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    spec = mixture_spec("lora", r=2)
    info = AdapterInfo(spec=spec, target_modules=("q_proj",), base_model="base", lora_dropout=0.0)
    tmp_path.chmod(0o755)
    save_adapter(tmp_path, info, {"q_proj.A": torch.zeros(1, 2, 4), "q_proj.B": torch.zeros(1, 3, 2)}, "card")
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
