"""The grouped form of the mixture as Triton kernels for CUDA. Never measured on a GPU.

No host synchronisation: sorting and the bounds of experts stay on the device, and grids are sized by bounds. No
atomics: the same inputs give the same bits. Sums are in fp32; products run in the dtype of h: bf16, fp16 or fp32.
The parameters may have another dtype (fp32 ones are rounded tile by tile), and their gradients have theirs.
Without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before triton is first imported.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_T = 64
MAX_BLOCK_R = 64
# Of a row of a tile. Two stages of two such tiles of 64 rows then fill the 64 KiB of shared memory that any GPU has.
BLOCK_W_BYTES = 256
# The smallest side of a tile that a GPU multiplies.
MIN_BLOCK = 16


class RowBlocks(NamedTuple):
    """The tokens of each choice k sorted by expert, and cut into B blocks of at most `BLOCK_T` of one expert.

    Column e of `starts` is where expert e begins among the sorted tokens, the last one is T. A block has an expert,
    E where there is no such block, and the place of its first token.
    """

    tokens_KT: Tensor
    starts_KE: Tensor
    experts_KB: Tensor
    firsts_KB: Tensor


def row_blocks(expert_ids_TK: Tensor, num_experts: int) -> RowBlocks:
    """Sort tokens by expert into blocks of rows. B is a bound: as many as T fills, and one not full for each expert."""
    T, K = expert_ids_TK.shape
    device = expert_ids_TK.device
    sorted_KT, tokens_KT = expert_ids_TK.T.contiguous().sort(dim=1, stable=True)
    starts_KE = torch.searchsorted(sorted_KT, torch.arange(num_experts + 1, device=device).repeat(K, 1))
    blocks_KE = (starts_KE.diff(dim=1) + BLOCK_T - 1).div(BLOCK_T, rounding_mode="floor")
    ends_KE = blocks_KE.cumsum(dim=1)
    index_KB = torch.arange(min(T, T // BLOCK_T + num_experts), device=device).repeat(K, 1)
    experts_KB = torch.searchsorted(ends_KE, index_KB, right=True)
    index_in_expert_KB = index_KB - F.pad(ends_KE, (1, 0)).gather(1, experts_KB)
    return RowBlocks(tokens_KT, starts_KE, experts_KB, starts_KE.gather(1, experts_KB) + index_in_expert_KB * BLOCK_T)


def grouped_forward(
    y_TO: Tensor,
    h_TD: Tensor,
    down_ERD: Tensor | None,
    B_EOR: Tensor,
    gates_TK: Tensor,
    expert_ids_TK: Tensor,
    scaling: float,
) -> Tensor:
    """Add scaling * sum_k g_tk B_{e_tk} C_{e_tk} h_t to y_t in place, and return z (T, K, R), the C h.

    Without `down_ERD` z is a view of h (D = R).
    """
    with torch.cuda.device_of(h_TD):
        rows = _Rows(h_TD, len(B_EOR), gates_TK, expert_ids_TK, scaling)
        if down_ERD is None:
            z_TKR = h_TD.contiguous()[:, None].expand(-1, gates_TK.shape[1], -1)
        else:
            z_TKR = rows.contract(h_TD, down_ERD.transpose(1, 2))
        rows.expand(y_TO, B_EOR, z_TKR, gated=True, add=True)
    return z_TKR


def grouped_backward(
    grad_y_TO: Tensor,
    h_TD: Tensor,
    down_ERD: Tensor | None,
    B_EOR: Tensor,
    gates_TK: Tensor,
    expert_ids_TK: Tensor,
    z_TKR: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute the gradients of h, C (None without one), B and gates (fp32), from y's and `grouped_forward`'s z."""
    with torch.cuda.device_of(h_TD):
        rows = _Rows(h_TD, len(B_EOR), gates_TK, expert_ids_TK, scaling)
        grad_gates_TK = torch.empty_like(rows.gates_TK, dtype=torch.float32)
        grad_z_TKR = rows.contract(grad_y_TO, B_EOR, z_TKR, grad_gates_TK)
        grad_B_EOR = torch.empty_like(B_EOR)
        weighted_z_TKR = (z_TKR * (rows.gates_TK * scaling)[:, :, None]).to(h_TD.dtype)
        rows.sum(grad_B_EOR, grad_y_TO, weighted_z_TKR)
        if down_ERD is None:
            return grad_z_TKR.sum(dim=1), None, grad_B_EOR, grad_gates_TK
        grad_h_TD, grad_down_ERD = torch.empty_like(h_TD), torch.empty_like(down_ERD)
        rows.expand(grad_h_TD, down_ERD.transpose(1, 2), grad_z_TKR, gated=False, add=False)
        rows.sum(grad_down_ERD.transpose(1, 2), h_TD, grad_z_TKR)
    return grad_h_TD, grad_down_ERD, grad_B_EOR, grad_gates_TK


class _Rows:
    """Launches the kernels over the rows of one layer. A weight (E, W, R) is B, or C with its last axes swapped."""

    def __init__(self, h_TD: Tensor, num_experts: int, gates_TK: Tensor, expert_ids_TK: Tensor, scaling: float) -> None:
        from malora_dist.ops import grouped_kernels

        self.kernels: Any = grouped_kernels
        self.blocks = row_blocks(expert_ids_TK, num_experts)
        self.gates_TK, self.scaling, self.dtype = gates_TK.contiguous(), scaling, h_TD.dtype

    def contract(
        self,
        wide_TW: Tensor,
        weight_EWR: Tensor,
        z_TKR: Tensor | None = None,
        grad_gates_TK: Tensor | None = None,
    ) -> Tensor:
        """Compute weight_e^T wide_t, (T, K, R); with z in backward also times scale and gate, and the gates' own."""
        T, K = self.gates_TK.shape
        narrow_TKR = wide_TW.new_empty(T, K, weight_EWR.shape[2], dtype=self.dtype)
        arguments = self._arguments(wide_TW, weight_EWR, narrow_TKR) | self._block_arguments()
        z = narrow_TKR if z_TKR is None else z_TKR
        self.kernels.contract_rows[(arguments["num_blocks"], K)](
            **arguments,
            z_ptr=z,
            z_stride_t=z.stride(0),
            z_stride_k=z.stride(1),
            grad_gates_ptr=self.gates_TK if grad_gates_TK is None else grad_gates_TK,
            BACKWARD=z_TKR is not None,
        )
        return narrow_TKR

    def expand(self, wide_TW: Tensor, weight_EWR: Tensor, narrow_TKR: Tensor, *, gated: bool, add: bool) -> None:
        """Set wide_t to the sum of weight_e narrow_tk over k, on top of what it holds if `add`.

        One launch for each k, in order. Each rounds the sum so far to the dtype of `wide`.
        """
        arguments = self._arguments(wide_TW, weight_EWR, narrow_TKR) | self._block_arguments()
        grid = (arguments["num_blocks"], _blocks(wide_TW.shape[1], arguments["BLOCK_W"]))
        for k in range(self.gates_TK.shape[1]):
            self.kernels.expand_rows[grid](**arguments, k=k, GATED=gated, ADD=add or k > 0)

    def sum(self, weight_EWR: Tensor, wide_TW: Tensor, narrow_TKR: Tensor) -> None:
        """Set weight_e to the sum of wide_t narrow_tk^T over the rows of expert e."""
        arguments = self._arguments(wide_TW, weight_EWR, narrow_TKR)
        E, W, R = weight_EWR.shape
        grid = (_blocks(W, arguments["BLOCK_W"]), _blocks(R, arguments["BLOCK_R"]), E)
        self.kernels.sum_rows[grid](**arguments)

    def _arguments(self, wide_TW: Tensor, weight_EWR: Tensor, narrow_TKR: Tensor) -> dict[str, Any]:
        """Return the arguments of all three kernels."""
        E, W, R = weight_EWR.shape
        T, K = self.gates_TK.shape
        strides = {f"weight_stride_{axis}": weight_EWR.stride(i) for i, axis in enumerate("ewr")}
        strides |= {f"wide_stride_{axis}": wide_TW.stride(i) for i, axis in enumerate("tw")}
        strides |= {f"narrow_stride_{axis}": narrow_TKR.stride(i) for i, axis in enumerate("tk")}
        pointers = {"wide_ptr": wide_TW, "weight_ptr": weight_EWR, "narrow_ptr": narrow_TKR}
        pointers |= {"tokens_ptr": self.blocks.tokens_KT, "starts_ptr": self.blocks.starts_KE}
        tile = {
            "COMPUTE": self.kernels.COMPUTE_TYPES[self.dtype],
            "BLOCK_T": BLOCK_T,
            "BLOCK_W": _block(W, BLOCK_W_BYTES // max(wide_TW.itemsize, weight_EWR.itemsize)),
            "BLOCK_R": _block(R, MAX_BLOCK_R),
            "num_stages": 2,
        }
        return pointers | strides | tile | {"T": T, "K": K, "E": E, "W": W, "R": R}

    def _block_arguments(self) -> dict[str, Any]:
        """Return the further arguments of the two kernels that go over blocks of rows."""
        blocks = self.blocks
        return {
            "gates_ptr": self.gates_TK,
            "scaling": float(self.scaling),
            "experts_ptr": blocks.experts_KB,
            "firsts_ptr": blocks.firsts_KB,
            "num_blocks": blocks.experts_KB.shape[1],
        }


def _block(size: int, largest: int) -> int:
    """Return the power of two that covers `size`, within what a tile allows."""
    return min(largest, max(MIN_BLOCK, 1 << (size - 1).bit_length()))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
