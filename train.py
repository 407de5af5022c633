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
import torch.distributed as dist
from data.token_files import ensure, open_dataset
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import checkpoint
from config._cli import list_configs, read_args, read_config_file, run
from config._errors import UserError
from config._machine import StopSignals, pick_machine
from config._schema import TrainConfig
from data.batches import Batches, derive_seed
from model import GPT
from report import Reporter, draw_samples, note, perplexity


@dataclass
class Progress:
    """How far a run has come: with the weights and the optimizers, all that a resume needs."""

    step: int = 0
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    losses: list[float] = field(default_factory=list)  # one a step, since the last row of metrics.csv
    seconds: float = 0.0


# ---------------------------------------------------------------- optimizer and schedule


def learning_rate(step, config):
    """The learning rate of a step, counted from 0: linear warm-up, then the schedule down to min_lr."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.learning_rate
    start = config.warmup_iters
    if config.schedule == "wsd":  # warm-up, stable, decay (Hägele et al. 2024)
        start = max(start, config.decay_end - int(config.wsd_decay * config.decay_end))
    if step < start:
        return config.learning_rate
    done = min(1.0, (step - start) / max(1, config.decay_end - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def make_optimizers(model, config):
    """→ [(optimizer, its peak learning rate)]. Every parameter is in exactly one group; only matrices decay."""
    muon, decay, no_decay = [], [], []
    for name, parameter in model.named_parameters():
        block_matrix = parameter.dim() == 2 and name.startswith("transformer.h.")
        if config.optimizer == "muon" and block_matrix:
            muon.append(parameter)
        else:
            (decay if parameter.dim() >= 2 else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0, fused=True
    )
    optimizers = [(adamw, config.learning_rate)]
    if muon:
        settings = {"momentum": config.muon_momentum, "weight_decay": config.weight_decay, "nesterov": True}
        optimizers.append((torch.optim.Muon(muon, config.muon_learning_rate, **settings), config.muon_learning_rate))
    return optimizers


def load_optimizer(optimizer, saved):
    """The saved moments, with the settings that this run was given."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


# ---------------------------------------------------------------- a step, an evaluation


def train_step(model, batches, step, optimizers, scaler, config, machine):
    """One optimizer step on the step's global batch. → loss, gradient norm (both still on the device), tokens."""
    torch.manual_seed(derive_seed("dropout", config.seed, step, machine.rank))
    total, micro_batches = batches.step(step)
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
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
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
    return (total[0] / total[1]).item()


def compile_model(model, batches, config, machine):
    """torch.compile where it pays and works, tried forward and backward; else the model itself."""
    if not (machine.device.type == "cuda" if config.compile == "auto" else config.compile):
        return model
    x, y, _ = batches.step(0)[1][0]
    compiled = torch.compile(model)
    try:
        with machine.autocast():
            loss = compiled(x, y)[1]
        loss.backward()
    except Exception as error:  # whatever a compiler can fail with
        note(f"torch.compile failed ({str(error).strip().splitlines()[0]}); training goes on uncompiled", machine)
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


def read_losses(unread, progress, machine, check_norms):
    """The (loss, gradient norm) pairs that are still on the device → floats; a non-finite one ends the run.

    Once for many steps, because each reading makes the device wait. No checkpoint is written before one.
    """
    pairs = torch.stack([torch.stack(pair) for pair in unread]).cpu()
    unread.clear()
    pairs[:, 0] = machine.sum(pairs[:, 0].contiguous())  # each rank has its share of the loss
    for step, (loss, norm) in enumerate(pairs.tolist(), progress.step - len(pairs) + 1):
        if not math.isfinite(loss) or (check_norms and not math.isfinite(norm)):
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {norm}: stopped, and the checkpoint before it is kept; "
                "try a lower --learning_rate or a smaller --grad_clip"
            )
    return pairs[:, 0].tolist()


# ---------------------------------------------------------------- set-up


def prepare_out_dir(config):
    """Make out_dir, see that it can be written to, and refuse to touch another run that it holds."""
    folder = Path(config.out_dir)
    held = [folder / name for name in ("last.pt", "best.pt") if (folder / name).exists()]
    if held and config.init_from != "resume" and not config.overwrite:
        raise UserError(
            f"{held[0]} is another run's: resume it with --init_from=resume, "
            "choose another --out_dir, or replace it with --overwrite=True"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out_dir={config.out_dir}: can't be written to: {error.strerror}") from None


def open_data(config, state, machine):
    """→ dataset, training batches, validation batches; checked against the options and the checkpoint."""
    machine.on_rank_0(lambda: ensure(config.dataset, config.data_dir))
    dataset = machine.on_all_ranks(lambda: open_dataset(config.data_dir, config.dataset))
    if state is not None:
        known = state["tokenizer"]
        same = known is None or known == dataset.tokenizer.to_json()
        if not same or state["vocab_size"] != dataset.tokenizer.vocab_size:
            raise UserError(
                f"--dataset={config.dataset}: its vocabulary is not the one that the checkpoint was trained on"
            )
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
        settings |= {"device": machine.device, "rank": machine.rank, "world": machine.world}
        batches.append(Batches(tokens, bos, config.block_size, **settings))
    return dataset, *batches


# ---------------------------------------------------------------- the run


def train(config, flags, state, machine):
    """Set up, train, report. `state`: the checkpoint to start from, or None. → exit code"""
    dataset, train_batches, val_batches = open_data(config, state, machine)
    if not config.eval_only:
        machine.on_rank_0(lambda: prepare_out_dir(config))
    resuming = config.init_from == "resume"
    progress = Progress(**{f.name: state[f.name] for f in fields(Progress)}) if resuming else Progress()
    torch.manual_seed(derive_seed("init", config.seed))
    model = GPT(config, dataset.tokenizer.vocab_size)
    if state is not None:
        weights = state["model"] if resuming or state["ema"] is None else state["ema"]
        checkpoint.load_weights(model, weights, config.init_from)
    model.to(machine.device)
    ema = None
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        if resuming:
            checkpoint.load_weights(ema.module, state["ema"], config.init_from)
            ema.n_averaged.fill_(progress.step)
    judged = model if ema is None else ema.module  # evaluated, sampled from

    if config.eval_only:
        val_loss = evaluate(judged, val_batches, config, machine)
        if machine.rank == 0:
            print(f"step {progress.step}: val loss {val_loss:.4f}, perplexity {perplexity(val_loss):.3f}")
        return 0
    if progress.step >= config.max_iters:
        note(f"{config.out_dir} is at step {progress.step} already; to go on, raise --max_iters", machine)
        return 0

    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if resuming:
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    stepped = compile_model(model, train_batches, config, machine)
    if machine.world > 1:
        stepped = DistributedDataParallel(stepped)
    reporter = Reporter(config, progress, machine, model.flops_per_token())
    reporter.say(
        f"{model.num_params():,} parameters on {machine.name}, {str(machine.dtype).removeprefix('torch.')}; "
        f"{len(dataset.train):,} tokens to train on, {len(dataset.val):,} to evaluate on"
    )

    def save(best):
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
        folder = Path(config.out_dir)
        if machine.rank == 0:
            checkpoint.save(folder / "last.pt", saved, folder / "best.pt" if best else None)

    unread, patient = [], True
    with StopSignals() as stop:
        while progress.step < config.max_iters and patient:
            began = time.perf_counter()
            loss, norm, tokens = train_step(stepped, train_batches, progress.step, optimizers, scaler, config, machine)
            lr = learning_rate(progress.step, config)
            progress.step += 1
            unread.append((loss, norm))
            if ema is not None:
                ema.update_parameters(model)
            stopped_by = stop.agreed(machine)
            evaluating = progress.step % config.eval_interval == 0 or progress.step == config.max_iters
            logging = progress.step % config.log_interval == 0 or evaluating or stopped_by
            if logging:
                losses = read_losses(unread, progress, machine, check_norms=not scaler.is_enabled())
                progress.losses += losses
            reporter.step(tokens, time.perf_counter() - began)
            if logging:
                reporter.log(losses, lr)
            if evaluating:
                val_loss = evaluate(judged, val_batches, config, machine)
                better = val_loss < progress.best_val_loss
                progress.best_val_loss = min(val_loss, progress.best_val_loss)
                progress.evals_since_best = 0 if better else progress.evals_since_best + 1
                patient = not config.patience or progress.evals_since_best < config.patience
            progress.seconds += time.perf_counter() - began
            if evaluating:
                reporter.evaluated(val_loss, lr)
                progress.losses = []
                for text in draw_samples(
                    judged, dataset.tokenizer, config.eval_samples, config, machine, progress.step
                ):
                    reporter.say(text)
            if evaluating or stopped_by:
                save(best=evaluating and better)
            if stopped_by:
                break
    reporter.close()
    if stopped_by:
        reporter.say(
            f"stopped by {signal.Signals(stopped_by).name} at step {progress.step}; go on with --init_from=resume"
        )
        return 128 + stopped_by
    if not patient:
        reporter.say(f"stopped early: {config.patience} evaluations without a better one")
    for text in draw_samples(judged, dataset.tokenizer, config.final_samples, config, machine, progress.step):
        reporter.say(text)
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
    config, flags, state = checkpoint.start(from_file, flags)
    machine = pick_machine(config)
    if machine.world == 1:
        return train(config, flags, state, machine)
    # Tensors on the CPU (flags, sums) always go by gloo; gradients on GPUs by nccl.
    dist.init_process_group("cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo")
    try:
        return train(config, flags, state, machine)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
