"""What to change, and why, in sentences."""

from collections.abc import Iterator, Sequence

from malora_dist.plan.communication import rows_per_token
from malora_dist.plan.estimate import USABLE, Estimate
from malora_dist.plan.parameters import FP32, trainable_parameters
from malora_dist.plan.units import show_bytes, show_seconds

SMALL_BUCKET = FP32 * 50_000_000
CAUSES = {
    "compute": "computing",
    "tokens": "the exchange of tokens",
    "weight_gather": "gathers of adapter weights",
    "gradient_reduce": "reductions of gradients",
    "base_gather": "gathers of the frozen base",
}


def advice(chosen: Estimate, plans: Sequence[Estimate]) -> list[str]:
    """Return sentences on the chosen plan and on the other legal plans, given with the fastest first."""
    return [
        *_memory(chosen),
        *_cheapest(chosen, plans),
        *_base(chosen, plans),
        *_experts(chosen, plans),
        *_bucket(chosen),
        *_host(chosen),
    ]


def fastest_that_fits(plans: Sequence[Estimate]) -> Estimate | None:
    """Return the first plan that fits; None if there is none."""
    return next((plan for plan in plans if plan.fits), None)


def named(settings: dict[str, object]) -> str:
    """Write settings as on the command line."""
    return " ".join(f"{key.split('.')[-1]}={str(value).lower()}" for key, value in settings.items())


def _memory(chosen: Estimate) -> Iterator[str]:
    kinds = sorted((size, kind) for kind, size in chosen.memory.items() if kind != "total")[::-1][:3]
    largest = ", ".join(f"{kind} {show_bytes(size)}" for size, kind in kinds if size)
    room = show_bytes(USABLE * chosen.hardware.hbm)
    verdict = "fits" if chosen.fits else "does not fit"
    yield f"It {verdict}: {show_bytes(chosen.memory['total'])} of {room} usable a GPU; most are {largest}."


def _cheapest(chosen: Estimate, plans: Sequence[Estimate]) -> Iterator[str]:
    best = fastest_that_fits(plans)
    if best is None:
        smallest = min(plans, key=lambda plan: plan.memory["total"], default=chosen)
        yield (
            f"No legal plan of this batch fits; the smallest, {named(smallest.settings)}, needs "
            f"{show_bytes(smallest.memory['total'])}. Shorten data.max_seq_length, or take more or larger GPUs."
        )
        return
    if best.settings == chosen.settings:
        yield "It is the fastest legal plan that fits."
        return
    saved = {cause: chosen.seconds[cause] - best.seconds[cause] for cause in CAUSES}
    cause = max(saved, key=lambda name: saved[name])
    changed = {key: value for key, value in best.settings.items() if chosen.settings[key] != value}
    yield (
        f"The fastest legal plan that fits is {named(changed)}: {show_seconds(best.seconds['total'])} a step "
        f"instead of {show_seconds(chosen.seconds['total'])}, with {show_bytes(best.memory['total'])} a GPU. "
        f"Most of it is saved in {CAUSES[cause]}."
    )


def _base(chosen: Estimate, plans: Sequence[Estimate]) -> Iterator[str]:
    """Compare ZeRO-3, which gathers the base, with a base replicated under ZeRO-1."""
    run = chosen.run
    split, whole = (_like(chosen, plans, zero_stage=stage, ep_size=1) for stage in (3, 1))
    if run.world_size == 1 or split is None or whole is None:
        return
    kinds = ("base_4bit", "base_other")
    more = sum(whole.memory[kind] - split.memory[kind] for kind in kinds) - split.memory["gathered"]
    held = f"costs {show_bytes(more)} more" if more > 0 else f"needs {show_bytes(-more)} less"
    yield (
        f"ZeRO-3 gathers the {'4-bit ' if run.load_in_4bit else ''}base in every micro-batch: "
        f"{show_bytes(split.traffic['base_gather'])} a GPU and step, {show_seconds(split.seconds['base_gather'])}. "
        f"A base replicated under ZeRO-1 or 2 moves none of it and {held} memory a GPU."
    )


def _like(chosen: Estimate, plans: Sequence[Estimate], **parallel: int) -> Estimate | None:
    wanted = chosen.settings | {f"parallel.{key}": value for key, value in parallel.items()}
    return next((plan for plan in plans if plan.settings == wanted), None)


def _experts(chosen: Estimate, plans: Sequence[Estimate]) -> Iterator[str]:
    """Compare sending weights to the tokens with sending tokens to the weights, by the bytes of both plans."""
    run = chosen.run
    ep_size = run.ep_size if run.ep_size > 1 else min((p.run.ep_size for p in plans if p.run.ep_size > 1), default=1)
    alone, spread = (_like(chosen, plans, ep_size=size) for size in (1, ep_size))
    if ep_size == 1 or alone is None or spread is None:
        return
    weights, tokens = alone.traffic["weights"], spread.traffic["tokens"] + spread.traffic["weights"]
    yield (
        f"{'Moving weights is cheaper' if weights < tokens else 'Moving tokens is cheaper'}: a GPU and step send "
        f"{show_bytes(weights)} of adapter weights and gradients at ep_size=1, {show_bytes(tokens)} of tokens, weights "
        f"and gradients at ep_size={ep_size}.{_rule(spread) if run.zero_stage == 3 else ''}"
    )
    if run.ep_size > 1:
        yield (
            f"Uniform routing sends {show_bytes(chosen.traffic['tokens'])} of tokens a GPU and step, the worst "
            f"{show_bytes(chosen.traffic['tokens_worst_case'])}; the exchange buffers are those of uniform routing."
        )


def _rule(spread: Estimate) -> str:
    """State when moving weights is cheaper under ZeRO-3.

    It gathers a layer's experts twice a micro-batch and reduces them once, about 3 N r numbers an output.
    """
    run, spec = spread.run, spread.run.spec
    remote = rows_per_token(spec.num_experts, spec.top_k, run.ep_size) * (run.ep_size - 1) / run.ep_size
    return (
        f" Under ZeRO-3 weights win while about N r < 2/3 T q, here {spec.num_experts * spec.r} against "
        f"{2 / 3 * run.tokens * remote:.0f} (T tokens of a micro-batch, q = {remote:.2f} remote owners of each)."
    )


def _bucket(chosen: Estimate) -> Iterator[str]:
    bucket = chosen.memory["reduce_bucket"]
    trained = FP32 * trainable_parameters(chosen.run)
    if bucket > 2 * trained:
        yield (
            f"DeepSpeed allocates its gradient bucket whole: {show_bytes(bucket)} for {show_bytes(trained)} of "
            f"gradients. In parallel.ds_config, reduce_bucket_size={trained // FP32} would do."
        )
    elif bucket > SMALL_BUCKET:
        yield (
            f"DeepSpeed's gradient bucket takes {show_bytes(bucket)}; with reduce_bucket_size=50000000 in "
            f"parallel.ds_config, as ds_configs/ have it, {show_bytes(SMALL_BUCKET)}."
        )


def _host(chosen: Estimate) -> Iterator[str]:
    if chosen.host_memory["total"]:
        per_node = chosen.host_memory["total"] * chosen.hardware.gpus_per_node
        yield f"Offload keeps {show_bytes(per_node)} in each node's host memory; the time of its copies is not counted."
