"""Train a GPT.

    python train.py config/names.py                                     # a minute on a laptop, no network
    python train.py config/shakespeare_char.py --max_iters=2000         # any option as a flag
    python train.py config/shakespeare_char.py --init_from=resume       # continue from the last checkpoint
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py    # the same batches, split over 8 GPUs

Flags override the config file, which overrides the defaults. A run writes last.pt, best.pt and metrics.csv to out_dir.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import math
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from model import GPT
from quill import checkpoint
from quill.checkpoint import Checkpoint
from quill.cli import list_configs, note, read_args, read_config_file, run
from quill.data.batches import DATA_ORDER, Batches, derive_seed
from quill.data.splits import Splits, open_splits
from quill.distributed import AgreedError, ProcessGroup
from quill.errors import check
from quill.files import folder_lock
from quill.machine import (
    Machine,
    StopSignals,
    checkpoint_activations,
    compile_model,
    keep_freed_memory,
    memory_limits,
    pick_machine,
)
from quill.observers import Observers
from quill.optimizer import learning_rate
from quill.options import Options, TrainConfig
from quill.plan import print_dry_run
from quill.run_folder import PER_NODE, RunFolder, folder_of, what_is_kept
from quill.scoring import perplexity
from quill.state import TrainState

# ---------------------------------------------------------------- a step, an evaluation, the loop


def train_step(state: TrainState, batches: Batches, config: TrainConfig, machine: Machine) -> int:
    """Take one optimizer step on the step's global batch. → the number of tokens that it predicts

    The loss and the gradient norm stay on the device: see `TrainState.read_losses`.
    """
    step, model, scaler = state.progress.step, state.train_model, state.scaler
    strategy, group = state.strategy, machine.group
    machine.seed(derive_seed("dropout", config.seed, step, group.rank))
    total, micro_batches = batches.global_batch(step)
    loss = torch.zeros((), device=machine.device)
    for i, (x, y, predicted) in enumerate(micro_batches):
        with strategy.maybe_no_sync(model, is_last=i + 1 == len(micro_batches)):
            with machine.autocast():
                mean = model(x, y)[1]
            share = predicted / total  # so that the sum is the mean over the global batch
            scaler.scale(mean * (share * group.world_size)).backward()
        loss += mean.detach() * share
    for optimizer, peak in state.optimizers:
        scaler.unscale_(optimizer)
        for param_group in optimizer.param_groups:
            param_group["lr"] = peak * (learning_rate(step, config) / config.learning_rate)
    norm = strategy.full_tensor(torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None]))
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(state.parameters, config.grad_clip, norm)
    for optimizer, _ in state.optimizers:
        scaler.step(optimizer)
    scaler.update()
    for parameter in state.parameters:
        parameter.grad = None
    state.update_average()
    state.pending.append((loss, norm))
    state.progress.step += 1
    return total


@torch.no_grad()
def evaluate(model: GPT, batches: Batches, config: TrainConfig, machine: Machine) -> float:
    """Return the mean loss over the validation split, in nats per token.

    It is the sum over all ranks divided by the number of tokens.
    """
    model.eval()
    losses, counts, total = [], [], torch.zeros(2, dtype=torch.float64)
    for x, y, predicted in batches.validation(config.eval_iters * config.batch_size or None):
        with machine.autocast():
            losses.append(model(x, y)[1])
        counts.append(predicted)
    for loss, predicted in zip(torch.stack(losses).tolist(), counts, strict=True):  # read at once: reading waits
        if predicted:  # else the batch is there because other ranks have one more
            total += torch.tensor([loss * predicted, predicted], dtype=torch.float64)
    model.train()
    total = machine.group.sum(total)
    loss = (total[0] / total[1]).item()
    if not math.isfinite(loss):
        raise AgreedError(f"the validation loss is {loss}: stopped; {what_is_kept(config.out_dir)}")
    return loss


def save(state: TrainState, better: bool) -> None:
    """Write last.pt, and best.pt if the last evaluation was the best. Every rank calls this, and rank 0 writes.

    best.pt is written first. If the machine stops between the writes, a resume repeats the evaluation from last.pt.
    """
    saved = state.state_dict()
    for name in ("best.pt", "last.pt") if better else ("last.pt",):
        state.machine.group.on_rank_0(checkpoint.save, Path(state.config.out_dir) / name, saved)


def train(
    state: TrainState, data: Splits, config: TrainConfig, machine: Machine, observers: Observers, stop: StopSignals
) -> int:
    """Train until max_iters, patience or a signal ends the run. → exit code"""
    progress, group, evaluating = state.progress, machine.group, False
    while progress.step < config.max_iters:
        observers.before_step(stop)
        if stopped_by := stop.agreed(group):
            if state.pending:
                observers.log(*state.read_losses())
            if not evaluating:  # else the step has been saved
                save(state, False)
            name = signal.Signals(stopped_by).name
            observers.say(f"stopped by {name} at step {progress.step}; continue with --init_from=resume")
            return 128 + stopped_by
        began = time.perf_counter()
        tokens = train_step(state, data.train_batches, config, machine)
        evaluating, entry = config.evaluates_after(progress.step), None
        if progress.step % config.log_interval == 0 or evaluating:
            entry = state.read_losses()
        observers.stepped(tokens, time.perf_counter() - began)
        if entry:
            observers.log(*entry)
        better, val_loss = False, math.nan
        if evaluating:
            val_loss = evaluate(state.eval_model, data.val_batches, config, machine)
            better = state.record(val_loss)
        progress.seconds += time.perf_counter() - began
        if evaluating:
            observers.evaluated(val_loss)
            progress.losses = []
            save(state, better)
        if evaluating and state.out_of_patience:
            observers.say(f"stopped early: {config.patience} evaluations without a better one")
            break
    return 0


# ---------------------------------------------------------------- set-up


def run_training(state: TrainState, data: Splits, config: TrainConfig, machine: Machine, folder: RunFolder) -> int:
    """Take out_dir, compile the model, distribute it over the ranks, create the observers, and train. → exit code"""
    if state.scaler.is_enabled() and config.optimizer == "muon":
        raise AgreedError(
            "--optimizer=muon does not work with float16: its steps overflow; use --dtype=float32 or bfloat16"
        )
    # The first batch before the folder: if memory is too small for it, no other run is replaced.
    _, [(x, y, _), *_] = data.train_batches.global_batch(state.progress.step)
    machine.group.on_rank_0(folder.take, config)
    if config.activation_checkpointing:
        checkpoint_activations(state.model)
    compile_model(state.model, x, y, config.compile, machine)
    state.train_model = state.strategy.wrap(state.model)
    keep_freed_memory()
    observers = machine.group.on_all_ranks(Observers, state, data.val_batches, machine)
    reason = f" ({machine.threads_reason})" if machine.threads_reason else ""
    dtype, tokens = str(machine.dtype).removeprefix("torch."), data.dataset
    ranks = f", {machine.group.world_size} processes" if machine.group.world_size > 1 else ""
    ranks += ", sharded" if state.strategy.is_sharded else ""
    observers.say(
        f"{state.model.num_params():,} parameters on {machine.name}{reason}, {dtype}{ranks}; "
        f"{len(tokens.train):,} tokens to train on, {len(tokens.val):,} to evaluate on"
    )
    with observers:
        with StopSignals() as stop:
            code = train(state, data, config, machine, observers, stop)
        if code == 0:  # outside of StopSignals: a signal ends the drawing of samples at once
            observers.finished()
    return code


def launch(config: TrainConfig, flags: Options, saved: Checkpoint | None, machine: Machine, folder: RunFolder) -> int:
    """Describe, evaluate or train, as the options say. `flags`, `saved`: see `checkpoint.resolve_start`. → exit code"""
    is_resume = config.init_from == "resume"
    if config.vocab_size is not None:  # a dry run without a dataset
        machine.group.on_rank_0(print_dry_run, config, config.vocab_size, machine)
        return 0
    data = open_splits(config, machine, saved["data_order"] if saved and is_resume else DATA_ORDER)
    if saved is not None:
        saved = checkpoint.match_vocabulary(saved, data.dataset)
    if config.dry_run:
        vocab_size = data.dataset.tokenizer.vocab_size
        machine.group.on_rank_0(print_dry_run, config, vocab_size, machine, data.train_batches)
        return 0
    state = TrainState(config, flags, data.dataset.tokenizer, machine, saved)
    if config.eval_only:
        loss = evaluate(state.eval_model, data.val_batches, config, machine)
        text = f"step {saved['step'] if saved else 0}: val loss {loss:.4f}, perplexity {perplexity(loss):.3f}"
        machine.group.on_rank_0(print, text)
        return 0
    if state.progress.step >= config.max_iters:
        note(f"note: {config.out_dir} is at step {state.progress.step} already; to continue, raise --max_iters")
        return 0
    state.add_optimizers(saved)
    if saved is not None:
        saved.clear()  # the caller has it too, and its tensors would stay in memory
    return run_training(state, data, config, machine, folder)


def read_options(argv: list[str]) -> tuple[Options, Options]:
    """Read a command line. → the options of its config file, and its flags"""
    positional, flags = read_args(argv, TrainConfig, __doc__)
    check(len(positional) <= 1, f"give one config file, not {len(positional)}: {' '.join(positional)}")
    return read_config_file(positional[0], TrainConfig) if positional else {}, flags


def main(argv: list[str]) -> int:
    """Read the options, pick the machine, and start. → exit code"""
    if not argv:
        print(f"python train.py CONFIG [--key=value …], where CONFIG is one of\n{list_configs()}\nor a file like them")
        return 2
    group = ProcessGroup.from_environment()
    with group.connected(), ExitStack() as stack:
        from_file, flags = group.on_all_ranks(read_options, argv)
        given = from_file | flags
        group.refuse_differences({key: given[key] for key in given if key not in PER_NODE})
        folder = group.on_all_ranks(folder_of, given)
        if not (given.get("eval_only") or given.get("dry_run")):
            group.on_rank_0(stack.enter_context, folder_lock(folder.path))
        config, flags, saved = group.on_all_ranks(checkpoint.resolve_start, from_file, flags, folder)
        threads = saved["threads"] if saved and config.init_from == "resume" else None
        machine = group.on_all_ranks(pick_machine, config, group, threads)
        start = {"init_from": config.init_from, "step": saved["step"] if saved else 0}
        group.refuse_differences(start | {"device": machine.device.type, "dtype": machine.dtype})
        with memory_limits(machine, "use --activation_checkpointing=True, a smaller --batch_size or model"):
            return launch(config, flags, saved, machine, folder)


if __name__ == "__main__":
    run(main)
