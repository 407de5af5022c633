"""Describe a run without training it: the model's modules, its memory, its FLOPs and the length of an epoch.

The memory of a micro-batch is counted while torch runs it on tensors without data. Not counted are temporary tensors of
the optimizer (Muon's are a few times its matrices), DDP's copy of the gradients, and what the allocator keeps unused.
"""

import re
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT
from quill import cpu
from quill.data.batches import Batches
from quill.machine import Machine, checkpoint_activations
from quill.options import TrainConfig
from quill.schema import SkipInit, without_memory


def describe(config: TrainConfig, vocab_size: int, machine: Machine, batches: Batches | None = None) -> str:
    """Return lines with the modules' shapes, FLOPs, memory and, if there are `batches` to train on, their epochs."""
    model = without_memory(config, vocab_size)
    epoch_lines, epochs = [], ""
    tokens, flops = config.rows * config.block_size, model.flops_per_token()
    if batches is not None:
        epoch = batches.rows_per_epoch / config.rows
        in_epoch = batches.rows_per_epoch * config.block_size
        if batches.bos is not None:
            in_epoch = batches.row_starts[-1] - batches.row_starts[0]
        tokens, epochs = in_epoch / epoch, f"{config.max_iters / epoch:,.2f} epochs, "
        epoch_lines = [f"an epoch          {epoch:,.1f} steps, {in_epoch:,} tokens"]
    lines = [
        f"{'GPT':44}{model.num_params():>14,} parameters",
        *_module_lines(model, config),
        f"FLOPs a token     {flops:,.0f} to train on, {flops / 3:,.0f} to generate",
        *(_memory_lines(model, config, machine) if not config.gpus else ()),
        f"a step            {config.rows:,} rows, {tokens:,.0f} tokens",
        *epoch_lines,
        f"the run           {config.max_iters:,} steps, {epochs}{config.max_iters * tokens:.2e} tokens, "
        f"{config.max_iters * tokens * flops:.2e} FLOPs",
    ]
    return "\n".join(lines)


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


def _memory_lines(model, config, machine):
    """Yield the memory of a training step: the sum, then a line for each part of it."""
    parts = state_bytes(model, config)
    of_a_rank = -(-config.rows // machine.group.world_size)
    rows, dtype = min(config.batch_size, of_a_rank), str(machine.dtype).removeprefix("torch.")
    kept, added = activation_bytes(config, model.vocab_size, rows, machine)
    parts[f"activations of a micro-batch, {rows:,} × {config.block_size:,} tokens in {dtype}"] = kept
    parts["temporary tensors of its backward pass"] = added
    yield f"memory            {sum(parts.values()) / 2**20:,.1f} MiB of tensors at the peak of a step"
    yield from (f"{size / 2**20:>20,.1f} MiB  {name}" for name, size in parts.items() if size)


def state_bytes(model: GPT, config: TrainConfig) -> dict[str, int]:
    """Return the bytes, all in float32, of the weights and of what a step keeps for each of them."""
    weights, moments = 4 * model.num_params(), 1 if config.optimizer == "muon" else 2
    state = sum(p.numel() * (moments if ".h." in name and p.dim() == 2 else 2) for name, p in model.named_parameters())
    average = weights if config.ema_decay else 0
    return {"weights": weights, "gradients": weights, "optimizer": 4 * state, "moving average": average}


def activation_bytes(
    config: TrainConfig, vocab_size: int, rows: int, machine: Machine, faster: bool = True
) -> tuple[int, int]:
    """Return the bytes that a micro-batch of `rows` rows keeps for its backward pass, and those added at the peak.

    Weights and gradients are not among them. All layers are alike, so the third and later ones are not run. faster: use
    the layers of quill/cpu.py.
    """
    if config.n_layer > 2:
        few = (activation_bytes(replace(config, n_layer=n), vocab_size, rows, machine, faster) for n in (1, 2))
        (one, _), (two, added) = few
        return two + (two - one) * (config.n_layer - 2), added
    with FakeTensorMode(), machine.device, torch.autograd.set_multithreading_enabled(False):
        with SkipInit():
            model = cpu.speed_up(GPT(config, vocab_size)) if faster else GPT(config, vocab_size)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # the sum over the micro-batches before
        if config.activation_checkpointing:
            checkpoint_activations(model)
        idx = torch.zeros(rows, config.block_size, dtype=torch.int64)
        with LiveBytes() as live:
            with machine.autocast():
                loss = model(idx, idx)[1]
            kept = live.now
            loss.backward()
    return kept, live.peak - kept


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operations make, for as long as they exist: `now` and at the `peak`."""

    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, returned = (
            {leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
            for values in ((args, kwargs), result)
        )
        for storage in returned - given:  # without views of an argument, and results in place
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, n_bytes):
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
