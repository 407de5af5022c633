"""Describe a run without training it: the model's modules, its memory, its FLOPs and the length of an epoch."""

from __future__ import annotations

import re

import torch

from model import GPT
from quill.data.batches import Batches
from quill.options import TrainConfig


def describe(config: TrainConfig, vocab_size: int, batches: Batches) -> str:
    """Return lines with the modules' shapes and parameters, FLOPs, memory, and the steps in an epoch.

    batches: those of the training split.
    """
    with torch.device("meta"):  # shapes without memory, so that a model of any size can be described
        model = GPT(config, vocab_size)
    moments = 1 if config.optimizer == "muon" else 2
    state = sum(p.numel() * (moments if ".h." in name and p.dim() == 2 else 2) for name, p in model.named_parameters())
    weights = model.num_params() * (3 if config.ema_decay else 2)
    epoch = batches.rows_per_epoch / batches.rows
    in_epoch = batches.rows_per_epoch * config.block_size if batches.bos is None else batches.document_rows[1].sum()
    tokens = in_epoch / epoch
    flops = model.flops_per_token()
    return "\n".join(
        [
            f"{'GPT':44}{model.num_params():>14,} parameters",
            *_module_lines(model, config),
            f"FLOPs a token     {flops:,.0f} to train on, {flops / 3:,.0f} to generate",
            f"memory            {4 * (weights + state) / 2**20:,.1f} MiB of weights, gradients and optimizer state; "
            "activations need more memory",
            f"a step            {batches.rows:,} rows, {tokens:,.0f} tokens",
            f"an epoch          {epoch:,.1f} steps, {in_epoch:,} tokens",
            f"the run           {config.max_iters:,} steps, {config.max_iters / epoch:,.2f} epochs, "
            f"{config.max_iters * tokens * flops:.2e} FLOPs",
        ]
    )


def _module_lines(model, config):
    """Yield a line for each module with parameters. Blocks after the first have the same shapes and share a line."""
    for name, module in model.named_modules():
        layer = re.match(r"transformer\.h\.(\d+)", name)
        if layer and int(layer[1]) > 0:
            if name == layer[0] == f"transformer.h.{config.n_layer - 1}":
                yield f"  {'  ' * 2}{'h.1' if config.n_layer == 2 else f'h.1 to h.{layer[1]}'}: the same again"
            continue
        own = list(module.parameters(recurse=False))
        total = sum(parameter.numel() for parameter in module.parameters())
        if not name or not total:
            continue
        shapes = ", ".join(" × ".join(map(str, parameter.shape)) for parameter in own)
        tied = name == "lm_head" and config.tie_weights
        label = f"{'  ' * (name.count('.') + 1)}{name.rpartition('.')[2]:10} {shapes}"
        yield f"{label:44}{total:>14,}{' (wte itself: counted once)' if tied else ''}"
