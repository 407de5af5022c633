"""Train a GPT.

    python train.py config/names.py                                     # a minute on a laptop, no network
    python train.py config/shakespeare_char.py --max_iters=2000         # any option as a flag
    python train.py config/shakespeare_char.py --init_from=resume       # go on from the last checkpoint
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py    # the same batches, shared out over 8 GPUs

Options come from defaults < config file < flags. A run writes last.pt, best.pt and metrics.csv into out_dir.
"""

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import GPT
from quill import checkpoint
from quill.cli import list_configs, note, read_args, read_config_file, run
from quill.data.batches import Batches, derive_seed
from quill.data.token_files import open_dataset, prepare_if_missing
from quill.errors import UserError
from quill.machine import Ranks, StopSignals, memory_limits, pick_machine
from quill.observers.console import Reporter, describe, draw_samples, perplexity
from quill.observers.tensorboard import open_board
from quill.optimizer import learning_rate, make_optimizers
from quill.options import TrainConfig


@dataclass
class Progress:
    """How far a run has come: with the weights and the optimizers, all that a resume needs."""

    step: int = 0
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    losses: list[float] = field(default_factory=list)  # one a step, since the last row of metrics.csv
    seconds: float = 0.0


# ---------------------------------------------------------------- a step, an evaluation


def train_step(model, batches, step, optimizers, scaler, config, machine):
    """One optimizer step on the step's global batch. → loss, gradient norm (both still on the device), tokens."""
    machine.seed(derive_seed("dropout", config.seed, step, machine.rank))
    total, micro_batches = batches.global_batch(step)
    loss = torch.zeros((), device=machine.device)
    for i, (x, y, predicted) in enumerate(micro_batches):
        # DDP averages gradients over the ranks: do it once, behind the last micro-batch.
        wait = model.no_sync() if machine.world > 1 and i + 1 < len(micro_batches) else nullcontext()
        with wait:
            with machine.autocast():
                share = model(x, y)[1] * (predicted / total)  # so that the sum is the mean over the global batch
            scaler.scale(share * machine.world).backward()
        loss += share.detach()
    scale = learning_rate(step, config) / config.learning_rate
    for optimizer, peak in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    for optimizer, _ in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm, total


@torch.no_grad()
def evaluate(model, batches, config, machine):
    """Mean loss in nats a token over the validation split: sum and count over all ranks, then the quotient."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for x, y, predicted in batches.validation(config.eval_iters * config.batch_size or None):
        with machine.autocast():
            loss = model(x, y)[1]
        total += torch.tensor([loss.item() * predicted, predicted], dtype=torch.float64)
    model.train()
    total = machine.sum(total)
    loss = (total[0] / total[1]).item()
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: stopped; the checkpoint before it is kept")
    return loss


def compile_model(model, batches, config, machine):
    """torch.compile where it pays and works, tried forward and backward; else the model itself."""
    if not (machine.device.type == "cuda" if config.compile == "auto" else config.compile):
        return model
    x, y, _ = batches.global_batch(0)[1][0]
    try:
        compiled = torch.compile(model)
        with machine.autocast():
            loss = compiled(x, y)[1]
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler can fail with
        note(f"note: torch.compile failed ({str(error).strip().splitlines()[0]}); training goes on uncompiled")
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


def read_losses(pending, progress, scaler, machine):
    """The (loss, gradient norm) pairs that are still on the device → losses, norms; a non-finite one ends the run.

    Once for many steps, because each reading makes the device wait. No checkpoint is written before one.
    """
    pairs = torch.stack([torch.stack(pair) for pair in pending]).cpu()
    pending.clear()
    pairs[:, 0] = machine.sum(pairs[:, 0].contiguous())  # each rank has its share of the loss
    advice = "stopped, and the checkpoint before it is kept; try a lower --learning_rate or a smaller --grad_clip"
    for step, (loss, norm) in enumerate(pairs.tolist(), progress.step - len(pairs) + 1):
        # A scaler tries out how far it can go: it skips a step that overflows.
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise UserError(f"step {step}: loss {loss}, gradient norm {norm}: {advice}")
    if scaler.get_scale() < 1e-4:
        raise UserError(f"step {progress.step}: no loss scale is small enough for float16's gradients: {advice}")
    return pairs.T.tolist()


# ---------------------------------------------------------------- set-up


def open_data(config, machine):
    """→ dataset, training batches, validation batches."""
    machine.on_rank_0(prepare_if_missing, config.dataset, config.data_dir)
    dataset = machine.on_all_ranks(open_dataset, config.data_dir, config.dataset)
    rows = config.batch_size * config.gradient_accumulation_steps
    if rows % machine.world:
        raise UserError(
            f"--batch_size={config.batch_size} × --gradient_accumulation_steps={config.gradient_accumulation_steps} "
            f"is not divisible by the {machine.world} processes"
        )
    bos, batches = dataset.tokenizer.bos, []
    for name, tokens in (("train", dataset.train), ("val", dataset.val)):
        if bos is None and len(tokens) <= config.block_size:
            raise UserError(
                f"the {name} split of {config.dataset} has {len(tokens)} tokens, too few for "
                f"--block_size={config.block_size}: use a smaller one or a longer text"
            )
        settings = {"rows": rows, "micro_rows": config.batch_size, "seed": config.seed}
        settings |= {"device": machine.device, "rank": machine.rank, "world_size": machine.world}
        batches.append(Batches(tokens, bos, config.block_size, **settings))
    return dataset, *batches


def build_model(config, state, vocab_size, machine):
    """→ model, its moving average or None, progress; as `checkpoint.start` decided."""
    torch.manual_seed(derive_seed("init", config.seed))
    model, ema, progress = GPT(config, vocab_size), None, Progress()
    # 1. resume: the run's weights and progress. 2. scratch: as initialised. 3. fine-tune: the weights one samples with.
    if config.init_from == "resume":
        progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        checkpoint.load_weights(model, state["model"], config.out_dir)
    elif state is not None:
        checkpoint.load_weights(model, state["model"] if state["ema"] is None else state["ema"], config.init_from)
    model.to(machine.device)
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        if config.init_from == "resume":
            checkpoint.load_weights(ema.module, state["ema"], config.out_dir)
            ema.n_averaged.fill_(progress.step)
    return model, ema, progress


# ---------------------------------------------------------------- the run


def train(config, flags, state, machine):
    """Set up, train, report. `flags`, `state`: as from `checkpoint.start`. → exit code"""
    dataset, train_batches, val_batches = open_data(config, machine)
    if state is not None:
        checkpoint.check_vocabulary(state, dataset)
    if config.dry_run:
        with torch.device("meta"):  # shapes alone, so that a model that fits nowhere can be described too
            model = GPT(config, dataset.tokenizer.vocab_size)
        if machine.rank == 0:
            print(describe(model, train_batches, config))
        return 0
    model, ema, progress = build_model(config, state, dataset.tokenizer.vocab_size, machine)
    eval_model = model if ema is None else ema.module
    _, lengths = val_batches.validation_rows()
    if 0 < config.eval_iters * config.batch_size < len(lengths):
        covered = lengths[: config.eval_iters * config.batch_size].sum()
        note(f"note: --eval_iters={config.eval_iters} evaluates the first {covered:,} of {lengths.sum():,} tokens only")
    if config.eval_only:
        val_loss = evaluate(eval_model, val_batches, config, machine)
        if machine.rank == 0:
            print(
                f"step {state['step'] if state else 0}: val loss {val_loss:.4f}, perplexity {perplexity(val_loss):.3f}"
            )
        return 0
    if progress.step >= config.max_iters:
        note(f"note: {config.out_dir} is at step {progress.step} already; to go on, raise --max_iters")
        return 0

    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if scaler.is_enabled() and config.optimizer == "muon":
        raise UserError("--optimizer=muon: not in float16, where steps overflow; use --dtype=float32 or bfloat16")
    optimizers = make_optimizers(model, config)
    if config.init_from == "resume":
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            checkpoint.load_optimizer(optimizer, saved)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    machine.on_rank_0(checkpoint.claim, config)
    train_model = compile_model(model, train_batches, config, machine)
    if machine.world > 1:
        train_model = DistributedDataParallel(train_model)
    seen = (model, optimizers, dataset.tokenizer, val_batches)
    board = machine.on_all_ranks(open_board, config, progress, machine, *seen)
    reporter = Reporter(config, progress, machine, model.flops_per_token(), board)
    reporter.say(
        f"{model.num_params():,} parameters on {machine.name}, {str(machine.dtype).removeprefix('torch.')}; "
        f"{len(dataset.train):,} tokens to train on, {len(dataset.val):,} to evaluate on"
    )

    def save(*names):
        saved = {
            "config": asdict(config),
            "flags": flags,
            "vocab_size": model.vocab_size,
            "tokenizer": dataset.tokenizer.to_json(),
            "model": model.state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
            "scaler": scaler.state_dict(),
            **asdict(progress),
        }
        for name in names:
            checkpoint.save(Path(config.out_dir) / name, saved)

    def draw(count):
        return draw_samples(eval_model, dataset.tokenizer, count, config, machine, progress.step)

    pending, patience_left, stopped_by = [], True, 0
    with StopSignals() as stop, reporter:
        while progress.step < config.max_iters and patience_left and not stopped_by:
            began = time.perf_counter()
            lr = learning_rate(progress.step, config)
            loss, norm, tokens = train_step(
                train_model, train_batches, progress.step, optimizers, scaler, config, machine
            )
            pending.append((loss, norm))
            if ema is not None:
                ema.update_parameters(model)
            progress.step += 1
            stopped_by = stop.agreed(machine)
            evaluating = config.evaluates_after(progress.step)
            if logging := progress.step % config.log_interval == 0 or evaluating or stopped_by:
                losses, norms = read_losses(pending, progress, scaler, machine)
                progress.losses += losses
            reporter.step(tokens, time.perf_counter() - began)
            if logging:
                reporter.log(losses, norms, lr)
            better = False
            if evaluating:
                val_loss = evaluate(eval_model, val_batches, config, machine)
                better = val_loss < progress.best_val_loss
                progress.best_val_loss = min(val_loss, progress.best_val_loss)
                progress.evals_since_best = 0 if better else progress.evals_since_best + 1
                patience_left = not config.patience or progress.evals_since_best < config.patience
            progress.seconds += time.perf_counter() - began
            if evaluating:
                machine.on_rank_0(reporter.evaluated, val_loss, lr, draw)
                progress.losses = []
            if evaluating or stopped_by:
                # best.pt first: should the machine stop in between, the older last.pt comes to the same best again.
                machine.on_rank_0(save, *(["best.pt", "last.pt"] if better else ["last.pt"]))
    if stopped_by:
        name = signal.Signals(stopped_by).name
        reporter.say(f"stopped by {name} at step {progress.step}; go on with --init_from=resume")
        return 128 + stopped_by
    if not patience_left:
        reporter.say(f"stopped early: {config.patience} evaluations without a better one")
    if config.final_samples:
        reporter.say(f"{config.final_samples} samples:")
    reporter.samples(draw, config.final_samples)
    reporter.say(
        f"best val loss {progress.best_val_loss:.4f}; sample with: python sample.py --out_dir={config.out_dir}"
    )
    return 0


def main(argv):
    if not argv:
        print(f"python train.py CONFIG [--key=value …], where CONFIG is one of\n{list_configs()}\nor a file like them")
        return 2
    positional, flags = read_args(argv, TrainConfig, __doc__)
    if len(positional) > 1:
        raise UserError(f"one config file, please, not {len(positional)}: {' '.join(positional)}")
    from_file = read_config_file(positional[0], TrainConfig) if positional else {}
    ranks = Ranks.from_environment()
    with ranks.joined():
        config, flags, state = ranks.on_all_ranks(checkpoint.start, from_file, flags)
        machine = ranks.on_all_ranks(pick_machine, config, ranks)
        with memory_limits(machine):
            return train(config, flags, state, machine)


if __name__ == "__main__":
    run(main)
