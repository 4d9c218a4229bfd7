"""How an adapted model says that it has a balance loss: as transformers' mixtures of experts do.

Their config has `output_router_logits` and `router_aux_loss_coef`; who sets the former, there or in a call, finds
`aux_loss` in the outputs. TRL's trainers, which compute the loss themselves, ask so.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

ASKED, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"


def announce(model: Any, off: bool = False) -> None:
    """Set the active adapter's balance loss in the model's config; with `off` leave only what the base has there."""
    config, adapters = _text_config(model), model.malora_adapters
    if config is None:
        return
    if adapters.announced:
        delattr(config, ASKED)
        delattr(config, COEFFICIENT)
        adapters.announced = False
    structure, coefficient = adapters.config.spec.structure, adapters.config.router_aux_loss_coef
    has_loss = structure.routed and not structure.dense and coefficient > 0
    if has_loss and not off and not hasattr(config, ASKED) and not hasattr(config, COEFFICIENT):
        setattr(config, ASKED, False)
        setattr(config, COEFFICIENT, coefficient)
        adapters.announced = True


@contextmanager
def router_logits_asked(model: Any, kwargs: dict[str, Any]) -> Iterator[bool]:
    """Yield whether a call asks for the balance loss; a base that has none itself is not asked for it meanwhile."""
    config = _text_config(model)
    asked = kwargs.get(ASKED)
    asked = getattr(config, ASKED, False) if asked is None else asked
    if config is None or not model.malora_adapters.announced:
        yield bool(asked)
        return
    kwargs.pop(ASKED, None)
    before = getattr(config, ASKED)
    setattr(config, ASKED, False)
    try:
        yield bool(asked)
    finally:
        setattr(config, ASKED, before)


def show_aux_loss(model: Any, outputs: Any, loss: Tensor, coefficient: float) -> None:
    """Put the balance loss into the outputs, so that times the config's coefficient it is what is trained on.

    A base that is a mixture itself has one of its own there, with its own coefficient.
    """
    if not isinstance(outputs, Mapping):
        return
    own, announced = outputs.get("aux_loss"), getattr(_text_config(model), COEFFICIENT, 0)
    if not announced:
        return
    scaled = loss * (coefficient / announced)
    outputs["aux_loss"] = scaled if own is None else own + scaled.to(own.device)  # type: ignore[index]


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return find() if callable(find) else None
