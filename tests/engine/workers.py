"""What the processes of the engine's tests do, and the one-process loop they are compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from malora_dist.data.encode import Sample
from malora_dist.data.loader import collate
from malora_dist.engine.build import OptimizerSettings, build_engine
from malora_dist.engine.forward import BalanceSettings, set_token_keys
from malora_dist.engine.step import Stepper
from malora_dist.methods import mixture_spec
from malora_dist.model import load_base_model, stay
from malora_dist.nn.inject import adapter_parameters, inject_adapters, mixture_layers
from malora_dist.parallel.groups import World, group_timeouts, replicate
from malora_dist.parallel.zero import gathered_adapter_state, partition_at_once, resident_bytes
from tests.reference import adamw_reference_step, balance_reference, clip_reference, loss_reference

STEPS, ACCUMULATION, SAMPLES = 5, 2, 4
LEARNING_RATE, MAX_NORM, COEFFICIENT, SEED = 1e-3, 0.5, 0.01, 7
# With Adam's usual epsilon, the rounding of gradients near 0 would grow a thousandfold in the weights.
EPSILON = 1e-5
# Prompt and response lengths of the samples of one step: counts from 0 to 60, so that one of two ranks has no
# supervised token in the first micro-batch and the ranks' token counts differ widely in the second.
LENGTHS = [(9, 0), (5, 0), (7, 60), (4, 1), (6, 1), (11, 0), (3, 30), (8, 2)]


def make_model(folder: Path) -> None:
    """A tiny Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.save_pretrained(folder)


def step_samples(step: int) -> list[Sample]:
    """The global batch of a step: ACCUMULATION micro-batches of SAMPLES each, over all ranks."""
    draw = np.random.default_rng(step)
    return [
        Sample(100 * step + i, i % 3, draw.integers(0, 96, prompt + response).astype(np.int32), prompt)
        for i, (prompt, response) in enumerate(LENGTHS)
    ]


def build_model(folder: str, case: dict[str, Any], world: World | None, config: dict[str, Any]) -> nn.Module:
    place = stay if world is None else partition_at_once(config) if case["zero_stage"] == 3 else replicate
    model = load_base_model(
        Path(folder),
        dtype=getattr(torch, case.get("dtype", "float32")),
        load_in_4bit=case.get("load_in_4bit", False),
        double_quant=True,
        reader=world is None or world.is_main,
        place=place,
    )
    if case.get("gradient_checkpointing") and world is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    spec = mixture_spec(case.get("method", "malora"), num_experts=4, r=3, shared_r=6)
    inject_adapters(model, spec, lora_dropout=0.1, seed=SEED)
    return model


def train_case(world: World, folder: str, output: str, case: dict[str, Any]) -> dict[str, Any]:
    """Five steps of one case on this process's share of the batches; the adapter goes to a file."""
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // world.size,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case["zero_stage"], "memory_efficient_linear": False},
    }
    if case["zero_stage"] == 3:
        # A tiny model's parameters would otherwise all stay whole on every rank.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = build_model(folder, case, world, config)
    whole = {name: p.numel() if p.numel() else p.ds_numel for name, p in model.named_parameters()}
    settings = OptimizerSettings(
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        epsilon=EPSILON,
        lr_scheduler_type="constant",
        warmup_steps=0,
        total_steps=STEPS,
    )
    engine = build_engine(model, config, settings, zero_stage=case["zero_stage"], timeout_seconds=60)
    stepper = Stepper(
        engine,
        world,
        task_names=["a", "b", "c"],
        balance=BalanceSettings(COEFFICIENT, "mean", "global"),
        normalization=case.get("normalization", "token"),
        zero_stage=case["zero_stage"],
        seed=SEED,
    )
    results = [stepper.step(step, _share(step_samples(step), world)) for step in range(1, STEPS + 1)]
    state = dict(gathered_adapter_state(engine.module))
    if world.is_main:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, output)
    parts = {name: p.ds_tensor.numel() for name, p in model.named_parameters() if hasattr(p, "ds_tensor")}
    return {
        "losses": [result.loss for result in results],
        "aux_losses": [result.aux_loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "task_losses": [result.task_loss_sums for result in results],
        "resident": resident_bytes(engine.module),
        "whole": whole,
        "parts": parts,
        "timeouts": group_timeouts(),
    }


def train_cases(world: World, folder: str, output: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All cases one after another in the same processes."""
    return {name: train_case(world, folder, f"{output}/{name}.safetensors", case) for name, case in cases.items()}


def _share(samples: Sequence[Sample], world: World) -> list[Any]:
    size = SAMPLES // world.size
    first = [(micro * world.size + world.rank) * size for micro in range(ACCUMULATION)]
    return [collate(samples[start : start + size]) for start in first]


def reference_run(folder: str, case: dict[str, Any]) -> dict[str, Any]:
    """The same five steps in one process without DeepSpeed, packing or ranks: one sample a forward, naive sums."""
    model = build_model(folder, case, None, {}).train()
    names = [name for name, _ in adapter_parameters(model)]
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses, aux_losses, grad_norms = [], [], []
    for step in range(1, STEPS + 1):
        samples = step_samples(step)
        ce, aux = zip(*[_micro_batch(model, samples[i : i + SAMPLES], step) for i in (0, SAMPLES)], strict=True)
        tasks = [[[[s.task_id for s in samples[i : i + SAMPLES]] for i in (0, SAMPLES)]]]
        loss = loss_reference([[list(ce)]], case.get("normalization", "token"), tasks)[0]
        balance = torch.stack(aux).mean()
        gradients = torch.autograd.grad(loss + COEFFICIENT * balance, parameters)
        clipped, norm = clip_reference(gradients, MAX_NORM)
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(parameters, clipped, strict=True)):
                new, *moments_i = adamw_reference_step(
                    parameter,
                    gradient,
                    *moments[i],
                    step,
                    learning_rate=LEARNING_RATE,
                    epsilon=EPSILON,
                    weight_decay=0.01,
                )
                parameter.copy_(new)
                moments[i] = (moments_i[0], moments_i[1])
        losses.append(float(loss.detach()))
        aux_losses.append(float(balance.detach()))
        grad_norms.append(float(norm))
    state = {name: parameter.detach() for name, parameter in zip(names, parameters, strict=True)}
    return {"losses": losses, "aux_losses": aux_losses, "grad_norms": grad_norms, "state": state}


def _micro_batch(model: nn.Module, samples: Sequence[Sample], step: int) -> tuple[list[Tensor], Tensor]:
    """Cross-entropies of each sample, run on its own, and the balance loss over all their tokens."""
    layers = [layer for _, layer in mixture_layers(model)]
    ce, routings = [], []
    for sample in samples:
        set_token_keys(model, collate([sample]), SEED, step)
        ids = torch.as_tensor(sample.input_ids, dtype=torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        targets = ids[sample.prompt_length :]
        predicted = logits[sample.prompt_length - 1 : len(ids) - 1]
        ce.append(nn.functional.cross_entropy(predicted, targets, reduction="none"))
        routings.append([layer.routing for layer in layers])
    if routings[0][0] is None:
        return ce, torch.zeros(())
    losses = [
        balance_reference(
            torch.cat([routing[i].probs_TE for routing in routings]),
            torch.cat([routing[i].expert_ids_TK for routing in routings]),
        )
        for i in range(len(layers))
    ]
    return ce, torch.stack(losses).mean()
