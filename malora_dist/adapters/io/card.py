"""The model card beside an adapter."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from malora_dist.adapters.scaling import LORA

if TYPE_CHECKING:
    from malora_dist.adapters.io.folder import AdapterInfo


def model_card(info: "AdapterInfo", tasks: Sequence[str], evaluations: Mapping[str, Any]) -> str:
    """Return the README.md of an adapter folder: what it is, what it was trained on, how to load it."""
    spec = info.spec
    which = "all" if spec.structure.dense else f"top-{spec.top_k}"
    experts = f"{spec.num_experts} experts, {which}, " if spec.structure.routed else ""
    shared = f", shared_r {spec.shared_r}" if spec.shared_r is not None else ""
    scaling = ", use_rslora" if spec.use_rslora else "" if spec.scaling_rule == LORA else f", {spec.scaling_rule}"
    lines = [
        "---",
        f"base_model: {info.base_model}",
        "library_name: malora_dist",
        "---",
        "",
        f"# {spec.method} adapter",
        "",
        f"{experts}r {spec.r}{shared}, lora_alpha {spec.lora_alpha:g}{scaling}, on {', '.join(info.target_modules)} of",
        f"`{info.base_model}`." + (f" Trained on {', '.join(tasks)}." if tasks else ""),
        "",
        *_accuracies(evaluations),
        "```python",
        "from malora_dist import load_adapter",
        "load_adapter(model, folder)  # model: the base, from malora_dist.models.load.load_base_model or transformers",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _accuracies(evaluations: Mapping[str, Any]) -> list[str]:
    if "tuned" not in evaluations:
        return []
    rows = [
        f"| {task} | {row['n']} | {row['accuracy']:.3f} |"
        for task, row in evaluations["tuned"]["tasks"].items()
        if "accuracy" in row
    ]
    return ["| task | n | accuracy |", "|---|---|---|", *rows, ""]
