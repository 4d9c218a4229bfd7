"""The `model` and `adapter` sections of a recipe: the frozen base and what is trained on it."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from malora_dist.adapters.methods import METHODS, Structure, default_shared_r, unknown_method
from malora_dist.adapters.scaling import LORA, RSLORA
from malora_dist.adapters.target_names import DEFAULT_TARGETS, compiled
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
    """Split `a,b` into a list, but no regular expression at the commas inside of its brackets."""
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
        description="Run the Python code in the model's folder, with all of your permissions. If false, such code is "
        "never run and you are not asked.",
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], BeforeValidator(_dtype_name)] = Field(
        "auto",
        description="Dtype of the frozen base. auto: bfloat16 where the hardware supports bfloat16 matrix products, "
        "else float32. Adapters are always float32.",
    )
    load_in_4bit: bool = Field(
        True, description="Quantise the base's linear layers to 4 bits; embeddings and output head are not quantised."
    )
    bnb_4bit_quant_type: Literal["nf4"] = Field("nf4", description="4-bit data type.")
    bnb_4bit_use_double_quant: bool = Field(
        False, description="Quantise the scales (absmax) too: 4.13 instead of 4.5 bits per weight."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "varlen"] = Field(
        "auto",
        description="Attention implementation for packed samples. varlen (PyTorch) and flash_attention_2 (the extra "
        "`gpu`) attend within each sample without a mask and need a GPU and a 16-bit dtype; sdpa and eager use a "
        "block-diagonal mask. auto: varlen or flash_attention_2 where one of them runs, else sdpa.",
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
    num_experts: int = Field(
        8, ge=1, le=MOST, description="Number of experts of each target linear, across all processes."
    )
    top_k: int = Field(2, ge=1, le=MOST, description="Number of experts selected for each token.")
    r: int = Field(12, ge=1, le=MOST, description="Rank of each expert.")
    shared_r: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Rank of the shared down-projection S_A; null: derived from compression_ratio (32 for 8 experts "
        "and r=12).",
    )
    compression_ratio: float = Field(
        0.5, gt=0, le=1, description="Lambda of the paper: shared_r = lambda / (2 - lambda) * num_experts * r."
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="The adapter's output is scaled by lora_alpha / r; null: 2 r."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r): PEFT's name for scaling: rslora.")
    scaling: Literal["lora", "rslora", "gate_norm", "gate_sum"] = Field(
        "lora",
        description="How the adapter's output is scaled. lora: lora_alpha / r. rslora: lora_alpha / sqrt(r). gate_norm "
        "and gate_sum: lora_alpha / r times a factor that gives a mixture with a uniform router the scale of a single "
        "LoRA, measured by its gradients (GOAT) or by its output. See docs/methods.md.",
    )
    beta: float = Field(
        1.0, gt=0, description="Initial scale of the shared down-projection S_A relative to the experts' P_t (malora)."
    )
    lora_dropout: float = Field(
        0.05, ge=0, lt=1, description="Dropout on the input of the down-projection; the router's input is not dropped."
    )
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_split_targets)] = Field(
        DEFAULT_TARGETS,
        min_length=1,
        description="Linear layers to adapt: suffixes of module names, regular expressions matched against full module "
        "names, or all-linear for every linear layer except the output head.",
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="Weight of the load-balancing loss.")
    router_aux_loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="Reduction of the load-balancing loss over all routers."
    )
    router_aux_loss_schedule: Literal["constant", "linear", "until"] = Field(
        "constant",
        description="Schedule of the load-balancing loss's weight. linear: decays to 0 over the first "
        "router_aux_loss_ratio of all steps. until: constant during them, then 0.",
    )
    router_aux_loss_ratio: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Fraction of all steps with a load-balancing loss, for the schedules linear and until.",
    )
    router_z_loss_coef: float = Field(
        0.0, ge=0, description="Weight of the router z-loss: the mean over tokens of logsumexp(logits) ** 2."
    )
    balance_scope: Literal["global", "local"] = Field(
        "global",
        description="Tokens over which expert load is balanced. global: all tokens of an optimizer step, across "
        "processes. local: each micro-batch of each process, which depends on how samples are assigned to them.",
    )
    normalize_gates: bool = Field(
        False, description="Normalise the gates of each token's selected experts to sum to 1."
    )
    task_conflict: Literal["none", "project"] = Field(
        "none",
        description="How the gradients of S_A are combined across tasks. none: they are summed. project: before that, "
        "the component of each that opposes another task's gradient is removed (Ortho-LoRA).",
    )
    router_input: Literal["x", "h"] = Field(
        "x",
        description="Input of the routers. x: the layer's input. h: S_A drop(x), which the experts read too; saves one "
        "matrix product and num_experts * (in_features - shared_r) parameters on each linear (malora, hydralora).",
    )
    router_dtype: Literal["float32", "input"] = Field(
        "float32", description="Precision of the routers' products. input: the dtype of what they read."
    )
    computation: Literal["auto", "dense", "grouped", "grouped_triton"] = Field(
        "auto",
        description="How the experts are computed; the result is the same. dense: all experts, with gates of 0 for "
        "those not selected. grouped: tokens sorted by expert, only the selected experts. grouped_triton: grouped with "
        "Triton kernels, not yet run on a GPU. auto: dense or grouped, whichever needs fewer operations, on a CPU; "
        "dense on a GPU, where grouped waits for the device.",
    )
    fuse_projections: bool = Field(
        True,
        description="Compute S_A and the routers of linears with the same input (q, k, v; gate, up) in one matrix "
        "product.",
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
        if structure.expert_down and self.shared_r is None:
            derived = default_shared_r(self.num_experts, self.r, self.compression_ratio)
            if derived < self.r:
                yield Rule(
                    ("compression_ratio", "r"), f"gives shared_r={derived}, which must be at least adapter.r={self.r}"
                )
        if len(set(self.target_modules)) < len(self.target_modules):
            yield Rule(("target_modules",), "must not name a module twice")
        if any(not name.strip() for name in self.target_modules):
            yield Rule(("target_modules",), "must not hold an empty name")
        for name in self.target_modules:
            try:
                compiled(name)
            except ValueError as error:
                yield Rule(("target_modules",), f"{short(name)} is not a valid regular expression: {error}")

    def inapplicable_fields(self) -> dict[str, str]:
        keys = _unused_keys(METHODS[self.method])
        reasons = {key: f"has no meaning for adapter.method={self.method}" for key in keys}
        if self.router_aux_loss_schedule == "constant":
            reasons.setdefault("router_aux_loss_ratio", "has no meaning for adapter.router_aux_loss_schedule=constant")
        return reasons
