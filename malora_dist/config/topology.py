"""Which process does what: batch arithmetic, groups of ranks, and the experts a rank owns. Arithmetic only."""

from malora_dist.errors import TopologyError


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches that each process runs for one optimizer step.

    Raises TopologyError, naming the nearest values that work, if the global batch cannot be split evenly.

    >>> accumulation_steps(16, 4, 2)
    2
    """
    per_round = per_device_batch_size * world_size
    if global_batch_size % per_round == 0:
        return global_batch_size // per_round
    raise TopologyError(
        f"train.global_batch_size={global_batch_size} cannot be split: it must be a multiple of "
        f"train.per_device_train_batch_size={per_device_batch_size} x {world_size} processes = {per_round}. Nearest "
        f"that work: {_nearest_batches(global_batch_size, per_device_batch_size, world_size)}"
    )


def legal_world_sizes(global_batch_size: int, per_device_batch_size: int) -> list[int]:
    """Return all numbers of processes that can share the global batch, rising; empty if none can.

    >>> legal_world_sizes(16, 4)
    [1, 2, 4]
    """
    if global_batch_size % per_device_batch_size:
        return []
    return divisors(global_batch_size // per_device_batch_size)


def expert_parallel_ranks(world_size: int, ep_size: int) -> list[list[int]]:
    """Return the ranks of each expert-parallel group: neighbours, which together hold every expert once.

    World 4, ep 2, 8 experts: rank 0 and rank 1 form one group, rank 2 and rank 3 the other. Ranks 0 and 2 hold experts
    0-3, ranks 1 and 3 hold experts 4-7.

    >>> expert_parallel_ranks(4, 2)
    [[0, 1], [2, 3]]

    Raises TopologyError unless ep_size divides world_size.
    """
    _check_divides(ep_size, world_size, "the number of processes")
    return [list(range(start, start + ep_size)) for start in range(0, world_size, ep_size)]


def expert_data_parallel_ranks(world_size: int, ep_size: int) -> list[list[int]]:
    """Return the ranks of each expert-data-parallel group, which hold the same experts and average their gradients.

    World 4, ep 2: ranks 0 and 2 hold the same experts, and so do ranks 1 and 3.

    >>> expert_data_parallel_ranks(4, 2)
    [[0, 2], [1, 3]]

    Raises TopologyError unless ep_size divides world_size.
    """
    _check_divides(ep_size, world_size, "the number of processes")
    return [list(range(start, world_size, ep_size)) for start in range(ep_size)]


def local_experts(rank: int, ep_size: int, num_experts: int) -> range:
    """Return the global ids of the experts that `rank` holds; one slice of the stacked experts.

    >>> local_experts(3, ep_size=2, num_experts=8)
    range(4, 8)

    Raises TopologyError unless ep_size divides num_experts.
    """
    _check_divides(ep_size, num_experts, "adapter.num_experts")
    num_local_experts = num_experts // ep_size
    first = rank % ep_size * num_local_experts
    return range(first, first + num_local_experts)


def _check_divides(ep_size: int, total: int, what: str) -> None:
    if ep_size < 1 or total % ep_size:
        raise TopologyError(
            f"parallel.ep_size={ep_size} must divide {what}={total}; {_nearest_ep_size(ep_size, total)}"
        )


def _nearest_ep_size(ep_size: int, total: int) -> str:
    nearest = min(divisors(total), key=lambda divisor: (abs(divisor - ep_size), divisor))
    return f"the nearest that does is {nearest}"


def _nearest_batches(global_batch_size: int, per_device_batch_size: int, world_size: int) -> str:
    per_round = per_device_batch_size * world_size
    below = global_batch_size // per_round * per_round
    options = [_either([below, below + per_round], "global_batch_size {}")]
    if global_batch_size % world_size == 0:
        # Only smaller micro-batches: a larger one may not fit the device.
        fitting = [size for size in divisors(global_batch_size // world_size) if size <= per_device_batch_size]
        options.append(f"per_device_train_batch_size {fitting[-1]}")
    worlds = legal_world_sizes(global_batch_size, per_device_batch_size)
    neighbours = [
        max((w for w in worlds if w < world_size), default=0),
        min((w for w in worlds if w > world_size), default=0),
    ]
    options.append(_either(neighbours, "{} processes"))
    return ", ".join(option for option in options if option)


def _either(values: list[int], text: str) -> str:
    possible = [str(value) for value in values if value > 0]
    return text.format(" or ".join(possible)) if possible else ""


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, rising."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
