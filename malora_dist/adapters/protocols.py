"""What an adapted linear needs of those it works with: linears of the same input, and who brings tokens to experts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from malora_dist.ops.routing import Routing

if TYPE_CHECKING:
    from malora_dist.adapters.layer import MixtureLinear

AddExperts = Callable[[Tensor], Tensor]


class ProjectedInput(NamedTuple):
    """A layer's input (T, I) as its base must read it, h (T, D) for the experts, and the routing.

    `after_A`: h (T, E*R) has passed the experts' own A already.
    """

    x_TI: Tensor
    h: Tensor
    routing: Routing | None
    after_A: bool = False


class EntersTogether(Protocol):
    """Linears that read one tensor."""

    def project(self, layer: "MixtureLinear", x: Tensor) -> ProjectedInput:
        """What `layer` makes of its input (..., I) before its experts."""


class Dispatcher(Protocol):
    """How the tokens of a layer reach their experts."""

    def start(self, layer: "MixtureLinear", x: Tensor) -> tuple[Tensor, AddExperts]:
        """Begin with the layer's input (..., I): what the base layer must read (T, I), and what turns its output (T, O)
        into the layer's output."""
