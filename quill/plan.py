"""Plan a run on many GPUs without having them: what fits, what the network carries, and how long the run takes.

It is computed from shapes, for training in bfloat16 with flash attention and without torch.compile. docs/scale.md says
which of the formulas were measured. Temporary tensors of the optimizer are not counted.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf, isqrt
from typing import NamedTuple

import torch

from model import GPT
from quill.data.batches import Batches
from quill.describe import activation_bytes, describe, state_bytes
from quill.errors import check
from quill.machine import Machine
from quill.options import TrainConfig
from quill.schema import without_memory

FREE = 0.1  # of a GPU's memory: 1 to 2 GB for the CUDA context and NCCL's buffers, the rest for fragmentation
TYPICAL = 0.4  # MFU, model FLOPs utilization (PaLM): the FLOPs of `GPT.flops_per_token` / the GPUs' peak
MANY = 64  # rows of a micro-batch


class Way(NamedTuple):
    """One way to train on several GPUs, with the bytes that each of them needs."""

    flags: str  # "": each GPU has everything
    fixed: float
    row: float  # for each row of a micro-batch
    sent: int  # to the other GPUs, and as much is received: in a step or, if sharded, in each micro-batch


def ways_to_train(model: GPT, config: TrainConfig) -> list[Way]:
    """→ everything on each GPU (with several, DDP), sharded, sharded with activation checkpointing"""
    gpus, total, state = config.gpus, model.num_params(), sum(state_bytes(model, config).values())
    block, matrices = (sum(p.numel() for p in model.transformer.h[:1].parameters() if p.dim() >= n) for n in (1, 2))
    root = total - config.n_layer * block
    machine = Machine(device=torch.device("cpu"), dtype=torch.bfloat16, name="cpu")
    # With dropout, torch has no flash attention on a CPU. Checkpointing is computed below.
    config = replace(config, attention_dropout=0.0, activation_checkpointing=False)

    def count(rows, n_layer=config.n_layer):
        return activation_bytes(replace(config, n_layer=n_layer), model.vocab_size, rows, machine, faster=False)

    one, many = sum(count(1)), sum(count(MANY))
    row = (many - one) / (MANY - 1)  # the peak is a convex function of the rows, so this is enough
    rest = one - row
    # FSDP2 holds the root's weights and gradients whole, in float32; lm_head's gradient is counted already. Of a block,
    # it holds in bfloat16 the weights, those of the next, the buffer in which they arrive, and the gradients, and in
    # float32 the gradients to send. Autocast's copies of the matrices, in bfloat16, are not made.
    whole = 4 * root + 4 * (root - model.lm_head.weight.numel()) + (2 + 2 + 2 + 2 + 4) * block
    sharded = state / gpus + whole + rest - 2 * config.n_layer * matrices
    # Checkpointing keeps a block's input, in float32, and computes one block at a time: its activations, and as much
    # again for gradients, when those of lm_head are gone.
    of_block = count(2, 2)[0] - count(2, 1)[0] - count(1, 2)[0] + count(1, 1)[0]
    kept = 4 * config.n_embd * config.block_size * config.n_layer
    checkpointed = kept + max(row - config.n_layer * of_block, 2 * of_block)
    # A ring all-reduce sends gradients twice, in 4 bytes. FSDP, weights are gathered twice, in 2 bytes, the root's
    # in 4, and gradients are sent once, in 4.
    sent = 8 * total + 4 * root
    return [
        Way("", state + 4 * total * (gpus > 1) + rest, row, 8 * total),  # DDP's buckets are a copy of the gradients
        Way("--shard=True", sharded, row, sent),
        Way("--shard=True --activation_checkpointing=True", sharded, checkpointed, sent),
    ]


def print_dry_run(config: TrainConfig, vocab_size: int, machine: Machine, batches: Batches | None = None) -> None:
    """Print what --dry_run shows: the description of the run and, with --gpus, its plan."""
    text = describe(config, vocab_size, machine, batches)
    print("\n".join([text, "", *plan(config, vocab_size)]) if config.gpus else text)


def plan(config: TrainConfig, vocab_size: int) -> Iterator[str]:
    """Yield the lines of a plan. Raise a UserError if the GPUs can't take equal parts of a step's rows."""
    gpus, rows = config.gpus, config.rows
    near = [n for n in divisors(rows) if n < gpus][-1:] + [n for n in divisors(rows) if n > gpus][:1]
    problem = f"--gpus={gpus} does not divide the {rows:,} rows of a step ({config.rows_as_flags})"
    check(rows % gpus == 0, f"{problem}; use {' or '.join(map(str, near))}")
    model = without_memory(config, vocab_size)
    weights, state = 4 * model.num_params(), sum(state_bytes(model, config).values())
    micro, usable = min(config.batch_size, rows // gpus), config.gpu_memory * 1e9 * (1 - FREE)
    seconds = model.flops_per_token() * rows * config.block_size / (gpus * config.gpu_tflops * 1e12)  # a step's at peak
    yield (
        f"the plan          {gpus:,} GPU{'s' * (gpus > 1)}, each with {config.gpu_memory:g} GB, "
        f"{config.gpu_tflops:g} TFLOP/s in bfloat16 and a network of {config.gpu_network:g} GB/s"
    )
    yield f"memory of a GPU   {usable / 1e9:,.3g} GB; the rest is for the CUDA context, NCCL's buffers, fragmentation"
    columns = f"{'rows that fit':>18}{'GB a step':>14}{f'GB/s at {TYPICAL:.0%} MFU':>20}"
    yield f"{f'with {micro:,} row' + 's' * (micro > 1):>25}{columns}"
    best, ways = (inf, "", 0), ways_to_train(model, config)
    given = {"--shard": config.shard and gpus > 1, "--activation_checkpointing": config.activation_checkpointing}
    alone = [ways[0], ways[0]._replace(flags="--activation_checkpointing=True", row=ways[-1].row)]
    for flags, fixed, row, sent in ways if gpus > 1 else alone:
        most = max(0, int((usable - fixed) // row))
        size = max((n for n in divisors(rows // gpus) if n <= most), default=0)  # of a micro-batch
        micro_batches = rows // gpus // (size or 1)
        a_step = sent * (gpus - 1) / gpus * (micro_batches if flags else 1) / 1e9
        # DDP sends during the backward pass of a step's last micro-batch, which is two thirds of its time.
        needed = a_step * TYPICAL / seconds * (1 if flags else 1.5 * micro_batches)
        asked = all(flag in flags for flag, is_given in given.items() if is_given)
        # Take the first way whose bytes the network can send in time. If there is none, a later way must halve them.
        if size and asked and best[0] > config.gpu_network and (needed <= config.gpu_network or needed < best[0] / 2):
            best = (needed, flags, size)
        name = flags or "everything on each GPU" + " (DDP)" * (gpus > 1)
        sending = f"{a_step:,.1f}{needed:>20,.1f}" if size else ""
        yield f"{(fixed + row * micro) / 1e9:>22,.1f} GB{most:>18,}{sending:>34}  {name}"
    needed, flags, size = best
    if size:
        yield f"use               {f'{flags} --batch_size={size} --gradient_accumulation_steps={rows // size}'.strip()}"
        yield from _time_lines(config, seconds, TYPICAL * config.gpu_network / needed if needed else 1.0)
        built = weights * (2 if config.ema_decay else 1) / 1e9
        yield f"memory of a host  {built:,.1f} GB for each process at the start: it builds the whole model"
        yield f"a checkpoint      {(state - weights) / 1e9:,.1f} GB; rank 0 has a copy in its host's memory to save it"
    else:
        unsplit = ways[-1].fixed + ways[-1].row - state / gpus
        enough = [f"{n:,} GPUs are enough" for n in divisors(rows) if n > gpus and unsplit + state / n <= usable]
        none = f"{unsplit / 1e9:,.1f} GB are not split, and {rows:,} GPUs have a row each: it takes tensor parallelism"
        yield f"too small         {[*enough, none][0]}"


def _time_lines(config, seconds, limit):
    """The time at several MFUs, of which the network allows those up to `limit`. seconds: a step's at the peak."""
    tokens, days = config.rows * config.block_size, config.max_iters / 86400
    yield f"{'tokens/s':>25}{'seconds a step':>18}{'days':>20}  MFU: FLOPs a token × tokens/s / the GPUs' peak"
    for mfu in sorted({0.2, 0.3, 0.4, 0.5, min(0.5, round(limit, 2) or limit)}):
        times = f"{tokens * mfu / seconds:>25,.0f}{seconds / mfu:>18,.2f}{days * seconds / mfu:>20,.1f}"
        yield f"{times}  {mfu:.0%}" + f"; the network allows {limit:.0%}" * (mfu > limit + 0.005)
    needed = days * seconds / config.days
    yield f"{f'in {config.days:g} days':18}{needed:,.1%} MFU"


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, sorted."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
