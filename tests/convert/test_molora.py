"""molora out of what shares a down-projection: the same function."""

from pathlib import Path

import pytest
import torch

from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.loading import load_adapter
from tests.convert.made import base, logits, run_kind, token_rows


@pytest.mark.parametrize("method", ["malora", "hydralora"])
def test_same_logits_and_the_product_rounded_once(workspace: Path, tmp_path: Path, method: str) -> None:
    source = workspace / "runs" / method
    said = run_kind("molora", source, tmp_path / "out", verify=True)
    assert said[0].startswith("verified max |d logits|")
    old, new = open_adapter(source), open_adapter(tmp_path / "out")
    assert (new.info.spec.method, new.info.spec.shared_r) == ("molora", None)
    assert new.info.spec.scaling == old.info.spec.scaling and new.info.spec.r == old.info.spec.r
    for layer in old.layers():
        factors, own = old.read_layer(layer), new.read_layer(layer)
        products = factors["shared_A"].double().expand(4, -1, -1)
        if method == "malora":
            products = factors["P"].double() @ products
        assert torch.equal(own["A"], products.float())
        gate = factors["gate"]
        if old.info.spec.router_input == "h":
            gate = (gate.double() @ factors["shared_A"].double()).float()
        assert torch.equal(own["B"], factors["B"]) and torch.equal(own["gate"], gate)
    one, other, plain = base(workspace), base(workspace), base(workspace)
    load_adapter(one, source)
    load_adapter(other, tmp_path / "out")
    rows = token_rows()
    torch.testing.assert_close(logits(other, rows), logits(one, rows), atol=5e-5, rtol=0)
    assert (logits(one, rows) - logits(plain, rows)).abs().max() > 0.5, "the adapter says something"
