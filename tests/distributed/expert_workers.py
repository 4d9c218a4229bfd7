"""Two real processes that share the experts of a tiny model: who owns what, what repeats, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict
from malora_dist.distributed import expert_parallel as apply
from malora_dist.distributed.expert_groups import ExpertGroups
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.zero3 import gathered_adapter_state
from malora_dist.errors import TopologyError
from tests.training.workers import STEPS, build_model, gathered_moments, new_train_step, run_steps

CASE: dict[str, Any] = {"zero_stage": 3, "ep_size": 2}
PROMPT_LENGTHS = [5, 9]
NEW_TOKENS = 12


def find_out(world: World, folder: str) -> dict[str, Any]:
    return {
        "owned": owned(world, folder),
        "repeats": repeats(world, folder),
        "generated": generated(world, folder),
        "refusals": refusals(world, folder),
        "resumed": resumed(world, folder),
    }


def owned(world: World, folder: str) -> dict[str, bool]:
    """Whether this rank holds its own half of every expert tensor that one process would build, and all else whole."""
    full = dict(adapter_state_dict(build_model(folder, CASE, None, {})))
    own = dict(adapter_state_dict(new_train_step(world, folder, {"zero_stage": 0, "ep_size": 2}).engine.module))
    halves = {name: tensor.chunk(2)[world.rank] for name, tensor in full.items() if name.endswith((".P", ".B"))}
    return {name: torch.equal(own[name], halves.get(name, full[name])) for name in full}


def repeats(world: World, folder: str) -> dict[str, bool]:
    """Which runs end in the same bits as the first: dropout is on, so recomputation must draw the same masks."""
    variants: dict[str, Any] = {"again": {}, "recomputed": {"gradient_checkpointing": True}}
    first = end_of_run(world, folder, CASE)
    return {
        name: all(torch.equal(first[key], tensor) for key, tensor in end_of_run(world, folder, CASE | change).items())
        for name, change in variants.items()
    }


def end_of_run(world: World, folder: str, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    train_step = new_train_step(world, folder, case)
    run_steps(train_step, case, range(1, STEPS + 1))
    return dict(gathered_adapter_state(train_step.engine.module)) | dict(gathered_moments(train_step))


def generated(world: World, folder: str) -> dict[str, Any]:
    """Greedy continuations of other lengths on each rank, and those of one process with the same weights."""
    train_step = new_train_step(world, folder, CASE)
    run_steps(train_step, CASE, [1, 2])
    model = train_step.engine.module.eval()
    ids = torch.arange(PROMPT_LENGTHS[world.rank])[None]
    ours = generate(model, ids, NEW_TOKENS - 7 * world.rank)
    alone = build_model(folder, CASE, None, {}).eval()
    state = dict(gathered_adapter_state(model))
    for name, parameter in adapter_parameters(alone):
        parameter.data.copy_(state[name])
    return {"ours": ours, "alone": generate(alone, ids, NEW_TOKENS - 7 * world.rank)}


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> list[int]:
    tokens: list[int] = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        synced_gpus=True,
    )[0].tolist()
    return tokens


def refusals(world: World, folder: str) -> dict[str, str]:
    """What is said when the marks that DeepSpeed goes by are missing, or are only those of its own expert layers."""
    right = apply.mark_expert_parameter

    def classic(parameter: nn.Parameter, groups: ExpertGroups) -> None:
        parameter.allreduce, parameter.group_name = False, groups.name

    def none(_parameter: nn.Parameter, _groups: ExpertGroups) -> None: ...

    def say(mark: Callable[..., None], case: dict[str, Any]) -> str:
        apply.mark_expert_parameter = mark
        try:
            new_train_step(world, folder, case)
        except (TopologyError, KeyError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            apply.mark_expert_parameter = right
        return ""

    return {
        f"{mark.__name__} at {stage}": say(mark, CASE | {"zero_stage": stage})
        for mark, stage in ((classic, 3), (none, 3), (none, 1), (none, 0))
    }


def resumed(world: World, folder: str) -> dict[str, Any]:
    """DeepSpeed's own checkpoint at the same topology: moments come back, and the next steps are the same."""
    train_step = new_train_step(world, folder, CASE)
    run_steps(train_step, CASE, [1, 2])
    train_step.engine.save_checkpoint(str(Path(folder, "native")), tag="two")
    moments, balance = dict(gathered_moments(train_step)), train_step.balance.state_dict()
    wanted = [result.loss for result in run_steps(train_step, CASE, [3, 4])]
    fresh = new_train_step(world, folder, CASE)
    fresh.engine.load_checkpoint(str(Path(folder, "native")), tag="two")
    fresh.balance.load_state_dict(balance, "native")
    restored = dict(gathered_moments(fresh))
    return {
        "same moments": all(torch.equal(moments[name], tensor) for name, tensor in restored.items()),
        "nonzero": all(bool(tensor.any()) for name, tensor in restored.items() if name.startswith("exp_avg_sq")),
        "losses": [[result.loss for result in run_steps(fresh, CASE, [3, 4])], wanted],
    }
