"""An adapted layer of any method of the family in one form: delta_t = s * B_t P_t S, with one S for all experts.

    malora      S = S_A (D, I), P_t as trained
    hydralora   S = S_A (R, I), P_t = the identity
    molora      S = all A_t behind one another (E R, I), P_t = the rows of the identity that pick A_t
    lora        molora with one expert

Everything a static LoRA can say of a mixture it says in S: only the (O, D) matrix before it is to be found.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.adapters.methods import MixtureSpec


@dataclass(frozen=True)
class Subspace:
    """S (D, I), P (E, R, D) and B (E, O, R) of one layer, fp64."""

    S_DI: Tensor
    P_ERD: Tensor
    B_EOR: Tensor

    def downs(self) -> Tensor:
        """Compute A_t = P_t S, (E, R, I)."""
        return self.P_ERD @ self.S_DI


def subspace_of(factors: Mapping[str, Tensor]) -> Subspace:
    """Convert a layer's factors, as `AdapterTensors.read_layer` returns them, to a `Subspace` in fp64."""
    wide = {name: factors[name].double() for name in ("shared_A", "P", "A", "B") if name in factors}
    B_EOR = wide["B"]
    E, _, R = B_EOR.shape
    if "shared_A" not in wide:
        picks = torch.eye(E * R, dtype=torch.float64).view(E, R, E * R)
        return Subspace(wide["A"].flatten(0, 1), picks, B_EOR)
    identity = torch.eye(R, dtype=torch.float64).expand(E, R, R)
    return Subspace(wide["shared_A"], wide.get("P", identity), B_EOR)


def outer_gate(factors: Mapping[str, Tensor], spec: MixtureSpec) -> Tensor:
    """Return the router that reads x, (E, I): W_g, or W_g S_A in fp64 of one that reads h = S_A x."""
    if spec.router_input == "x":
        return factors["gate"]
    return factors["gate"].double() @ factors["shared_A"].double()


def down_shape(factors: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the shape (D, I) of S from the shapes of a layer's factors."""
    if "shared_A" in factors:
        D, inputs = factors["shared_A"]
        return D, inputs
    E, R, inputs = factors["A"]
    return E * R, inputs
