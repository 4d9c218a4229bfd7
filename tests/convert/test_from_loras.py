"""Several LoRAs as the experts of one mixture: exact where the rank allows it, the best there is where it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.io.peft import open_peft
from malora_dist.adapters.loading import load_adapter
from malora_dist.convert.gates import constant_gates
from malora_dist.convert.gather_loras import fill_new_ranks, resized, shared_subspace, squared_error
from malora_dist.convert.job import convert
from malora_dist.convert.kinds import ConvertOptions
from malora_dist.errors import CheckpointError, ConfigError
from tests.convert.made import base, logits, run_kind, token_rows
from tests.convert.test_peft import stock

RANKS, O, I = (3, 2, 4), 11, 17  # noqa: E741


def pairs(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(O, r, generator=g).double(), (number + 1) * torch.randn(r, I, generator=g).double())
        for number, r in enumerate(RANKS)
    ]


def products(S_DI: Tensor, P_ERD: Tensor, given: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [B_OR @ P_RD @ S_DI for (B_OR, _), P_RD in zip(given, P_ERD, strict=True)]


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("d", [9, 12, 17])
def test_exact_once_the_subspace_holds_all_ranks(d: int, beta: float) -> None:
    equal = [resized(pair, 4) for pair in pairs()]
    S_DI, P_ERD = shared_subspace(equal, d, beta, torch.Generator().manual_seed(1))
    torch.testing.assert_close(S_DI @ S_DI.T, beta**2 * torch.eye(d).double())
    for (B_OR, A_RI), product in zip(pairs(), products(S_DI, P_ERD, equal), strict=True):
        torch.testing.assert_close(product, B_OR @ A_RI)


def test_best_subspace_of_all_where_it_does_not() -> None:
    """The error is the tail of the singular values of all B_i A_i behind one another, which nothing can beat."""
    for d in range(4, 9):
        equal = [resized(pair, 4) for pair in pairs()]
        S_DI, P_ERD = shared_subspace(equal, d, 2.0, torch.Generator())
        errors = [
            (old[0] @ old[1] - product).square().sum()
            for old, product in zip(pairs(), products(S_DI, P_ERD, equal), strict=True)
        ]
        tail = torch.linalg.svdvals(torch.cat([B_OR @ A_RI for B_OR, A_RI in pairs()]))[d:].square().sum()
        torch.testing.assert_close(sum(errors), tail, rtol=1e-9, atol=1e-12)
        assert tail > 0.1 * (d < 8)


def test_truncation_is_the_nearest_product_and_its_error_is_measured() -> None:
    for old in pairs():
        product = old[0] @ old[1]
        B_OR, A_RI = new = resized(old, 2)
        U, sigma, Vh = torch.linalg.svd(product)
        torch.testing.assert_close(B_OR @ A_RI, U[:, :2] * sigma[:2] @ Vh[:2])
        error, size = squared_error(old, new)
        assert error == pytest.approx(float((product - B_OR @ A_RI).square().sum()), rel=1e-9, abs=1e-20)
        assert size == pytest.approx(float(product.square().sum()))


def test_new_ranks_add_nothing_but_can_learn() -> None:
    B_OR, A_RI = resized(pairs()[1], 4)
    assert not B_OR[:, 2:].any() and not A_RI[2:].any()
    down_ERD = torch.stack([A_RI, A_RI])
    fill_new_ranks(down_ERD, [2, 4], 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(down_ERD[0, :2], A_RI[:2]) and torch.equal(down_ERD[1], A_RI)
    assert down_ERD[0, 2:].all() and down_ERD[0, 2:].abs().max() <= 2 / I**0.5


@pytest.fixture(scope="module")
def loras(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three PEFT LoRAs on one base: other ranks, another scaling, and one that leaves a linear alone."""
    folder = tmp_path_factory.mktemp("loras")
    stock(workspace, folder / "a", r=3, lora_alpha=5)
    stock(workspace, folder / "b", r=2, lora_alpha=8, use_rslora=True)
    stock(workspace, folder / "c", r=4, lora_alpha=4, target_modules=["q_proj"])
    return folder / "a", folder / "b", folder / "c"


def mix(kind: str, sources: tuple[Path, ...], target: Path, **options: Any) -> list[str]:
    said: list[str] = []
    convert(kind, sources, target, ConvertOptions(**options), said.append)
    return said


@pytest.mark.parametrize(("kind", "options"), [("malora", {"shared_r": 9, "beta": 0.5}), ("molora", {"top_k": 3})])
def test_each_expert_is_its_lora(
    workspace: Path, loras: tuple[Path, ...], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A frog and a princess walked to the river. " * 9)
    said = mix(kind, loras, tmp_path / "mixed", verify=True, text=text, **options)
    assert (
        sum(line.endswith("(exact)") for line in said) == 4
        and sum(line.startswith("verified expert") for line in said) == 3
    )
    assert any("router is untrained" in line and "normalize_gates is true" in line for line in said)
    info = open_adapter(tmp_path / "mixed").info
    assert (info.spec.method, info.spec.num_experts, info.spec.r, info.spec.scaling) == (kind, 3, 4, 1.0)
    assert info.spec.normalize_gates and info.spec.top_k == options.get("top_k", 2)
    rows, mixed = token_rows(), base(workspace)
    load_adapter(mixed, tmp_path / "mixed")
    for number, source in enumerate(loras):
        run_kind("from-peft", source, tmp_path / f"ours{number}")
        alone = base(workspace)
        load_adapter(alone, tmp_path / f"ours{number}")
        one_hot = dict.fromkeys(open_adapter(tmp_path / "mixed").layers(), torch.eye(3)[number])
        with constant_gates(mixed, one_hot):
            torch.testing.assert_close(logits(mixed, rows), logits(alone, rows), atol=2e-5, rtol=1e-4)


def test_too_little_rank_says_how_much_is_lost(loras: tuple[Path, ...], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A frog and a princess walked to the river. " * 9)
    said = mix("malora", loras, tmp_path / "mixed", r=2, shared_r=3, verify=True, text=text)
    errors = [float(line.split()[-1]) for line in said if "relative error" in line]
    assert len(errors) == 4 and all(0.01 < error < 1 for error in errors), said
    assert sum("by the errors above" in line for line in said) == 3


def test_a_common_scaling_leaves_B_as_it_is(workspace: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        stock(workspace, tmp_path / name, lora_alpha=7)
    mix("molora", (tmp_path / "a", tmp_path / "b"), tmp_path / "mixed")
    mixed, first = open_adapter(tmp_path / "mixed"), open_peft(tmp_path / "a")
    assert mixed.info.spec.lora_alpha == 7 and mixed.info.target_modules == first.info.target_modules
    for layer in first.layers():
        assert torch.equal(mixed.read(f"{layer}.B")[0], first.read(f"{layer}.B")[0])
        assert torch.equal(mixed.read(f"{layer}.A")[0], first.read(f"{layer}.A")[0])
        gate = mixed.read(f"{layer}.gate")
        assert gate.any(dim=1).all() and not torch.equal(gate[0], gate[1])


def test_what_cannot_be_mixed(workspace: Path, loras: tuple[Path, ...], tmp_path: Path) -> None:
    stock(workspace, tmp_path / "dora", use_dora=True)
    target = tmp_path / "mixed"
    with pytest.raises(CheckpointError, match="is a dora adapter; a mixture is made of plain LoRAs"):
        mix("malora", (loras[0], tmp_path / "dora"), target)
    with pytest.raises(CheckpointError, match="is a molora adapter; a mixture"):
        mix("malora", (loras[0], workspace / "runs" / "molora"), target)
    with pytest.raises(ConfigError, match="give two SRC or more"):
        mix("malora", loras[:1], target)
    with pytest.raises(ConfigError, match="--shared-r 3 must be at least 4"):
        mix("malora", loras, target, shared_r=3)
    with pytest.raises(ConfigError, match=f"--top-k 9 must be at most {len(loras)}, the number of SRC"):
        mix("malora", loras, target, top_k=9)
    with pytest.raises(ConfigError, match="--shared-r 1000 must be at most"):
        mix("malora", loras, target, shared_r=1000)
    with pytest.raises(ConfigError, match="--beta has no effect with --to molora; it is an option of --to malora"):
        mix("molora", loras, target, beta=2.0)
    with pytest.raises(ConfigError, match="--r and --top-k are for a mixture of several SRC"):
        mix("molora", (workspace / "runs" / "malora",), target, r=2)
    other = stock(workspace, tmp_path / "other")
    other.peft_config["default"].base_model_name_or_path = "another/base"
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="name the bases .*another/base; if they are one"):
        mix("malora", (loras[0], tmp_path / "other"), target)
    mix("malora", (loras[0], tmp_path / "other"), target, base=str(workspace / "model"))
    assert open_adapter(target).info.base_model == str(workspace / "model")
