"""Every stored tensor of a run, what a rank keeps of it under ZeRO, and the optimizer's state on top."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from malora_dist.adapters.parameter_counts import count_parameters, factor_shapes
from malora_dist.ops.nf4_layout import nf4_bytes
from malora_dist.optimizers.registry import optimizer_spec
from malora_dist.optimizers.spec import Shape
from malora_dist.plan.run import Run, is_grouped
from malora_dist.plan.shapes import Linear

FP32 = 4
EXPERT_FACTORS = ("P", "A", "B")


@dataclass(frozen=True)
class Stored:
    """`copies` tensors alike: this rank's share of the experts where `group` is the expert-data-parallel group.

    kind: base_4bit, base_other or adapters. numel counts elements before ZeRO-3 splits them over `group` ranks.
    lr_ratio: of a trained tensor, its learning rate as a multiple of the run's.
    """

    kind: str
    numel: int
    itemsize: int
    group: int
    copies: int = 1
    trained: bool = False
    lr_ratio: float = 1.0
    is_embedding: bool = False

    @property
    def part(self) -> int:
        """Elements of a rank's part; ZeRO-3 pads to equal parts."""
        return math.ceil(self.numel / self.group)

    @property
    def nbytes(self) -> int:
        return self.copies * self.numel * self.itemsize


def stored_tensors(run: Run) -> list[Stored]:
    """Return every parameter of the model that a rank is responsible for, whole."""
    shape, W = run.shape, run.world_size
    s = run.itemsize
    tensors = [Stored("base_other", numel, s, W, copies) for numel, copies in shape.others]
    heads = 1 if shape.tied_head else 2
    tensors.append(Stored("base_other", shape.embedding_numel, s, W, heads, is_embedding=True))
    for linear in shape.linears:
        copies = shape.stored(linear)
        if run.load_in_4bit:
            tensors.append(Stored("base_4bit", nf4_bytes(linear.weights, run.double_quant), 1, W, copies))
        else:
            tensors.append(Stored("base_other", linear.weights, s, W, copies))
    for linear in run.adapted:
        tensors += _adapter_tensors(run, linear)
    return tensors


def _adapter_tensors(run: Run, linear: Linear) -> Iterator[Stored]:
    for factor, shape in factor_shapes(run.spec, linear.in_features, linear.out_features).items():
        is_expert = factor in EXPERT_FACTORS and run.ep_size > 1
        numel = math.prod(shape) // (run.ep_size if is_expert else 1)
        group = run.expert_group if is_expert else run.world_size
        ratio = run.lr_ratios.get(factor, 1.0)
        yield Stored("adapters", numel, FP32, group, run.shape.copies(linear), trained=True, lr_ratio=ratio)


def weight_copy_bytes(run: Run) -> int:
    """Count bytes of the trained weights rounded to the base's dtype, which are whole on every rank during a step.

    They are kept where the base has another dtype than fp32 (`ops.products`). DoRA rounds its weights
    inside of the graph, and the kernels of grouped_triton tile by tile.
    """
    if run.itemsize == FP32 or run.spec.structure.magnitude:
        return 0
    numel = 0
    for linear in run.adapted:
        in_tiles: tuple[str, ...] = ()
        if run.computation == "grouped_triton" and is_grouped(run):
            in_tiles = EXPERT_FACTORS
        if run.spec.router_input == "h":
            # A router that reads h is rounded within the graph, if at all.
            in_tiles += ("gate",)
        for factor, shape in factor_shapes(run.spec, linear.in_features, linear.out_features).items():
            if factor not in in_tiles:
                part = math.prod(shape) // (run.ep_size if factor in EXPERT_FACTORS else 1)
                numel += run.shape.copies(linear) * part
    return numel * run.itemsize


def task_gradient_bytes(run: Run) -> int:
    """Count bytes of the gradients of every S_A by task, whole on every rank, where conflicts are projected."""
    if run.spec.shared_r is None:
        return 0
    numel = sum(run.shape.copies(linear) * run.spec.shared_r * linear.in_features for linear in run.adapted)
    return FP32 * run.projected_tasks * numel


def trainable_parameters(run: Run) -> int:
    """Count the trained numbers of the whole model, over all ranks."""
    return sum(
        run.shape.copies(linear) * count_parameters(run.spec, linear.in_features, linear.out_features)
        for linear in run.adapted
    )


def persists(run: Run, tensor: Stored) -> bool:
    """Return whether ZeRO-3 keeps a tensor whole between uses, as it is small (stage3_param_persistence_threshold)."""
    return run.zero_stage == 3 and tensor.numel <= run.zero.persistence_threshold


def parameter_bytes(run: Run) -> dict[str, int]:
    """Count bytes of each kind on a rank: all below ZeRO-3; at ZeRO-3 its parts, and small tensors whole as well."""
    result = {"base_4bit": 0, "base_other": 0, "adapters": 0}
    for tensor in stored_tensors(run):
        if run.zero_stage < 3:
            result[tensor.kind] += tensor.nbytes
        else:
            result[tensor.kind] += tensor.copies * tensor.part * tensor.itemsize
            result[tensor.kind] += tensor.nbytes if persists(run, tensor) and tensor.group > 1 else 0
    if run.zero_stage in (1, 2):
        result["adapters"] = FP32 * sum(flat.numel for flat in flat_groups(run))
    return result


@dataclass(frozen=True)
class FlatGroup:
    """All trained tensors of one learning rate that the same ranks share, as ZeRO-1 and 2 lay them out, padded."""

    numel: int
    group: int
    stride: int


def flat_groups(run: Run) -> list[FlatGroup]:
    """Return the flat tensors of trained parameters, one for each group of ranks and learning rate.

    Router and S_A, or everything, are over the world, experts over their expert-data-parallel group. ZeRO-1 and
    2 pad a flat tensor to a multiple of 2 x its ranks; ZeRO-0 does not pad.
    """
    totals = Counter[tuple[int, float]]()
    for tensor in stored_tensors(run):
        if tensor.trained:
            totals[tensor.group, tensor.lr_ratio] += tensor.copies * tensor.numel
    result = []
    for (group, _), total in totals.items():
        alignment = 2 * group if run.zero_stage > 0 else 1
        result.append(FlatGroup(math.ceil(total / alignment) * alignment, group, run.world_size // group))
    return result


def owned_numel(run: Run) -> int:
    """Count the trained numbers whose optimizer state is on this rank: all, or a part of each flat or each tensor."""
    if run.zero_stage == 0:
        return sum(flat.numel for flat in flat_groups(run))
    if run.zero_stage < 3:
        return sum(flat.numel // flat.group for flat in flat_groups(run))
    return sum(tensor.copies * tensor.part for tensor in stored_tensors(run) if tensor.trained)


def optimizer_tensors(run: Run) -> list[tuple[Shape, int]]:
    """Return shape and number of the tensors that this rank's optimizer updates.

    At stage 0 they are the trained tensors, above it flat ones: this rank's part of each flat tensor, or at stage 3 all
    its parts of one learning rate in one, as DeepSpeed's sub_group_size is larger than any adapter's.
    """
    if run.zero_stage == 3:
        parts = Counter[float]()
        for tensor in stored_tensors(run):
            if tensor.trained:
                parts[tensor.lr_ratio] += tensor.copies * tensor.part
        return [((numel,), 1) for numel in parts.values()]
    if run.zero_stage > 0:
        return [((flat.numel // flat.group,), 1) for flat in flat_groups(run)]
    found = []
    for linear in run.adapted:
        for factor, shape in factor_shapes(run.spec, linear.in_features, linear.out_features).items():
            experts = shape[0] // (run.ep_size if factor in EXPERT_FACTORS else 1)
            found.append(((experts, *shape[1:]), run.shape.copies(linear)))
    return found


def state_bytes(run: Run) -> int:
    """Return the bytes of this rank's optimizer state, without counters."""
    layout = optimizer_spec(run.optim).layout
    return sum(copies * layout.num_bytes(shape) for shape, copies in optimizer_tensors(run))


def optimizer_bytes(run: Run) -> dict[str, int]:
    """Count bytes of fp32 master weights, optimizer state (`moments`), and gradients between backward and step.

    From stage 1 on DeepSpeed clones the trained partition as its master even where that is fp32 already. Stages 0 and 1
    keep whole gradients, 2 and 3 the rank's part. DeepSpeed copies reduced gradients through a bucket of
    reduce_bucket_size elements, two of them below stage 3 if overlap_comm; it is allocated whole.
    """
    numel = owned_numel(run)
    whole = sum(tensor.copies * tensor.numel for tensor in stored_tensors(run) if tensor.trained)
    buckets = 0
    if run.zero_stage > 0 and run.zero.contiguous_gradients:
        buckets = 2 if run.zero.overlap_comm and run.zero_stage < 3 else 1
    return {
        "master": FP32 * numel if run.zero_stage > 0 else 0,
        "moments": state_bytes(run),
        "gradients": FP32 * (whole if run.zero_stage < 2 else numel),
        "reduce_bucket": FP32 * buckets * run.zero.reduce_bucket_size,
    }
