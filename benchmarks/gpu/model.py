"""Stage model: a random Llama of 7 B in 4 bits and in bf16: time, kernels, waits and memory of a step, against PEFT.

A step is bound by the host where that needs longer to launch it (`host`) than the device to compute it (`kernels`).
"""

import gc
import sys
import time
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.measure import DEVICE, GPU, host_milliseconds, kernels, milliseconds, peak_gib, reset_peak, waits
from benchmarks.gpu.verdicts import Verdicts
from malora_dist.adapters.target_names import DEFAULT_TARGETS
from malora_dist.bench.local.losses import Batch
from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.local.peers.build import Base, build
from malora_dist.bench.local.trainee import Trainee

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES, VOCABULARY, ROWS, LENGTH = (LARGE, 32000, 4, 1024) if GPU else (TINY, 128, 2, 16)
IN_4_BITS = [("base", 0.0), ("peft_lora", 0.05), ("malora", 0.0), ("malora", 0.05)]
IN_BF16 = [("peft_lora", 0.05), ("malora", 0.05)]


def base_of(load_in_4bit: bool) -> Base:
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, use_cache=False)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Base.of(model, DEFAULT_TARGETS, load_in_4bit=load_in_4bit, peft=True)


def measure(base: Base, name: str, dropout: float) -> str:
    """Say what a step of a baseline costs; the fifteen longest kernels go to the log."""
    batch = Batch.of(ROWS, LENGTH, VOCABULARY, 0.25, DEVICE)
    trainee = Trainee(build(BASELINES[name], base, dropout=dropout), batch, loss="hf", dropout=dropout > 0)
    trainee()
    reset_peak()
    wall, peak = milliseconds(trainee, repeats=5, warmup=2), peak_gib()
    found, host = kernels(trainee), host_milliseconds(trainee, repeats=3)
    for kernel, spent, number in found.longest[:15]:
        print(f"{name} {dropout}: {spent:.1f} ms {number} x {kernel[:90]}")
    return (
        f"{wall:.0f} ms, host {host:.0f} ms, kernels {found.milliseconds:.0f} ms ({found.number}), "
        f"waits {waits(trainee)}, {ROWS * LENGTH / wall:.1f} tokens/ms, peak {peak:.1f} GiB"
    )


def main() -> int:
    verdicts, began = Verdicts(), time.monotonic()
    for load_in_4bit in (True, False):
        base = base_of(load_in_4bit)
        kind = "4-bit" if load_in_4bit else "bf16"
        verdicts.log(f"{kind} base, {ROWS} x {LENGTH} tokens, ready after {time.monotonic() - began:.0f} s")
        for name, dropout in IN_4_BITS if load_in_4bit else IN_BF16:
            title = f"{kind} {name} dropout {dropout:g}"
            verdicts.attempt(title, partial(measure, base, name, dropout))
            gc.collect()
        del base
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
