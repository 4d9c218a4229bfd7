"""What real processes find out about the exchange of tokens, all in one launch per number of processes."""

import traceback
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings

from malora_dist.distributed.all_to_all import AllToAll
from malora_dist.distributed.dispatch_plan import DispatchPlan, make_plan
from malora_dist.distributed.expert_groups import ExpertGroups, create_expert_groups
from malora_dist.distributed.process_groups import World, broadcast_object, gather_lists
from malora_dist.plan.communication import exchange_bytes
from tests.distributed.exchange_cases import DTYPES, ExchangeCase, exchange_cases, named_cases
from tests.distributed.exchange_llama import compare_llamas
from tests.distributed.exchange_runs import Run, Values, run, twin
from tests.multiprocess import run_distributed
from tests.reference import exchange_bytes_reference, expert_ranks_reference, routing_reference

EXAMPLES = {2: 100, 4: 60}
SWITCHES: dict[str, dict[str, bool]] = {
    "first": {},
    "again": {},
    "no overlap": {"overlap": False},
    "each for itself": {"share": False},
    "recomputed": {"recompute": True},
}
# Largest error of outputs and of gradients, relative to the norm of the whole tensor. bf16 rounds by up to 0.4 %.
ERRORS = {"float64": (1e-12, 1e-11), "float32": (1e-5, 1e-5), "bfloat16": (0.01, 0.03)}

Errors = dict[str, list[str]]


@cache
def results(world_size: int) -> list[dict[str, Any]]:
    """What `find_out` returned on every rank."""
    return run_distributed("tests.distributed.all_to_all_workers:find_out", world_size)


def find_out(world: World) -> dict[str, Any]:
    groups = {size: create_expert_groups(size, 60) for size in (2, 4) if size <= world.size}
    cases = named_cases(world.size)
    return {
        "cases": {name: examine(case, world.rank, groups[case.ep_size]) for name, case in cases.items()},
        "property": falsified(world, groups),
        "llama": compare_llamas(world, groups[2]),
    }


def falsified(world: World, groups: dict[int, ExpertGroups]) -> str:
    """The smallest drawn case in which anything is wrong on any rank, from the main process; it draws for all."""

    def together(case: ExchangeCase | None) -> list[Errors]:
        case = broadcast_object(case)
        return [] if case is None else gather_lists([examine(case, world.rank, groups[case.ep_size])])

    @settings(
        max_examples=EXAMPLES[world.size],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(exchange_cases(world.size))
    def nothing_is_wrong(case: ExchangeCase) -> None:
        found = together(case)
        assert not any(any(errors.values()) for errors in found), found

    if not world.is_main:
        while together(None):
            pass
        return ""
    error = ""
    try:
        nothing_is_wrong()
    except AssertionError:
        error = traceback.format_exc()
    together(None)
    return error


def examine(case: ExchangeCase, rank: int, groups: ExpertGroups) -> Errors:
    """What is wrong, by aspect. Nothing is judged before all ranks are done with their messages."""
    own = [case.tensors(layer, rank) for layer in range(len(case.outs))]
    runs = {name: run(case, own, rank, groups, **switches) for name, switches in SWITCHES.items()}
    first, alone = runs["first"].values, runs["each for itself"].values
    # Only what all linears add up depends on their order, which sharing changes.
    wanted_bits = {"each for itself": {name: value for name, value in first.items() if name != "x"}}
    other_form = replace(case, computation="grouped" if case.computation == "dense" else "dense")
    near_twin = [first, alone, run(other_form, own, rank, groups).values]
    wanted = twin(case, own, rank, groups)
    ids = [routing_reference(tensors["x"], tensors["gate"], case.K)[1] for tensors in own]
    plan = make_plan(ids, case.E, AllToAll(groups.expert_parallel))
    all_ids: list[Any] = [None] * groups.ep_size
    dist.all_gather_object(all_ids, [layer_ids.tolist() for layer_ids in ids], group=groups.expert_parallel)
    place = dist.get_rank(groups.expert_parallel)
    return {
        "twin": [error for values in near_twin for error in far_apart(values, wanted, case.dtype)],
        "bits": [
            f"{switch}: {name}"
            for switch, found in runs.items()
            for name, value in wanted_bits.get(switch, first).items()
            if not torch.equal(found.values[name], value)
        ],
        "plan": wrong_plan(plan, all_ids, place, case),
        "bytes": [e for switch in runs for e in wrong_bytes(case, switch, runs[switch], plan, all_ids, place)],
    }


def far_apart(found: Values, wanted: Values, dtype: str) -> list[str]:
    """Values further from the twin's than rounding explains."""
    assert found.keys() == wanted.keys()
    errors = []
    for name, value in wanted.items():
        error, norm = float((found[name].double() - value).norm()), float(value.norm())
        limit = ERRORS[dtype][not name.endswith(".y")]
        if not error <= limit * norm + 1e-11:  # true for NaN too
            errors.append(f"{name} is {error:.1e} off, its norm is {norm:.1e}")
    return errors


def wrong_plan(plan: DispatchPlan, all_ids: list[Any], place: int, case: ExchangeCase) -> list[str]:
    """Counts of rows against loops over the tokens of all ranks: `all_ids[rank][layer]` (T, K)."""
    W = case.ep_size
    ranks = [[expert_ranks_reference(ids, case.E, W) for ids in of_rank] for of_rank in all_ids]
    rows = [[[sum(w in r for r in layer) for layer in of_rank] for w in range(W)] for of_rank in ranks]
    received = [rows[source][place] for source in range(W)]
    wrong_sent = [f"sent {plan.sent_WL}, not {rows[place]}"] if plan.sent_WL != rows[place] else []
    return wrong_sent + ([f"got {plan.received_WL}, not {received}"] if plan.received_WL != received else [])


def wrong_bytes(
    case: ExchangeCase, switch: str, found: Run, plan: DispatchPlan, all_ids: list[Any], place: int
) -> list[str]:
    """Four counts of the bytes of each phase: AllToAll's, the formula's, the naive one, and that of real messages."""
    L, recompute = len(case.outs), switch == "recomputed"
    itemsize = DTYPES[case.dtype].itemsize
    sizes = {"in_width": case.D or case.I, "itemsize": itemsize, "gate_itemsize": max(4, itemsize)}
    formula, naive, real = Counter[str](), Counter[str](), Counter[str]()
    others = [w for w in range(case.ep_size) if w != place]
    for layer, out_width in enumerate(case.outs):
        by_formula = exchange_bytes(
            [plan.sent_WL[w][layer] for w in others],
            [plan.received_WL[w][layer] for w in others],
            out_width=out_width,
            num_local_experts=case.E // case.ep_size,
            recompute=recompute,
            **sizes,
        )
        formula.update(asdict(by_formula))
        ids = [of_rank[layer] for of_rank in all_ids]
        passes = {"forwards": 1 + recompute}
        naive.update(exchange_bytes_reference(ids, case.E, out_width=out_width, **sizes, **passes)[place])
    if switch == "each for itself":
        phases = ["counts", "rows"] * L + ["returns"] * L + ["grad_returns"] * L + ["grad_rows"] * L
    else:
        forward = ["counts", "rows", *["returns"] * L]
        phases = forward * (1 + recompute) + ["grad_returns"] * L + ["grad_rows"]
    if len(phases) != len(found.messages):
        return [f"{switch}: {len(found.messages)} messages, not {len(phases)}"]
    for phase, size in zip(phases, found.messages, strict=True):
        real[phase] += size
    counts = {"counted": found.sent_bytes, "formula": formula, "naive": naive, "real": real}
    texts = {name: str({phase: count.get(phase, 0) for phase in real}) for name, count in counts.items()}
    return [] if len(set(texts.values())) == 1 else [f"{switch}: {texts}"]
