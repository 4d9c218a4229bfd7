"""`malora bench roofline`: how long a training step must take at least, by formula. Needs no torch and no GPU.

The bound of a kernel is the longer of computing and moving; the bound of a step is their sum, one after another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from malora_dist.adapters.methods import MixtureSpec, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters, match_budget
from malora_dist.adapters.target_names import DEFAULT_TARGETS, READERS
from malora_dist.bench.kernels import PHASES, Device, Form, Kernel, Sizes, adapter_kernels, base_kernels
from malora_dist.plan.shapes import Linear, ModelShape

# How many linears read the tensor that a linear reads.
SHARING = {name: list(READERS.values()).count(readers) for name, readers in READERS.items()}
LOGIT_BYTES = 24
PAPER = {"molora_over_malora": 1.2, "malora_over_lora": 1.075}


@dataclass(frozen=True)
class Subject:
    """A method and how it is computed; without a spec the frozen base."""

    name: str
    spec: MixtureSpec | None
    form: Form = Form()  # noqa: B008  # frozen


@dataclass(frozen=True)
class Roofline:
    """A model's step of `tokens` in samples of `length`, on a device.

    nf4: linears are unpacked from 4 bits. dropout: the inputs of adapters are dropped. attention: `varlen` computes
    each sample alone, `sdpa` the whole row under a mask where it holds several.
    """

    shape: ModelShape
    tokens: int
    length: int
    device: Device
    nf4: bool = False
    dropout: bool = False
    attention: str = "varlen"

    @property
    def masked(self) -> bool:
        return self.attention == "sdpa" and self.length < self.tokens

    @property
    def adapted(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.shape.linears if linear.name in DEFAULT_TARGETS)

    def subjects(self) -> list[Subject]:
        """Return the frozen base, MALoRA in all its forms, LoRA at equal trainable parameters and r 64, MoLoRA r 8."""
        malora, molora = mixture_spec("malora"), mixture_spec("molora", r=8)
        sizes = [(linear.in_features, linear.out_features) for linear in self.adapted]
        lora = match_budget("lora", sizes, sum(count_parameters(malora, *size) for size in sizes))
        ours, fp32, joined = (Form(router=router) for router in ("ours", "fp32", "joined"))
        dispatched = Form(chosen_rows=True, late_gates=True)
        return [
            Subject("base", None),
            Subject(f"lora r {lora.r}", lora),
            Subject("lora r 64", mixture_spec("lora", r=64)),
            Subject(f"peft_lora r {lora.r}", lora, Form(eager=True)),
            Subject("malora", malora, ours),
            Subject("malora_fused", malora, replace(ours, fused=True)),
            Subject("malora_grouped", malora, replace(ours, chosen_rows=True)),
            Subject("malora_fp32_router", malora, fp32),
            Subject("malora_apart", malora),
            Subject("malora_joined", malora, joined),
            Subject("malora_joined_fused", malora, replace(joined, fused=True)),
            Subject("malora_dispatched", malora, dispatched),
            Subject("molora", molora, fp32),
            Subject("molora_dispatched", molora, dispatched),
        ]

    def linear_kernels(self, subject: Subject, linear: Linear, tokens: int | None = None) -> list[Kernel]:
        """Return the kernels of one linear: its base and its adapter."""
        sharing = SHARING.get(linear.name, 1)
        sizes = Sizes(tokens or self.tokens, linear.in_features, linear.out_features, sharing=sharing)
        kernels = list(base_kernels(sizes, nf4=self.nf4))
        if subject.spec is not None and linear in self.adapted:
            kernels += adapter_kernels(subject.spec, sizes, replace(subject.form, dropout=self.dropout))
        return kernels

    def step_kernels(self, subject: Subject) -> list[Kernel]:
        """Return the kernels of the whole step; a kernel's count is the number of blocks in which it runs."""
        kernels = [
            replace(kernel, count=kernel.count * self.shape.copies(linear))
            for linear in self.shape.linears
            for kernel in self.linear_kernels(subject, linear)
        ]
        block = [*_attention(self.shape, self.tokens, self.length, masked=self.masked)]
        block += _rest_of_block(self.shape, self.tokens)
        layers = [replace(kernel, count=kernel.count * self.shape.num_layers) for kernel in block]
        return [*kernels, *layers, *_head(self.shape, self.tokens)]

    def seconds(self, kernels: Sequence[Kernel], phase: str | None = None) -> float:
        """Return the bound in seconds of the kernels of a phase, or of all."""
        return sum(kernel.seconds(self.device) for kernel in kernels if phase in (None, kernel.phase))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the step of each subject, and every kernel of each distinct linear."""
        steps, linears = [], []
        for subject in self.subjects():
            kernels = self.step_kernels(subject)
            phases = {phase: self.seconds(kernels, phase) for phase in PHASES}
            steps.append({"name": subject.name, "seconds": self.seconds(kernels), "phases": phases, **totals(kernels)})
            for linear in distinct(self.adapted):
                for kernel in self.linear_kernels(subject, linear):
                    case = {"name": subject.name, "case": title(linear), "seconds": kernel.seconds(self.device)}
                    linears.append({**case, **asdict(kernel)})
        return {
            "model": self.shape.source,
            "tokens": self.tokens,
            "length": self.length,
            "attention": self.attention,
            "base": "nf4" if self.nf4 else "full",
            "dropout": self.dropout,
            "device": asdict(self.device),
            "steps": steps,
            "kernels": linears,
            "paper": PAPER,
        }


def _attention(shape: ModelShape, tokens: int, length: int, *, masked: bool, itemsize: int = 2) -> Iterator[Kernel]:
    """Yield causal attention without stored scores. With a mask: over all pairs of the row, k and v for every head."""
    heads = shape.num_heads * shape.head_dim
    kv_heads = shape.num_heads if masked else shape.num_kv_heads
    numbers = tokens * (heads + 2 * kv_heads * shape.head_dim + heads) + (tokens**2 if masked else 0)
    pairs = tokens**2 if masked else tokens * length / 2
    # Backward computes the scores again: 5 products against forward's 2.
    for phase, share in (("forward", 1.0), ("dx", 2.5)):
        yield Kernel(phase, "attention", share * 4 * pairs * heads, share * numbers * itemsize)


def _rest_of_block(shape: ModelShape, tokens: int, itemsize: int = 2) -> Iterator[Kernel]:
    """Yield norms, rotary, residuals, SwiGLU and sums of gradients."""
    q_k_v = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    forward = 2 * 2 * hidden + 2 * 3 * hidden + 2 * q_k_v + 3 * inner
    # Linears that share an input have their dx added up: three kernels a block.
    dx = 2 * 3 * hidden + 2 * 3 * hidden + 2 * q_k_v + 5 * inner + 3 * 3 * hidden
    for phase, numbers in (("forward", forward), ("dx", dx)):
        yield Kernel(phase, "elementwise", 0, tokens * numbers * itemsize)


def _head(shape: ModelShape, tokens: int) -> Iterator[Kernel]:
    """Yield the logits of all tokens, their dx, and the cross-entropy as transformers computes it, in fp32."""
    sizes = Sizes(tokens, shape.hidden_size, shape.vocab_size)
    yield from (replace(kernel, part="head") for kernel in base_kernels(sizes))
    for phase in ("forward", "dx"):
        yield Kernel(phase, "loss", 0, tokens * shape.vocab_size * LOGIT_BYTES / 2)


def totals(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Sum the FLOPs and bytes of all kernels."""
    return {
        "flops": sum(kernel.count * kernel.flops for kernel in kernels),
        "nbytes": sum(kernel.count * kernel.nbytes for kernel in kernels),
    }


def distinct(linears: Sequence[Linear]) -> list[Linear]:
    """Return the first linear of each size."""
    sizes = {(linear.in_features, linear.out_features): linear for linear in reversed(linears)}
    return [linear for linear in linears if linear in sizes.values()]


def title(linear: Linear) -> str:
    """Format the linear's size."""
    return f"{linear.in_features} -> {linear.out_features}"
