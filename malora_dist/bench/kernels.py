"""FLOPs and bytes of every kernel that one linear and its adapter need in a training step. Arithmetic only.

A kernel reads each of its inputs once and writes each of its outputs once; nothing stays in a cache between two
kernels. So sizes are bounds from below for an implementation made of these kernels.
Shape letters: T tokens, I in_features, O out_features, E experts, K top_k, R r, D shared_r. 2 FLOPs a multiplication.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.parameter_counts import count_parameters
from malora_dist.ops.nf4_layout import nf4_bytes
from malora_dist.plan.parameters import FP32

PHASES = ("forward", "dx", "dw", "optimizer")
# AdamW reads weight, gradient and both moments and writes all but the gradient; about 12 operations a number.
ADAMW_NUMBERS, ADAMW_FLOPS = 7, 12


@dataclass(frozen=True)
class Device:
    """Peak FLOP/s in the base's dtype and bytes/s of memory."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Kernel:
    """`count` kernels alike. phase: one of PHASES; part: what it belongs to, `base`, `down`, `router`, `core`, ..."""

    phase: str
    part: str
    flops: float
    nbytes: float
    count: int = 1

    def seconds(self, device: Device) -> float:
        """Return the lower bound of all `count` kernels in seconds: the longer of computing and moving."""
        return self.count * max(self.flops / device.flops, self.nbytes / device.bandwidth)

    def is_compute_bound(self, device: Device) -> bool:
        return self.flops / device.flops > self.nbytes / device.bandwidth


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an adapter is computed; the default is dense, all experts in wide products with the gates as a mask.

    chosen_rows: products over the rows of chosen experts only, sorted by expert. late_gates: there, the gates weigh the
    experts' O-wide outputs, as mixtures of experts are usually written, not their r-wide inputs.
    router: `apart` is a product of its own, `fp32` one over an fp32 copy of x, `joined` columns of the product with
    S_A, `ours` (this package with an S_A; without one it is `fp32`) `fp32` forward and `joined` backward, which with
    dropout is a product of its own there too. fused: linears with one input (q k v, gate up) have one such product,
    and one dropped input. eager: scaling and sum are kernels of their own and adapters are kept in the base's dtype, as
    in PEFT's LoRA. dropout: the input of the adapter is dropped, by a mask that is made again in each kernel that needs
    it, or by a stored one as in nn.Dropout (eager, late_gates).
    """

    chosen_rows: bool = False
    late_gates: bool = False
    router: str = "apart"
    fused: bool = False
    eager: bool = False
    dropout: bool = False

    @property
    def stores_mask(self) -> bool:
        return self.eager or self.late_gates


@dataclass(frozen=True)
class Sizes:
    """A linear's work: T tokens of I numbers to O, `itemsize` bytes each (2 is bf16); `sharing` linears read one x."""

    T: int
    I: int  # noqa: E741  # the project's letter for in_features
    O: int  # noqa: E741
    itemsize: int = 2
    sharing: int = 1

    def gemm(self, phase: str, part: str, rows: int, inner: int, columns: int, *, adds: bool = False) -> Kernel:
        """Return the kernel of (rows, inner) x (inner, columns), into a new tensor or added to an existing one."""
        numbers = rows * inner + inner * columns + rows * columns * (2 if adds else 1)
        return Kernel(phase, part, 2 * rows * inner * columns, numbers * self.itemsize)

    def moves(self, phase: str, part: str, numbers: int) -> Kernel:
        """Return an elementwise kernel or a gather that reads and writes `numbers` numbers in all."""
        return Kernel(phase, part, 0, numbers * self.itemsize)


def base_kernels(sizes: Sizes, *, nf4: bool = False) -> Iterator[Kernel]:
    """Yield the frozen product and its dx; a 4-bit weight is unpacked before each."""
    T, I, O = sizes.T, sizes.I, sizes.O  # noqa: E741
    yield sizes.gemm("forward", "base", T, I, O)
    yield sizes.gemm("dx", "base", T, O, I)
    if nf4:
        for phase in ("forward", "dx"):
            yield Kernel(phase, "unpack", 0, nf4_bytes(I * O, double_quant=False) + I * O * sizes.itemsize)


def adapter_kernels(spec: MixtureSpec, sizes: Sizes, form: Form) -> Iterator[Kernel]:
    """Yield all kernels of an adapter, without the base's."""
    if form.chosen_rows:
        yield from _chosen_rows(spec, sizes, form)
    else:
        yield from _all_rows(spec, sizes, form)
    if spec.structure.routed:
        yield from _router(sizes, spec.num_experts, form)
    if form.dropout:
        yield from _dropout(sizes, form)
    yield from _parameters(spec, sizes, itemsize=sizes.itemsize if form.eager else FP32)


def _all_rows(spec: MixtureSpec, sizes: Sizes, form: Form) -> Iterator[Kernel]:
    T, O, wide = sizes.T, sizes.O, spec.num_experts * spec.r  # noqa: E741
    yield from _down(spec, sizes, wide if spec.shared_r is None else spec.shared_r, form)
    if spec.structure.expert_down:
        assert spec.shared_r is not None
        yield sizes.gemm("forward", "core", T, spec.shared_r, wide)
        yield sizes.gemm("dx", "core", T, wide, spec.shared_r)
        yield sizes.gemm("dw", "core", wide, T, spec.shared_r)
    yield sizes.gemm("forward", "up", T, wide, O, adds=not form.eager)
    yield sizes.gemm("dx", "up", T, O, wide)
    yield sizes.gemm("dw", "up", O, T, wide)
    if spec.structure.routed:
        yield sizes.moves("forward", "gates", 2 * T * wide)
        # One kernel: of the gradient and z, both weighted, and the gradient of the gates.
        yield sizes.moves("dx", "gates", 4 * T * wide)
    if form.eager:
        yield sizes.moves("forward", "scale and add", (2 + 3) * T * O)
        yield sizes.moves("dx", "scale and add", 2 * T * O + 3 * T * sizes.I)


def _down(spec: MixtureSpec, sizes: Sizes, columns: int, form: Form) -> Iterator[Kernel]:
    """Yield the product of x with `columns` columns for all tokens, and the router's columns if `joined`.

    A linear of a fused product has its share of the traffic of x.
    """
    T, I, routers = sizes.T, sizes.I, spec.num_experts if spec.structure.routed else 0  # noqa: E741
    forward = columns + (routers if form.router == "joined" else 0)
    together = form.router in ("joined", "ours") and not form.dropout
    backward = columns + (routers if together else 0)
    shared = T * I * (1 - 1 / sizes.sharing) * sizes.itemsize if form.fused else 0
    # The gradient of a dropped input is masked before it is added.
    adds = not form.eager and not form.dropout
    for kernel, reads in (
        (sizes.gemm("forward", "down", T, I, forward), 1),
        (sizes.gemm("dx", "down", T, backward, I, adds=adds), 2 if adds else 1),
        (sizes.gemm("dw", "down", backward, T, I), 1),
    ):
        yield replace(kernel, nbytes=kernel.nbytes - reads * shared)


def _chosen_rows(spec: MixtureSpec, sizes: Sizes, form: Form) -> Iterator[Kernel]:
    """Yield the kernels of K rows per token: permuted by a gather, unpermuted by a gather and a sum over K."""
    T, O, rows = sizes.T, sizes.O, sizes.T * spec.top_k  # noqa: E741
    width = spec.expert_width(sizes.I)
    if spec.shared_r is not None:
        yield from _down(spec, sizes, spec.shared_r, form)
    yield sizes.moves("forward", "dispatch", T * width + rows * width)
    if spec.has_expert_down:
        yield from _expert_products(spec, sizes, "down" if spec.shared_r is None else "core", width, spec.r)
    yield from _expert_products(spec, sizes, "up", spec.r, O)
    # Late gates make the sum of the experts a tensor of its own, which is then added to the base's output.
    yield sizes.moves("forward", "combine", rows * O + (4 if form.late_gates else 2) * T * O)
    yield sizes.moves("dx", "dispatch", T * O + rows * O + (rows * O if form.late_gates else 0))
    # x of a method without S_A: the rows' gradients are added to the base's dx.
    yield sizes.moves("dx", "combine", rows * width + (2 if spec.shared_r is None else 1) * T * width)
    if not form.late_gates:
        yield sizes.moves("forward", "gates", 2 * rows * spec.r)
        yield sizes.moves("dx", "gates", 3 * rows * spec.r)


def _expert_products(spec: MixtureSpec, sizes: Sizes, part: str, inner: int, columns: int) -> Iterator[Kernel]:
    """Yield one grouped product in each direction: T K rows, the weights of all E experts."""
    rows = sizes.T * spec.top_k
    numbers = rows * (inner + columns) + spec.num_experts * inner * columns
    for phase in ("forward", "dx", "dw"):
        yield Kernel(phase, part, 2 * rows * inner * columns, numbers * sizes.itemsize)


def _router(sizes: Sizes, num_experts: int, form: Form) -> Iterator[Kernel]:
    """Yield the logits where they are a product of their own; softmax and choice over (T, E) in fp32."""
    T, I, E = sizes.T, sizes.I, num_experts  # noqa: E741
    if form.router in ("fp32", "ours"):
        x_numbers = T * I / (sizes.sharing if form.fused else 1)
        yield Kernel("forward", "fp32 copy of x", 0, x_numbers * (sizes.itemsize + FP32))
        yield Kernel("forward", "router", 2 * T * I * E, FP32 * (x_numbers + E * I + T * E))
    if form.router == "apart":
        yield sizes.gemm("forward", "router", T, I, E)
    if form.router in ("fp32", "apart") or form.dropout:
        shared = T * I * (1 - 1 / sizes.sharing) * sizes.itemsize if form.fused else 0
        dx, dw = sizes.gemm("dx", "router", T, E, I, adds=True), sizes.gemm("dw", "router", E, T, I)
        yield replace(dx, nbytes=dx.nbytes - 2 * shared)
        yield replace(dw, nbytes=dw.nbytes - shared)
    for phase in ("forward", "dx"):
        yield Kernel(phase, "routing", 0, 3 * T * E * FP32)


def _dropout(sizes: Sizes, form: Form) -> Iterator[Kernel]:
    """Yield the dropped input, forward and for the gradient of weights, the mask on its gradient; if fused a share.

    A stored mask has a byte a number, and keeps the dropped input for backward.
    """
    numbers = sizes.T * sizes.I / (sizes.sharing if form.fused else 1)
    mask = numbers if form.stores_mask else 0
    yield Kernel("forward", "dropout", 0, 2 * numbers * sizes.itemsize + mask)
    yield Kernel("dx", "dropout", 0, (2 if form.stores_mask else 3) * numbers * sizes.itemsize + mask)
    if not form.stores_mask:
        yield Kernel("dw", "dropout", 0, 2 * numbers * sizes.itemsize)


def _parameters(spec: MixtureSpec, sizes: Sizes, *, itemsize: int) -> Iterator[Kernel]:
    """Yield the casts of fp32 factors to the base's dtype and of their gradients back, and AdamW."""
    numbers = count_parameters(spec, sizes.I, sizes.O)
    if itemsize != sizes.itemsize:
        for phase in ("forward", "dw"):
            yield Kernel(phase, "casts", 0, numbers * (itemsize + sizes.itemsize))
    yield Kernel("optimizer", "adamw", ADAMW_FLOPS * numbers, ADAMW_NUMBERS * itemsize * numbers)
