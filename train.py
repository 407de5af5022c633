"""Train a GPT.

    python train.py config/names.py                                     # a minute on a laptop, no network
    python train.py config/shakespeare_char.py --max_iters=2000         # any option as a flag
    python train.py config/shakespeare_char.py --init_from=resume       # continue from the last checkpoint
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py    # the same batches, split over 8 GPUs

Options come from defaults < config file < flags. A run writes last.pt, best.pt and metrics.csv into out_dir.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import GPT
from quill import checkpoint
from quill.cli import list_configs, note, read_args, read_config_file, run
from quill.data.batches import Batches, derive_seed
from quill.data.token_files import Dataset, open_dataset, prepare_if_missing
from quill.describe import describe
from quill.distributed import ProcessGroup, parallelize
from quill.errors import UserError
from quill.machine import Machine, StopSignals, compile_model, memory_limits, pick_machine
from quill.observers import Observers
from quill.optimizer import lr_multiplier
from quill.options import TrainConfig
from quill.scoring import perplexity
from quill.state import TrainState

# ---------------------------------------------------------------- a step, an evaluation, the loop


def train_step(state: TrainState, batches: Batches, config: TrainConfig, machine: Machine) -> int:
    """Take one optimizer step on the step's global batch. → the tokens that it predicts

    The loss and the gradient norm stay on the device: see `TrainState.read_losses`.
    """
    step, model, scaler, group = state.progress.step, state.train_model, state.scaler, machine.group
    machine.seed(derive_seed("dropout", config.seed, step, group.rank))
    total, micro_batches = batches.global_batch(step)
    loss = torch.zeros((), device=machine.device)
    for i, (x, y, predicted) in enumerate(micro_batches):
        # DDP averages the gradients over the ranks: do it once, after the last micro-batch.
        wait = model.no_sync() if group.world_size > 1 and i + 1 < len(micro_batches) else nullcontext()
        with wait:
            with machine.autocast():
                share = model(x, y)[1] * (predicted / total)  # so that the sum is the mean over the global batch
            scaler.scale(share * group.world_size).backward()
        loss += share.detach()
    multiplier = lr_multiplier(step, config)
    for optimizer, peak in state.optimizers:
        scaler.unscale_(optimizer)
        for parameters in optimizer.param_groups:
            parameters["lr"] = peak * multiplier
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    for optimizer, _ in state.optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    state.pending.append((loss, norm))
    state.progress.step += 1
    return total


@torch.no_grad()
def evaluate(model: GPT, batches: Batches, config: TrainConfig, machine: Machine) -> float:
    """Mean loss over the validation split, in nats per token: sum and count over all ranks, then the quotient."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for x, y, predicted in batches.validation(config.eval_iters * config.batch_size or None):
        with machine.autocast():
            loss = model(x, y)[1]
        total += torch.tensor([loss.item() * predicted, predicted], dtype=torch.float64)
    model.train()
    total = machine.group.sum(total)
    loss = (total[0] / total[1]).item()
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: stopped; the checkpoint before it is kept")
    return loss


def save(state: TrainState, better: bool) -> None:
    """Write last.pt, and best.pt if the last evaluation was the best.

    best.pt is first: if the machine stops in between, the run resumes from the older last.pt and reaches the same best.
    """
    saved = state.state_dict()
    for name in ("best.pt", "last.pt") if better else ("last.pt",):
        checkpoint.save(Path(state.config.out_dir) / name, saved)


def train(
    state: TrainState, data: Data, config: TrainConfig, machine: Machine, observers: Observers, stop: StopSignals
) -> int:
    """Train until max_iters, patience or a signal ends the run. → exit code"""
    progress, group = state.progress, machine.group
    while progress.step < config.max_iters:
        began = time.perf_counter()
        tokens = train_step(state, data.train_batches, config, machine)
        stopped_by, evaluating = stop.agreed(group), config.evaluates_after(progress.step)
        reading = None
        if progress.step % config.log_interval == 0 or evaluating or stopped_by:
            reading = state.read_losses()
        observers.stepped(tokens, time.perf_counter() - began)
        if reading:
            observers.read(*reading)
        better, val_loss = False, math.nan
        if evaluating:
            val_loss = evaluate(state.eval_model, data.val_batches, config, machine)
            better = state.record(val_loss)
        progress.seconds += time.perf_counter() - began
        if evaluating:
            group.on_rank_0(observers.evaluated, val_loss)
            progress.losses = []
        if evaluating or stopped_by:
            group.on_rank_0(save, state, better)
        if stopped_by:
            name = signal.Signals(stopped_by).name
            observers.say(f"stopped by {name} at step {progress.step}; continue with --init_from=resume")
            return 128 + stopped_by
        if evaluating and state.out_of_patience:
            observers.say(f"stopped early: {config.patience} evaluations without a better one")
            break
    observers.finished()
    return 0


# ---------------------------------------------------------------- set-up


@dataclass(frozen=True)
class Data:
    """The dataset of a run, and the batches of its two splits for this rank."""

    dataset: Dataset
    train_batches: Batches
    val_batches: Batches


def open_data(config: TrainConfig, machine: Machine) -> Data:
    """Prepare the dataset if it is a known corpus, and open it. A UserError if it does not fit the options."""
    group = machine.group
    group.on_rank_0(prepare_if_missing, config.dataset, config.data_dir)
    dataset = group.on_all_ranks(open_dataset, config.data_dir, config.dataset)
    rows = config.batch_size * config.gradient_accumulation_steps
    if rows % group.world_size:
        raise UserError(
            f"--batch_size={config.batch_size} × --gradient_accumulation_steps={config.gradient_accumulation_steps} "
            f"is not divisible by the {group.world_size} processes"
        )
    bos, batches = dataset.tokenizer.bos, []
    for name, tokens in (("train", dataset.train), ("val", dataset.val)):
        if bos is None and len(tokens) <= config.block_size:
            raise UserError(
                f"the {name} split of {config.dataset} has {len(tokens)} tokens, too few for "
                f"--block_size={config.block_size}: use a smaller one or a longer text"
            )
        settings: dict[str, Any] = {"rows": rows, "micro_rows": config.batch_size, "seed": config.seed}
        settings |= {"device": machine.device, "rank": group.rank, "world_size": group.world_size}
        batches.append(Batches(tokens, bos, config.block_size, **settings))
    return Data(dataset, *batches)


def note_capped_evaluation(config: TrainConfig, batches: Batches) -> None:
    """Say so if --eval_iters leaves out a part of the validation split."""
    _, lengths = batches.validation_rows()
    rows = config.eval_iters * config.batch_size
    if 0 < rows < len(lengths):
        covered = f"{lengths[:rows].sum():,} of {lengths.sum():,}"
        note(f"note: --eval_iters={config.eval_iters} evaluates the first {covered} tokens only")


def run_training(state: TrainState, data: Data, config: TrainConfig, machine: Machine) -> int:
    """Take out_dir, compile and distribute the model, and train it under observation. → exit code"""
    if state.scaler.is_enabled() and config.optimizer == "muon":
        raise UserError("--optimizer=muon: not in float16, where steps overflow; use --dtype=float32 or bfloat16")
    machine.group.on_rank_0(checkpoint.lock_out_dir, config)
    compiled = compile_model(state.model, data.train_batches, config.compile, machine)
    state.train_model = parallelize(compiled, machine.group)
    observers = machine.group.on_all_ranks(Observers, state, data.val_batches, machine)
    observers.say(
        f"{state.model.num_params():,} parameters on {machine.name}, {str(machine.dtype).removeprefix('torch.')}; "
        f"{len(data.dataset.train):,} tokens to train on, {len(data.dataset.val):,} to evaluate on"
    )
    with StopSignals() as stop, observers:
        return train(state, data, config, machine, observers, stop)


def start(config: TrainConfig, flags: dict[str, Any], saved: dict[str, Any] | None, machine: Machine) -> int:
    """Describe, evaluate or train, as the options say. `flags`, `saved`: see `checkpoint.resolve_start`. → exit code"""
    data = open_data(config, machine)
    if saved is not None:
        checkpoint.check_vocabulary(saved, data.dataset)
    if config.dry_run:
        text = describe(config, data.dataset.tokenizer.vocab_size, data.train_batches)
        return print_on_rank_0(text, machine)
    state = TrainState(config, flags, data.dataset.tokenizer, machine, saved)
    note_capped_evaluation(config, data.val_batches)
    if config.eval_only:
        loss = evaluate(state.eval_model, data.val_batches, config, machine)
        text = f"step {saved['step'] if saved else 0}: val loss {loss:.4f}, perplexity {perplexity(loss):.3f}"
        return print_on_rank_0(text, machine)
    if state.progress.step >= config.max_iters:
        note(f"note: {config.out_dir} is at step {state.progress.step} already; to continue, raise --max_iters")
        return 0
    return run_training(state, data, config, machine)


def print_on_rank_0(text: str, machine: Machine) -> int:
    """Print the result of a command that trains nothing. → exit code 0"""
    if machine.group.rank == 0:
        print(text)
    return 0


def main(argv: list[str]) -> int:
    """Read the options, pick the machine, and start. → exit code"""
    if not argv:
        print(f"python train.py CONFIG [--key=value …], where CONFIG is one of\n{list_configs()}\nor a file like them")
        return 2
    positional, flags = read_args(argv, TrainConfig, __doc__)
    if len(positional) > 1:
        raise UserError(f"one config file, please, not {len(positional)}: {' '.join(positional)}")
    from_file = read_config_file(positional[0], TrainConfig) if positional else {}
    group = ProcessGroup.from_environment()
    with group.connected():
        config, flags, saved = group.on_all_ranks(checkpoint.resolve_start, from_file, flags)
        machine = group.on_all_ranks(pick_machine, config, group)
        with memory_limits(machine):
            return start(config, flags, saved, machine)


if __name__ == "__main__":
    run(main)
