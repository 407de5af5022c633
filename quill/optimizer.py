"""The learning-rate schedule, the choice of an optimizer for each parameter, and a faster Muon."""

import math
from collections import defaultdict
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import nn

from quill.options import TrainConfig
from quill.parallel import Strategy


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return AdamW's learning rate at `step`, counted from 0: linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.learning_rate
    decay_start = config.warmup_iters
    if config.schedule == "wsd":  # warm-up, stable, decay (Hägele et al. 2024)
        decay_start = max(decay_start, config.decay_end - int(config.wsd_decay * config.decay_end))
    if step < decay_start:
        return config.learning_rate
    done = min(1.0, (step - decay_start) / max(1, config.decay_end - decay_start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def make_optimizers(
    model: nn.Module, config: TrainConfig, strategy: Strategy
) -> list[tuple[torch.optim.Optimizer, float]]:
    """→ [(optimizer, its peak learning rate)]. Every parameter is in exactly one group; only matrices decay.

    strategy: the ranks among which Muon's work is shared out.
    """
    muon, decay, no_decay = [], [], []
    for name, parameter in model.named_parameters():
        block_matrix = parameter.dim() == 2 and name.startswith("transformer.h.")
        if config.optimizer == "muon" and block_matrix:
            muon.append(parameter)
        else:
            (decay if parameter.dim() >= 2 else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    adamw = AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, config.learning_rate)]
    if muon:
        # 4 steps train as well as torch's 5 (docs/records/), 3 and 2 do not.
        settings = {"momentum": config.muon_momentum, "weight_decay": config.weight_decay, "ns_steps": 4}
        optimizers.append(
            (BatchedMuon(muon, config.muon_learning_rate, strategy, **settings), config.muon_learning_rate)
        )
    covered = [id(p) for optimizer, _ in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(map(id, model.parameters())), "every parameter must be in exactly one group"
    return optimizers


class Optimizer(torch.optim.Optimizer):
    """torch's methods without their wrappers, which import torch.compile's packages: 0.5 s of a run's start."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov & Hutter 2019), as in `Optimizer`."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class BatchedMuon(Optimizer, torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) for all matrices of one shape at once, orthogonalized in float32.

    For a small GPT, updating the matrices one at a time takes longer than computing their gradients. torch's Muon
    computes in bfloat16. On hardware without bfloat16, the emulation takes longer than the rest of a step.

    Each rank orthogonalizes its share of the matrices of a shape, and gets the others from the other ranks.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, strategy: Strategy, **settings: Any):
        super().__init__(parameters, lr, **settings)
        self.strategy = strategy

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        local = self.strategy.to_local
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            settings = {"coefficients": group["ns_coefficients"], "steps": group["ns_steps"], "eps": group["eps"]}
            for (rows, columns), parameters in by_shape.items():
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                gradients = [local(parameter.grad) for parameter in parameters]
                buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = [*torch._foreach_lerp(gradients, buffers, group["momentum"])]  # Nesterov's momentum
                updates = self.strategy.map_matrices(partial(orthogonalize, **settings), updates, parameters[0])
                weights = [local(parameter) for parameter in parameters]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                scale = -group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(weights, updates.unbind(), alpha=scale)


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Move the singular values of `matrices` (N, rows, columns) towards 1. → the same shape

    Newton-Schulz iteration with a polynomial of degree 5, x ← (a + b x xᵀ + c (x xᵀ)²) x. Each factor depends only on
    the Gram matrix x xᵀ (rows, rows): multiply the factors first, and apply them to x once. That is safe for few steps
    in float32 (or TF32): errors in the Gram matrix grow by a² ≈ 12 a step.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalize(matrices.mT, coefficients, steps, eps).mT
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    gram = x @ x.mT
    # ‖x‖ = 1 bounds the largest singular value, and √‖x xᵀ‖ bounds it more closely. It is at least rows^-¼, except for
    # a matrix that vanishes, which must stay small.
    bound = gram.norm(dim=(1, 2), keepdim=True).sqrt().clamp(min=gram.size(-1) ** -0.25)
    gram = gram / bound.square()
    product = torch.empty(0)
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if step else factor
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product @ (x / bound)
