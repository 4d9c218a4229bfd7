"""Shapes of models whose layout is not known by heart: read off the model without weights that transformers builds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from malora_dist.errors import ConfigError, short
from malora_dist.models.config import check_family
from malora_dist.plan.shapes import LAYOUTS, Linear, ModelShape

# By these names configurations count a layer's experts, and those that a token goes through.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class FamilyShape(ModelShape):
    """A model of any family: its linears by kind, and all else by length, as they were counted.

    What a block computes beside them is counted as in a Llama.
    """

    kinds: tuple[Linear, ...]
    lengths: tuple[tuple[int, int], ...]
    embedding: int
    parameters: int
    expert_products: int

    @property
    def is_known_by_block(self) -> bool:
        """What a block keeps beside its linears is counted as a Llama's."""
        return False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The kinds of linears of the whole model, without the head."""
        return self.kinds

    @property
    def others(self) -> tuple[tuple[int, int], ...]:
        """Length and number of what is neither a linear's weight nor embedding nor head."""
        return self.lengths

    @property
    def expert_multiplications(self) -> int:
        """Multiplications of a token in the experts that a model keeps as one parameter."""
        return self.expert_products

    @property
    def embedding_numel(self) -> int:
        """Weights of the embedding."""
        return self.embedding

    @property
    def num_parameters(self) -> int:
        """All weights of the base model."""
        return self.parameters


def family_shape(config: Mapping[str, Any], source: str) -> FamilyShape:
    """Read the shape in a config.json of any causal language model of transformers.

    Raises ConfigError for a type that transformers does not have, and where torch or transformers is missing.
    """
    model = _empty_model(config, source)
    text = model.config.get_text_config()
    hidden, heads = _number(text, "hidden_size", 1), _number(text, "num_attention_heads", 1)
    embedding, head = model.get_input_embeddings().weight, _head_weight(model)
    kinds, weights = _kinds(model)
    counted = weights | {id(embedding)}
    if head is not None and head.numel() == embedding.numel():
        counted.add(id(head))
    lengths = Counter(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
    return FamilyShape(
        source=source,
        hidden_size=hidden,
        intermediate_size=_number(text, "intermediate_size", 4 * hidden),
        num_layers=_number(text, "num_hidden_layers", 1),
        num_heads=heads,
        num_kv_heads=_number(text, "num_key_value_heads", heads),
        head_dim=_number(text, "head_dim", max(1, hidden // heads)),
        vocab_size=embedding.shape[0],
        tied_head=head is None or id(head) == id(embedding) or id(head) not in counted,
        kinds=kinds,
        lengths=tuple(lengths.items()),
        embedding=embedding.numel(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        expert_products=_expert_products(model, text),
    )


def _empty_model(config: Mapping[str, Any], source: str) -> Any:
    try:
        import torch
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"{source}: the shapes of model_type={short(config.get('model_type'))} are read off the model that "
            f"transformers builds, but {error}. Without torch and transformers the plan knows {', '.join(LAYOUTS)}"
        ) from error
    check_family(config, source)
    try:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except Exception as error:  # code of some 200 families, for numbers that nobody has tried together
        raise ConfigError(f"{source}: transformers cannot build this model: {error}") from error


def _kinds(model: Any) -> tuple[tuple[Linear, ...], set[int]]:
    """Return the linears by name and size, without the head, and the ids of the parameters that are their weights."""
    from malora_dist.adapters.text_linears import idle_linears
    from malora_dist.models.linears import linear_sizes, output_head

    head, weights, idle = output_head(model), set[int](), idle_linears(model) or ()
    names: dict[tuple[str, int, int, bool, bool], list[str]] = {}
    first_of = Counter[tuple[str, int, int, bool, bool]]()
    for name, module in model.named_modules():
        sizes = linear_sizes(module)
        if sizes is not None and module is not head:
            kind = (name.rpartition(".")[2], *sizes, module.bias is not None, name not in idle)
            names.setdefault(kind, []).append(name)
            first_of[kind] += id(module.weight) not in weights
            weights.add(id(module.weight))
    linears = [Linear(*kind[:4], tuple(found), kind[4], first_of[kind]) for kind, found in names.items()]
    return tuple(linears), weights


def _head_weight(model: Any) -> Any:
    from malora_dist.models.linears import output_head

    return getattr(output_head(model), "weight", None)


def _expert_products(model: Any, text: Any) -> int:
    """Count a token's multiplications in experts kept as one parameter: the chosen ones' part of each layer's."""
    from malora_dist.adapters.targets import fused_experts

    settings = getattr(text, "ffn_config", text)
    chosen = max(_number(settings, name, 0) for name in CHOSEN)
    products = 0
    for shape in (model.get_parameter(name).shape for name in fused_experts(model)):
        experts = shape[0] if len(shape) == 3 else max(_number(settings, name, 1) for name in EXPERTS)
        products += shape.numel() // experts * min(chosen or experts, experts)
    return products


def _number(config: Any, name: str, default: int) -> int:
    """Read a number of a configuration; the largest where it has one for each layer."""
    value = getattr(config, name, None)
    value = max(value, default=None) if isinstance(value, list | tuple) else value
    return value if isinstance(value, int) and value > 0 else default
