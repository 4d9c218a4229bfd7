"""Which of the two forms of the sum over experts costs less, by counting. Pure arithmetic."""

MOVE_COST = 128


def prefer_grouped(num_experts: int, top_k: int, r: int, in_width: int, out_width: int) -> bool:
    """Whether `grouped_experts` is the cheaper form than `dense_experts`, by counting the work of a token.

    Both forms spend R (D + O) multiplications per expert they compute. Grouped computes K of E, but moves K rows of
    D + O numbers there and back; moving a number costs about as much as `MOVE_COST` multiplications in a GEMM
    (measured on a CPU: the forms break even near E*R = 500 at K = 2).
    """
    dense = num_experts * r * (in_width + out_width)
    grouped = top_k * r * (in_width + out_width) + MOVE_COST * top_k * (in_width + 2 * out_width)
    return grouped < dense
