"""The `model` and `adapter` sections of a recipe: the frozen base and what is trained on it."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from malora_dist.adapters.methods import METHODS, Structure, unknown_method
from malora_dist.adapters.scaling import LORA, RSLORA
from malora_dist.adapters.target_names import compiled
from malora_dist.config.base import MOST, Rule, Section, usable_path
from malora_dist.config.dtypes import dtype_rule, long_name
from malora_dist.errors import short
from malora_dist.ops.choices import VARLEN

BASE_DTYPES = ("auto", "bfloat16", "float32")
# A comma after which no bracket is closed that was not opened.
OUTER_COMMA = re.compile(r",(?![^(\[{]*[)\]}])")


def _dtype_name(value: Any) -> Any:
    name = long_name(value)
    if name not in BASE_DTYPES:
        raise PydanticCustomError("dtype", dtype_rule(BASE_DTYPES))
    return name


def _split_targets(value: Any) -> Any:
    """`a,b` as a list, but no regular expression at the commas inside of its brackets."""
    return [part.strip() for part in OUTER_COMMA.split(value) if part.strip()] if isinstance(value, str) else value


class ModelConfig(Section):
    """The frozen base model."""

    aliases: ClassVar = {
        "base_model": "name_or_path",
        "model_name_or_path": "name_or_path",
        "pretrained_model_name_or_path": "name_or_path",
        "torch_dtype": "dtype",
        "load_4bit": "load_in_4bit",
        "quant_type": "bnb_4bit_quant_type",
        "double_quant": "bnb_4bit_use_double_quant",
    }

    name_or_path: Annotated[str, AfterValidator(usable_path)] = Field(
        min_length=1, description="Hub id, local folder, or .gguf file of a causal language model."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the hub id.")
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that the model's folder brings, with all rights that you have. Otherwise it is "
        "never run, and never asked about.",
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], BeforeValidator(_dtype_name)] = Field(
        "auto",
        description="Precision of the frozen base. auto: bfloat16 where the hardware multiplies it, else float32. "
        "Adapters are always float32.",
    )
    load_in_4bit: bool = Field(
        True, description="Quantise the base's linear layers to 4 bits (embeddings and head stay)."
    )
    bnb_4bit_quant_type: Literal["nf4"] = Field("nf4", description="4-bit code.")
    bnb_4bit_use_double_quant: bool = Field(
        False, description="Quantise the scales too: 4.13 instead of 4.5 bits a weight."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "varlen"] = Field(
        "auto",
        description="Attention of packed rows. varlen (PyTorch) and flash_attention_2 (the extra `gpu`) compute each "
        "sample alone, on a GPU in 16 bits; sdpa and eager take a mask. auto: one of the first two where they run, "
        "else sdpa.",
    )

    def rules(self) -> Iterator[Rule]:
        if self.attn_implementation in VARLEN and self.dtype == "float32":
            yield Rule(("attn_implementation", "dtype"), "needs model.dtype=bfloat16")

    def inapplicable_fields(self) -> dict[str, str]:
        if self.load_in_4bit:
            return {}
        reason = "has no meaning for model.load_in_4bit=false"
        return {"bnb_4bit_quant_type": reason, "bnb_4bit_use_double_quant": reason}


def _unused_keys(structure: Structure) -> list[str]:
    """Return the keys of `adapter` that nothing reads for a method of this structure."""
    keys = [] if structure.routed else ["num_experts"]
    keys += [] if structure.routed else ["router_dtype"]
    keys += [] if structure.shared_down else ["fuse_projections", "router_input", "task_conflict"]
    if not structure.sparse:
        keys += ["top_k", "normalize_gates", "router_aux_loss_coef", "router_aux_loss_reduction", "balance_scope"]
        keys += ["router_aux_loss_schedule", "router_aux_loss_ratio", "router_z_loss_coef"]
    return keys if structure.expert_down else [*keys, "shared_r", "compression_ratio", "beta"]


def _registered(method: str) -> str:
    problem = unknown_method(method)
    if problem is not None:
        raise PydanticCustomError("unknown_method", "{problem}", {"problem": problem})
    return method


class AdapterConfig(Section):
    """What is trained: the mixture of low-rank experts on each target linear."""

    aliases: ClassVar = {
        "rank": "r",
        "lora_r": "r",
        "lora_rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
        "lora_target_modules": "target_modules",
        "experts": "num_experts",
        "num_local_experts": "num_experts",
        "topk": "top_k",
        "num_experts_per_tok": "top_k",
        "norm_topk_prob": "normalize_gates",
        "aux_loss_coef": "router_aux_loss_coef",
        "moe_aux_loss_coef": "router_aux_loss_coef",
        "moe_z_loss_coeff": "router_z_loss_coef",
        "shared_rank": "shared_r",
        "fuse_siblings": "fuse_projections",
    }

    method: Annotated[str, AfterValidator(_registered)] = Field(
        "malora",
        description=" ".join(f"{name}: {structure.about}." for name, structure in METHODS.items()),
        json_schema_extra=lambda schema: schema.update(enum=list(METHODS)),
    )
    num_experts: int = Field(8, ge=1, le=MOST, description="Experts on each target linear, over all processes.")
    top_k: int = Field(2, ge=1, le=MOST, description="Experts a token is sent to.")
    r: int = Field(12, ge=1, le=MOST, description="Rank of one expert.")
    shared_r: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Rank of the shared down-projection; null: from compression_ratio (32 for 8 experts, r 12).",
    )
    compression_ratio: float = Field(
        0.5, gt=0, le=1, description="Lambda of the paper; sets shared_r = lambda / (2 - lambda) * num_experts * r."
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="The adapter's output is scaled by lora_alpha / r; null: 2 r."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r): PEFT's name of scaling: rslora.")
    scaling: Literal["lora", "rslora", "gate_norm", "gate_sum"] = Field(
        "lora",
        description="Rule of the output's scale. lora: lora_alpha / r. rslora: lora_alpha / sqrt(r). gate_norm and "
        "gate_sum: so that a mixture with a uniform router has the scale of a single LoRA, measured by its gradients "
        "(GOAT) or by its output. See docs/methods.md.",
    )
    beta: float = Field(
        1.0, gt=0, description="Initial balance of the shared and the experts' down-projections (malora)."
    )
    lora_dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout before the down-projection; the router sees all."
    )
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_split_targets)] = Field(
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Linear layers to adapt: last parts of their names, regular expressions that match whole names, or "
        "all-linear, which is all but the output head.",
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="Weight of the load-balancing loss.")
    router_aux_loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="How the balance losses of all routers become one."
    )
    router_aux_loss_schedule: Literal["constant", "linear", "until"] = Field(
        "constant",
        description="The load-balancing loss's weight over the run. linear: falls to 0 over router_aux_loss_ratio of "
        "the steps. until: 0 after them.",
    )
    router_aux_loss_ratio: float = Field(
        0.1, gt=0, le=1, description="Share of all steps with a load-balancing loss, for schedules but constant."
    )
    router_z_loss_coef: float = Field(
        0.0, ge=0, description="Weight of the z-loss, the mean square of the log of a router's sum of exponentials."
    )
    balance_scope: Literal["global", "local"] = Field(
        "global",
        description="Balance experts over all tokens of an optimizer step, or over those of each micro-batch on each "
        "process; the latter depends on how samples are dealt.",
    )
    task_conflict: Literal["none", "project"] = Field(
        "none",
        description="Gradients of S_A by task. none: they are added up. project: first each loses its parts against "
        "those of other tasks (Ortho-LoRA).",
    )
    normalize_gates: bool = Field(False, description="Scale a token's chosen gates to sum to 1.")
    router_input: Literal["x", "h"] = Field(
        "x",
        description="What routers read. x: the layer's input. h: S_A drop(x), as the experts, which drops a product as "
        "wide as the input and num_experts numbers for each input.",
    )
    router_dtype: Literal["float32", "input"] = Field(
        "float32", description="Precision of the routers' products. input: that of what they read."
    )
    computation: Literal["auto", "dense", "grouped", "grouped_triton"] = Field(
        "auto",
        description="All experts with masked gates, or rows grouped by expert, with the same result. grouped_triton: "
        "grouped by Triton kernels, not yet run on a GPU. auto: the cheaper by counting; on a GPU never grouped, which "
        "makes the host wait.",
    )
    fuse_projections: bool = Field(
        True, description="One product for S_A and routers of linears that read one tensor (q, k, v; gate, up)."
    )

    def rules(self) -> Iterator[Rule]:
        structure = METHODS[self.method]
        if not structure.routed and self.scaling not in (LORA, RSLORA):
            yield Rule(("scaling", "method"), f"has no meaning for adapter.method={self.method}, which has no gates")
        if self.use_rslora and self.scaling not in (LORA, RSLORA):
            yield Rule(("scaling", "use_rslora"), "contradicts adapter.use_rslora=true, which is scaling: rslora")
        if structure.sparse and self.top_k > self.num_experts:
            yield Rule(("top_k", "num_experts"), f"must be at most adapter.num_experts={self.num_experts}")
        if structure.expert_down and self.shared_r is not None and self.shared_r < self.r:
            yield Rule(("shared_r", "r"), f"must be at least adapter.r={self.r}")
        if len(set(self.target_modules)) < len(self.target_modules):
            yield Rule(("target_modules",), "must not name a module twice")
        if any(not name.strip() for name in self.target_modules):
            yield Rule(("target_modules",), "must not hold an empty name")
        for name in self.target_modules:
            try:
                compiled(name)
            except ValueError as error:
                yield Rule(("target_modules",), f"{short(name)} is no regular expression: {error}")

    def inapplicable_fields(self) -> dict[str, str]:
        keys = _unused_keys(METHODS[self.method])
        reasons = {key: f"has no meaning for adapter.method={self.method}" for key in keys}
        if self.router_aux_loss_schedule == "constant":
            reasons.setdefault("router_aux_loss_ratio", "has no meaning for adapter.router_aux_loss_schedule=constant")
        return reasons
