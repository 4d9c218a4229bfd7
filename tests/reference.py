"""Naive twins of everything the method defines: plain loops, one formula each, differentiable by autograd.

Equation numbers are those of the MALoRA paper (arXiv 2410.22782). Shape letters: T tokens, I in_features,
O out_features, E experts, K top-k, R r, D shared_r. Meant to run in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------- initialisation


def kaiming_reference(num_experts: int, shared_r: int, in_features: int, seed: int) -> Tensor:
    """K_t (E, D, I), Kaiming-uniform with a = sqrt(5).

    Bound sqrt(6 / ((1 + a^2) I)) = 1 / sqrt(I), variance 1 / (3 I).
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_experts, shared_r, in_features, generator=generator, dtype=torch.float64)
    return (2 * uniform - 1) / math.sqrt(in_features)


def init_reference(K_EDI: Tensor, r: int, beta: float) -> tuple[Tensor, Tensor]:
    """Eqs. 8-10: SVD of each K_t, S_A = beta V_0 (D, I), P_t = (U_t Sigma_t)[:r] / beta (E, r, D).

    Needs r <= D <= I. The signs of singular vectors are free, so compare products: P_0 S_A = K_0[:r].
    """
    assert r <= K_EDI.shape[1] <= K_EDI.shape[2]
    svds = [torch.linalg.svd(K_DI, full_matrices=False) for K_DI in K_EDI]
    P_ERD = torch.stack([(U @ torch.diag(S))[:r] / beta for U, S, _ in svds])
    return beta * svds[0].Vh, P_ERD


# ------------------------------------------------------------------------------------------ routing and adapter


def scaling_reference(rule: str, lora_alpha: float, r: int, gates: Sequence[float]) -> float:
    """s by a rule, of the gates that a token's chosen experts have: those of a uniform router at the start."""
    lora = lora_alpha / r
    return {
        "lora": lora,
        "rslora": lora_alpha / r**0.5,
        "gate_norm": lora / sum(gate**2 for gate in gates) ** 0.5,
        "gate_sum": lora / sum(gates),
    }[rule]


def routing_reference(
    x_TI: Tensor, gate_EI: Tensor, top_k: int, normalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 4, G = TopK(softmax(W_g x)): gates (T, K), expert ids (T, K), probabilities (T, E).

    All in fp32 or better. The K kept gates keep their softmax value unless `normalize`. Ties: lower id first.
    """
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    probs_TE = torch.softmax(x_TI.to(dtype) @ gate_EI.to(dtype).T, dim=-1)
    num_experts = gate_EI.shape[0]
    chosen = [sorted(range(num_experts), key=lambda e: (-p[e], e))[:top_k] for p in probs_TE.tolist()]
    expert_ids_TK = torch.tensor(chosen, dtype=torch.int64).reshape(-1, top_k)
    gates_TK = probs_TE.gather(1, expert_ids_TK)
    if normalize:
        gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)
    return gates_TK, expert_ids_TK, probs_TE


def _expert_reference(method: str, tensors: Mapping[str, Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Delta W_e x of a token: B_e P_e S_A x (eq. 7) for malora, B_e S_A x for hydralora, else B_e A_e x (1, 3)."""
    if method == "hydralora":
        return lambda e, x: tensors["B"][e] @ (tensors["shared_A"] @ x)
    if method == "malora":
        return lambda e, x: tensors["B"][e] @ (tensors["P"][e] @ (tensors["shared_A"] @ x))
    if method in ("molora", "lora"):
        return lambda e, x: tensors["B"][e] @ (tensors["A"][e] @ x)
    raise ValueError(f"no reference for method {method!r}")


def adapter_reference(
    method: str,
    tensors: Mapping[str, Tensor],
    *,
    top_k: int,
    scaling: float,
    normalize: bool = False,
    dropout_p: float = 0.0,
    router_input: str = "x",
) -> Tensor:
    """Eq. 5 with the frozen output: y_t = base_t + scaling * sum_k g_tk Delta W_{e_tk} x_t, (T, O), token by token.

    `tensors`: x (T, I), base (T, O), B (E, O, R); malora: gate (E, I), shared_A (D, I), P (E, R, D);
    molora: gate (E, I), A (E, R, I); hydralora: gate (E, I), shared_A (R, I), and all experts whatever top_k says;
    lora: A (1, R, I), no gate. The router reads x, or with router_input h what S_A makes for the experts (gate then
    (E, D)); the experts read
    x * mask / (1 - dropout_p) with mask (T, I), or x where there is no mask.
    """
    x_TI, base_TO, mask_TI = tensors["x"], tensors["base"], tensors.get("mask")
    dropped_TI = x_TI if mask_TI is None else x_TI * mask_TI / (1 - dropout_p)
    if method == "lora":
        gates_TK, expert_ids_TK = x_TI.new_ones(len(x_TI), 1), torch.zeros(len(x_TI), 1, dtype=torch.int64)
    else:
        top_k = len(tensors["gate"]) if method == "hydralora" else top_k
        read = x_TI if router_input == "x" else dropped_TI @ tensors["shared_A"].T
        gates_TK, expert_ids_TK, _ = routing_reference(read, tensors["gate"], top_k, normalize)
    expert = _expert_reference(method, tensors)
    y_TO = []
    for t in range(len(x_TI)):
        delta = sum(g * expert(int(e), dropped_TI[t]) for g, e in zip(gates_TK[t], expert_ids_TK[t], strict=True))
        y_TO.append(base_TO[t] + scaling * delta)
    return torch.stack(y_TO) if y_TO else base_TO.clone()


def dora_reference(
    tensors: Mapping[str, Tensor], weight_OI: Tensor, bias_O: Tensor | None, *, scaling: float, dropout_p: float = 0.0
) -> Tensor:
    """y = W x + b + (g - 1) W h + g s B A h with g = m / ||W + s B A|| by rows, the norm a constant, (T, O).

    h = x * mask / (1 - dropout_p), or x without a mask. `tensors`: x (T, I), A (1, R, I), B (1, O, R), magnitude (O,).
    """
    x_TI, A_RI, B_OR = tensors["x"], tensors["A"][0], tensors["B"][0]
    h_TI = x_TI * tensors["mask"] / (1 - dropout_p) if "mask" in tensors else x_TI
    adapted_OI = weight_OI + scaling * B_OR @ A_RI
    norm_O = torch.stack([row.square().sum().sqrt() for row in adapted_OI]).detach()
    factor_O = tensors["magnitude"] / norm_O
    base_TO = x_TI @ weight_OI.T + (0 if bias_O is None else bias_O)
    return base_TO + (factor_O - 1) * (h_TI @ weight_OI.T) + factor_O * scaling * (h_TI @ A_RI.T @ B_OR.T)


def packed_attention_reference(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, lengths: Sequence[int], scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of each sample alone, token by token, (T, H, D); H heads share G heads of k and v.

    With a window a token sees so many tokens, itself and those before it.
    """
    shared = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (states.repeat_interleave(shared, dim=1) for states in (k_TGD, v_TGD))
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            first = start if window is None else max(start, t + 1 - window)
            scores_HS = torch.einsum("hd,shd->hs", q_THD[t], k_THD[first : t + 1]) * scale
            rows.append(torch.einsum("hs,shd->hd", scores_HS.softmax(dim=-1), v_THD[first : t + 1]))
        start += length
    return torch.stack(rows)


def gradients(output: Tensor, inputs: Sequence[Tensor], output_gradient: Tensor) -> tuple[Tensor, ...]:
    """d<output, output_gradient> / d input for each input; zero, not None, for what took no part."""
    return torch.autograd.grad(output, inputs, output_gradient, allow_unused=True, materialize_grads=True)


def balance_reference(
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    mask_T: Tensor | None = None,
    earlier_ids_TK: Tensor | None = None,
) -> Tensor:
    """N sum_e f_e P_e with f_e = choices of expert e / (k T), no gradient, and P_e = its mean probability.

    Only tokens where mask_T is true count; without any the loss is 0. The choices are those of earlier tokens if they
    are given; of no earlier token, all experts have been chosen alike.
    """
    counted = [t for t in range(len(probs_TE)) if mask_T is None or bool(mask_T[t])]
    if not counted:
        return probs_TE.sum() * 0.0
    num_experts = probs_TE.shape[1]
    choices_TK = expert_ids_TK[counted] if earlier_ids_TK is None else earlier_ids_TK
    chosen = [int(e) for experts in choices_TK for e in experts] or list(range(num_experts))
    loss = probs_TE.new_zeros(())
    for e in range(num_experts):
        loss = loss + chosen.count(e) / len(chosen) * sum(probs_TE[t, e] for t in counted) / len(counted)
    return num_experts * loss


def z_loss_reference(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of log(sum_e exp(l_e))^2 (ST-MoE, arXiv 2202.08906, eq. 5), token by token."""
    return sum((torch.log(sum(torch.exp(l_E))) ** 2 for l_E in logits_TE), logits_TE.new_zeros(())) / len(logits_TE)


def coefficient_reference(schedule: str, coefficient: float, step: int, last_step: int) -> float:
    """Weight of the balance loss in optimizer step number `step`, from 1."""
    if schedule == "linear":
        return coefficient * max(0, last_step - step + 1) / last_step
    return 0.0 if schedule == "until" and step > last_step else coefficient


# ------------------------------------------------------------------------------------------- expert parallelism


def expert_ranks_reference(expert_ids_TK: Sequence[Sequence[int]], num_experts: int, num_ranks: int) -> list[list[int]]:
    """Of each token, the ranks that hold an expert of it, rising; rank w holds the w-th of `num_ranks` equal runs."""
    size = num_experts // num_ranks
    runs = [range(w * size, (w + 1) * size) for w in range(num_ranks)]
    return [[w for w, run in enumerate(runs) if any(e in run for e in experts)] for experts in expert_ids_TK]


def exchange_bytes_reference(
    expert_ids: Sequence[Sequence[Sequence[int]]],
    num_experts: int,
    *,
    in_width: int,
    out_width: int,
    itemsize: int,
    gate_itemsize: int,
    forwards: int = 1,
    backwards: int = 1,
) -> list[dict[str, int]]:
    """Bytes each rank sends for one layer, by phase, message by message; `expert_ids[rank]` (T, K) of its own tokens.

    A token sends each other rank with an expert of it one row, with a gate per expert there, and gets one row back;
    in backward the gradients of both go the opposite ways. Before that every rank sends each other one an 8-byte count.
    """
    num_ranks = len(expert_ids)
    out = in_width * itemsize + num_experts // num_ranks * gate_itemsize
    back = out_width * itemsize
    sent = [dict.fromkeys(("counts", "rows", "returns", "grad_returns", "grad_rows"), 0) for _ in range(num_ranks)]
    for rank in range(num_ranks):
        sent[rank]["counts"] += forwards * 8 * (num_ranks - 1)
        for expert_ranks in expert_ranks_reference(expert_ids[rank], num_experts, num_ranks):
            for other in expert_ranks:
                if other != rank:
                    sent[rank]["rows"] += forwards * out
                    sent[other]["returns"] += forwards * back
                    sent[rank]["grad_returns"] += backwards * back
                    sent[other]["grad_rows"] += backwards * out
    return sent


# ----------------------------------------------------------------------------------------------- quantisation

# 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes stores it.
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def dynamic_map_reference() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type (arXiv 2110.02861), sorted.

    0, 1 and, for i = 0..6, both signs of 10^(i-6) times the centres of 2^i equal bins of [0.1, 1].
    """
    values = [0.0, 1.0]
    for i in range(7):
        width = 0.9 / 2**i
        centres = [10.0 ** (i - 6) * (0.1 + width * (j + 0.5)) for j in range(2**i)]
        values += centres + [-c for c in centres]
    return torch.tensor(sorted(values), dtype=torch.float64)


def blockwise_reference(flat: Tensor, codes: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Index of the code nearest to each number / its block's largest magnitude (n,), and those magnitudes (blocks,)."""
    indices, absmax = [], []
    for block in flat.split(blocksize):
        scale = block.abs().max()
        scaled = block / scale if scale > 0 else block
        indices.append((scaled[:, None] - codes[None, :]).abs().argmin(dim=1))
        absmax.append(scale)
    return torch.cat(indices), torch.stack(absmax)


def blockwise_values_reference(indices: Tensor, absmax: Tensor, codes: Tensor, blocksize: int) -> Tensor:
    """codes[index] * absmax of the block, flat."""
    return codes[indices] * absmax.repeat_interleave(blocksize)[: len(indices)]


def nf4_reference(weight: Tensor, blocksize: int = 64, double_quant: bool = False) -> Tensor:
    """`weight` after NF4 and back, float64: row-major blocks of 64, each divided by its absmax, nearest of 16 codes.

    With `double_quant` the absmax less their mean are stored in the dynamic 8-bit type, in blocks of 256. Where such a
    number lies within about 3e-5 of halfway between two codes, bitsandbytes' CPU kernel may take the farther one.
    """
    codes = torch.tensor(NF4_CODES, dtype=torch.float64)
    indices, absmax = blockwise_reference(weight.detach().double().flatten(), codes, blocksize)
    if double_quant:
        offset, dynamic = absmax.mean(), dynamic_map_reference()
        absmax = blockwise_values_reference(*blockwise_reference(absmax - offset, dynamic, 256), dynamic, 256) + offset
    return blockwise_values_reference(indices, absmax, codes, blocksize).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------- a training step

SampleLosses = Sequence[float] | Tensor
MicroBatchLosses = Sequence[SampleLosses]
StepLosses = Sequence[Sequence[MicroBatchLosses]]  # [rank][micro-batch][sample][supervised token]


def loss_reference(
    steps: Sequence[StepLosses],
    normalization: str,
    task_ids: Sequence[Sequence[Sequence[Sequence[int]]]] | None = None,
) -> list[Tensor]:
    """The loss each optimizer step must see, from its tokens' cross-entropies [step][rank][micro-batch][sample][token].

    token: sum / number of supervised tokens. sample: mean over samples with a supervised token of their token mean.
    task: mean over the tasks with a supervised token of their token mean; `task_ids` [step][rank][micro-batch][sample].
    A step without a supervised token is 0.
    """
    results = []
    for s, step in enumerate(steps):
        groups: dict[int, list[Tensor]] = {}
        samples = [sample for rank in step for micro_batch in rank for sample in micro_batch]
        tasks = [task for rank in task_ids[s] for micro_batch in rank for task in micro_batch] if task_ids else []
        keys = {"token": [0] * len(samples), "sample": range(len(samples)), "task": tasks}[normalization]
        for key, sample in zip(keys, samples, strict=True):
            groups.setdefault(key, []).extend(torch.as_tensor(sample, dtype=torch.float64))
        means = [torch.stack(tokens).mean() for tokens in groups.values() if tokens]
        results.append(torch.stack(means).mean() if means else torch.zeros((), dtype=torch.float64))
    return results


def clip_reference(gradients: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    """All gradients times min(1, max_norm / (norm + 1e-6)), and their one L2 norm before that."""
    norm = torch.cat([g.flatten() for g in gradients]).pow(2).sum().sqrt()
    scale = min(1.0, max_norm / (float(norm) + 1e-6))
    return [g * scale for g in gradients], norm


def conflict_reference(gradients: Sequence[Tensor]) -> Tensor:
    """Sum over tasks of their gradients, each without its parts against the others' (PCGrad, in order of tasks)."""
    total = torch.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        left = own.clone()
        for j, other in enumerate(gradients):
            inner = float((left * other).sum())
            if j != i and inner < 0:
                left = left - inner / float((other * other).sum()) * other
        total = total + left
    return total


def adamw_reference_step(
    parameter: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step: int,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step` (from 1) of AdamW (Loshchilov & Hutter, algorithm 2): new parameter and both moments."""
    first_moment = betas[0] * first_moment + (1 - betas[0]) * gradient
    second_moment = betas[1] * second_moment + (1 - betas[1]) * gradient**2
    unbiased_first = first_moment / (1 - betas[0] ** step)
    unbiased_second = second_moment / (1 - betas[1] ** step)
    decayed = parameter - learning_rate * weight_decay * parameter
    return decayed - learning_rate * unbiased_first / (unbiased_second.sqrt() + epsilon), first_moment, second_moment


def learning_rate_reference(kind: str, learning_rate: float, step: int, total: int, warmup_ratio: float) -> float:
    """The learning rate that optimizer step number `step` (from 0) of `total` uses. `constant` knows no warm-up."""
    warmup = 0 if kind == "constant" else math.ceil(warmup_ratio * total)
    if step < warmup:
        return learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return learning_rate * max(0.0, 1 - progress)
    if kind == "cosine":
        return learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return learning_rate


# ---------------------------------------------------------------------------------------- the loss at the output head


def linear_cross_entropy_reference(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets: Sequence[int]
) -> Tensor:
    """(N,) log sum_v exp(l_v) - l_target with l = W h + b, a row at a time."""
    losses = [hidden_NH.new_zeros(0)]
    for h_H, target in zip(hidden_NH, targets, strict=True):
        logits_V = weight_VH @ h_H if bias_V is None else weight_VH @ h_H + bias_V
        largest = logits_V.max().detach()
        losses.append(((logits_V - largest).exp().sum().log() + largest - logits_V[target])[None])
    return torch.cat(losses)


def resampled_means(delta_SN: np.ndarray, seeds_DS: np.ndarray, questions_DN: np.ndarray) -> list[float]:
    """Twin of `bench.quality.statistics.resampled_means`, with the rows and columns of each sample themselves."""
    means = []
    for seeds, questions in zip(seeds_DS, questions_DN, strict=True):
        values = [delta_SN[seed, question] for seed in seeds for question in questions]
        means.append(float(sum(values) / len(values)))
    return means
