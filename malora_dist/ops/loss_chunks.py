"""How many rows of logits the loss makes at a time. No torch, since the plan counts their bytes too."""

# Bytes of a chunk's fp32 logits. On a CPU the passes over a chunk should find some of it in the last cache, while each
# chunk reads the whole weight twice more: 64 MiB (341 rows of 49152) was fast on an idle and on a busy machine. A GPU
# needs some hundred rows to multiply at full rate, whatever the vocabulary: 256 MiB are 523 rows even of 128256.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}


def chunk_rows(vocab_size: int, device: str) -> int:
    """Rows of a chunk for a vocabulary on a kind of device (`torch.device.type`); at least one."""
    budget = CHUNK_BYTES["cpu" if device == "cpu" else "cuda"]
    return max(1, budget // (4 * vocab_size))
