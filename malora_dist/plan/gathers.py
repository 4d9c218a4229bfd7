"""How often ZeRO-3 gathers a tensor, and how much it keeps whole, as DeepSpeed 0.19.8 was measured to do it.

Its prefetcher runs ahead of the modules until `stage3_max_live_parameters` elements (default 1e9, where a byte of
4-bit weights counts as one) are whole. So about that many are in memory at any time, and as many are still there when
backward starts and need no second gather.
"""

from malora_dist.plan.parameters import Stored, persists, stored_tensors
from malora_dist.plan.run import Run


def _gathered(run: Run) -> list[Stored]:
    if run.zero_stage < 3:
        return []
    return [tensor for tensor in stored_tensors(run) if tensor.group > 1 and not persists(run, tensor)]


def live_share(run: Run) -> float:
    """Return the share of the model's elements that ZeRO-3 keeps whole at a time."""
    elements = sum(tensor.copies * tensor.numel for tensor in _gathered(run))
    return min(1.0, run.zero.max_live_parameters / elements) if elements else 1.0


def gathered_bytes(run: Run) -> int:
    """Count bytes of whole tensors beside the parts: the live share, and never less than the largest tensor."""
    tensors = _gathered(run)
    largest = max((tensor.numel * tensor.itemsize for tensor in tensors), default=0)
    return max(largest, round(live_share(run) * sum(tensor.nbytes for tensor in tensors)))


def gathers_per_micro_batch(run: Run, tensor: Stored) -> float:
    """Return the mean number of times that a rank gathers a tensor that ZeRO-3 does not keep whole.

    Frozen: once each for forward, for backward, and with checkpointing for recomputation; less the share still whole
    when backward begins. Trained: recomputation and backward of a block share a gather if a block may stay whole.
    Untied embedding and head: once each, since backward does not need the embedding and follows at once in the head.
    """
    if tensor.is_embedding and not run.shape.tied_head:
        return 1.0
    passes = 3 if run.checkpointing and not (tensor.trained and _block_stays(run) or tensor.is_embedding) else 2
    return passes - live_share(run)


def _block_stays(run: Run) -> bool:
    block = sum(tensor.copies * tensor.numel for tensor in _gathered(run) if not tensor.is_embedding)
    return block <= run.shape.num_layers * run.zero.max_live_parameters
