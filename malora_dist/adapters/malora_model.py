"""`get_malora_model`: a model that keeps its class and gets the methods PEFT's users know.

The model is adapted in place and stays what it is, a `LlamaForCausalLM`; its class becomes a subclass of both that and
`MaloraModel`, as PyTorch's `fully_shard` does it. A wrapper around it would be no `PreTrainedModel`: Trainer would then
save a bare state dict, and `generate`, `gradient_checkpointing_enable`, `device_map` and what asks for a model's class,
config or the signature of its forward would each need forwarding.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from malora_dist.adapters.adapted_layers import adapter_parameters, count_base_parameters, mixture_layers
from malora_dist.adapters.aux_loss import argument, aux_loss, keeping_routings, weight_of_batch, with_loss
from malora_dist.adapters.inject import remove_adapters
from malora_dist.adapters.malora_config import MaloraConfig
from malora_dist.adapters.merge import check_mergeable, merge_layers
from malora_dist.adapters.model_files import load_into, load_named_adapter, save_named_adapters
from malora_dist.adapters.named_adapters import NamedAdapters
from malora_dist.adapters.recompute import is_recomputing
from malora_dist.adapters.router_config import announce, router_logits_asked, show_aux_loss
from malora_dist.adapters.saving import check_arguments
from malora_dist.errors import ConfigError

AnyPath = str | os.PathLike[str]


class MaloraModel(nn.Module):
    """A model with adapters, made by `get_malora_model`, with the methods of PEFT's `PeftModel`.

    Its class is a subclass of the model's own class too.

    In training, the loss that the model returns holds the balance loss of the active adapter's routers, times
    `router_aux_loss_coef`; tokens where `attention_mask` is 0 do not count. In evaluation it is the model's alone.
    """

    base_class: type[nn.Module]
    saves_adapters = True
    malora_adapters: NamedAdapters

    # ------------------------------------------------------------------------------------------------ what is there

    @property
    def malora_config(self) -> dict[str, MaloraConfig]:
        """Return the config of each adapter by its name."""
        return dict(self.malora_adapters.configs)

    @property
    def active_adapter(self) -> str:
        """Return the name of the active adapter."""
        return self.malora_adapters.active

    @property
    def active_adapters(self) -> list[str]:
        """Return a list of the active adapter, as PEFT does."""
        return [self.active_adapter]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trained weights and of all weights, 4-bit ones by the weights they stand for."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        adapters = sum(p.numel() for _, p in adapter_parameters(self))
        return trainable, count_base_parameters(self) + adapters

    def print_trainable_parameters(self) -> None:
        """Print how many weights are trained, in PEFT's form."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # ------------------------------------------------------------------------------------------------- many adapters

    def add_adapter(self, adapter_name: str, config: MaloraConfig) -> None:
        """Add a new adapter, which `set_adapter` makes the active one."""
        former = self.active_adapter
        self.malora_adapters.add(self, adapter_name, config)
        self.set_adapter(former)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one. Raises ConfigError if there is none of this name."""
        self.malora_adapters.activate(self, adapter_name)
        announce(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, but not the only one."""
        self.malora_adapters.delete(self, adapter_name)
        announce(self)

    def load_adapter(
        self, model_id: AnyPath, adapter_name: str = "default", is_trainable: bool = False, revision: str | None = None
    ) -> Any:
        """Read an adapter of a folder or hub id, ours or a LoRA or DoRA of PEFT, under a name.

        An adapter of this name gets the values, a new one is added and not made active. Without `is_trainable` it is
        frozen and the model put in evaluation mode.

        Returns:
            `missing_keys` and `unexpected_keys`, as PEFT does; both are empty, as other files are refused.

        Raises:
            CheckpointError: it is damaged or of another base, or lacks a tensor or has one too many; nothing changes.
        """
        load_named_adapter(self, model_id, adapter_name, is_trainable, revision)
        announce(self)
        return _IncompatibleKeys([], [])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable the adapters within the block, so that the model computes as its base."""
        before = {layer: layer.adapter_enabled for _, layer in mixture_layers(self)}
        try:
            self.disable_adapters()
            yield
        finally:
            for layer, enabled in before.items():
                layer.adapter_enabled = enabled

    def disable_adapters(self) -> None:
        """Disable the adapters until `enable_adapters` is called."""
        for _, layer in mixture_layers(self):
            layer.adapter_enabled, layer.routing, layer.routings = False, None, None

    def enable_adapters(self) -> None:
        """Enable the active adapter again."""
        for _, layer in mixture_layers(self):
            layer.adapter_enabled = True

    # --------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: AnyPath,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
    ) -> "MaloraModel":
        """Put the adapter of a folder or hub id on a base model, in place. As `load_adapter` otherwise."""
        return _become(model, lambda adapted: adapted.load_adapter(model_id, adapter_name, is_trainable, revision))

    def save_pretrained(
        self,
        save_directory: AnyPath,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        selected_adapters: list[str] | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write the adapters: `default` into the folder itself, others into folders of their names in it.

        Args:
            save_directory: folder to write to.
            is_main_process: whether this process writes; others do nothing.
            state_dict: gathered values by parameter name, for a model whose parameters are sharded.
            selected_adapters: names of the adapters to write; None: all.
            push_to_hub: is refused; `huggingface_hub.upload_folder` uploads what was written.
            others: arguments of transformers and PEFT without a meaning here, such as `max_shard_size`.

        Raises:
            ConfigError: for a name that no adapter has, and for `push_to_hub`; nothing is written.
            TypeError: for an argument that transformers and PEFT do not have either.
        """
        check_arguments(push_to_hub, others)
        if is_main_process:
            save_named_adapters(self, save_directory, state_dict, selected_adapters)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the model, or the tensors of an adapter's file into the active adapter.

        Returns:
            `missing_keys` and `unexpected_keys`, as PyTorch does.

        Raises:
            CheckpointError: an adapter's file lacks a tensor of the adapter or, with `strict`, has one too many.
        """
        found = load_into(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign) if found is None else found

    # ------------------------------------------------------------------------------------------------------- the end

    def unload(self) -> nn.Module:
        """Remove all adapters and return the base model, as `get_malora_model` was given it."""
        trained = self.malora_adapters.trained
        remove_adapters(self)
        for name in trained:
            self.get_parameter(name).requires_grad_(True)
        announce(self, off=True)
        del self.malora_adapters
        self.__class__ = self.base_class  # type: ignore[assignment]
        return self

    def merge_and_unload(self) -> nn.Module:
        """Add the active adapter into the base's weights, rounded to their dtype, and take all adapters off.

        That can be done with one expert: `lora`, `dora`, and any method with num_experts=1. Raises ConfigError for
        more experts, whose sum is another for each token, for a base that is quantised, tied or not in memory, and
        for a sum that is not finite in the base's dtype; the model is then as it was.
        """
        layers = dict(mixture_layers(self))
        check_mergeable(self, layers)
        merge_layers(layers)
        return self.unload()

    # ---------------------------------------------------------------------------------------------------- as a module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_recomputing() or not hasattr(self, "malora_adapters"):
            return super().__call__(*args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            # transformers would ignore it.
            raise ConfigError("adapter_names: one adapter is active at a time, for all rows; set_adapter chooses it")
        coefficient = self.malora_adapters.config.router_aux_loss_coef
        has_graph = self.training and torch.is_grad_enabled()
        trains = has_graph and coefficient > 0
        with router_logits_asked(self, kwargs) as asked:
            with keeping_routings(self) if has_graph or asked else nullcontext():
                outputs = super().__call__(*args, **kwargs)
        if not (trains or asked):
            return outputs
        loss = aux_loss(self, argument(self, "attention_mask", args, kwargs))
        labels = argument(self, "labels", args, kwargs)
        if trains:
            added = coefficient * weight_of_batch(self, kwargs, labels) * loss
            outputs = with_loss(outputs, added, labels is not None)
        if asked:
            show_aux_loss(self, outputs, loss, coefficient)
        return outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaloraModel":
        super()._apply(fn, recurse)
        if recurse and "malora_adapters" in self.__dict__:
            for layer in self.malora_adapters.parked_layers():
                layer._apply(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of an adapted model has no name by which pickle could find it.
        return _empty, (self.base_class,), self.__getstate__()


def get_malora_model(model: nn.Module, config: MaloraConfig, adapter_name: str = "default") -> MaloraModel:
    """Freeze a model and put adapters on it, in place; return the same object with the methods of `MaloraModel`.

    Args:
        model: any nn.Module; one of transformers as it was loaded: fp32 or bf16, in 4 or 8 bits by bitsandbytes, with a
            device_map.
        config: what to put where.
        adapter_name: of this adapter, where there will be several.

    Raises:
        ConfigError: if the targets match nothing, match what is no linear, or the model has adapters already.
    """
    if isinstance(model, MaloraModel):
        raise ConfigError(
            f"the model has the adapters {', '.join(model.malora_adapters.configs)}: add_adapter adds another, unload "
            "takes them off"
        )
    return _become(model, lambda adapted: adapted.malora_adapters.add(adapted, adapter_name, config))


def _become(model: nn.Module, put: Callable[[MaloraModel], object]) -> MaloraModel:
    """Make a MaloraModel of a model and put its first adapter on it; what fails leaves it as it was."""
    if isinstance(model, MaloraModel):
        put(model)
        return model
    kind = type(model)
    adapted: Any = model
    adapted.__class__ = _adapted_class(kind)
    adapted.malora_adapters = NamedAdapters()
    try:
        put(adapted)
    except BaseException:
        del adapted.malora_adapters
        adapted.__class__ = kind
        raise
    announce(adapted)
    return adapted  # type: ignore[no-any-return]


def _adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class that is `kind` and MaloraModel, under the name of `kind`."""
    own: dict[str, Any] = {"base_class": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if hasattr(kind, "from_pretrained"):
        # Of the class, not of an adapter.
        own["from_pretrained"] = kind.from_pretrained
    return type(kind.__name__, (MaloraModel, kind), own)


def _empty(kind: type[nn.Module]) -> nn.Module:
    adapted = _adapted_class(kind)
    return adapted.__new__(adapted)
