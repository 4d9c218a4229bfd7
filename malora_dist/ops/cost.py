"""Which of the two forms of the sum over experts costs less, by counting. Pure arithmetic."""

# Multiplications in a GEMM that cost as much as moving a number. CPU: measured, the forms break even near E*R = 500 at
# K = 2. GPU: by the roofline of an H100, near E*R = 1200.
MOVE_COST = {"cpu": 128, "cuda": 300}


def prefer_grouped(num_experts: int, top_k: int, r: int, in_width: int, out_width: int, device: str) -> bool:
    """Whether `grouped_experts` is the cheaper form than `dense_experts`, by counting the work of a token.

    Both forms spend R (D + O) multiplications per expert they compute. Grouped computes K of E, but moves K rows of
    D + O numbers there and back, each at `MOVE_COST`. `device` is a kind of device (`torch.device.type`).
    """
    move = MOVE_COST["cpu" if device == "cpu" else "cuda"]
    dense = num_experts * r * (in_width + out_width)
    grouped = top_k * r * (in_width + out_width) + move * top_k * (in_width + 2 * out_width)
    return grouped < dense
