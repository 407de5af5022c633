"""Everything that a run resumes from, in one object: weights, their average, optimizers, scaler and progress.

Random numbers and batches are not saved: they are derived from the seed and the step.
"""

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from model import GPT
from quill import checkpoint, cpu
from quill.checkpoint import Checkpoint
from quill.cli import note
from quill.data.batches import DATA_ORDER, derive_seed
from quill.data.tokenizers import Tokenizer
from quill.distributed import AgreedError
from quill.errors import check
from quill.machine import Machine
from quill.optimizer import make_optimizers
from quill.options import Options, TrainConfig
from quill.parallel import DDP, Strategy
from quill.run_folder import what_is_kept
from quill.schema import check_moments


@dataclass
class Progress:
    """How far a run has come, as plain values."""

    step: int = 0  # optimizer steps that are done
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    losses: list[float] = field(default_factory=list)  # one for each step since the last row of metrics.csv
    seconds: float = 0.0  # of training and evaluation


class TrainState:
    """What a run resumes from. `state_dict` is a checkpoint's content, and `load_state_dict` restores it.

    A new TrainState can be evaluated. `add_optimizers` makes it ready to be trained.

    train_model: the model as a training step calls it, which may be compiled and distributed; it shares its parameters
    with `model`. pending: the loss and the gradient norm of each step since `read_losses`, still on the device.
    """

    def __init__(
        self,
        config: TrainConfig,
        flags: Options,
        tokenizer: Tokenizer,
        machine: Machine,
        saved: Checkpoint | None = None,
    ):
        self.config, self.flags, self.tokenizer, self.machine = config, flags, tokenizer, machine
        self.progress, self.data_order = Progress(), DATA_ORDER
        torch.manual_seed(derive_seed("init", config.seed))
        self.model = GPT(config, tokenizer.vocab_size)
        # 1. resume: all of the run's state, below. 2. scratch: as initialised. 3. fine-tune: the weights alone, here.
        if saved is not None and config.init_from != "resume":
            self.model.load_state_dict(checkpoint.weights_to_sample(saved))
        if machine.device.type == "cpu":
            cpu.speed_up(self.model)
        self.train_model: Any = self.model
        self.ema = deepcopy(self.model) if config.ema_decay else None
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        if saved is not None and config.init_from == "resume":
            self.load_state_dict(saved)
        self.strategy = pick_strategy(config, machine)
        for model in (self.model,) if self.ema is None else (self.model, self.ema):
            self.strategy.prepare(model)

    def add_optimizers(self, saved: Checkpoint | None = None) -> None:
        """Build the optimizers, which an evaluation does not need. A resume restores their state from `saved`."""
        self.optimizers = make_optimizers(self.model, self.config, self.strategy)
        self.parameters = list(self.model.parameters())  # listed once: at every step, it would take time
        self.averages = [] if self.ema is None else list(self.ema.parameters())
        if saved is None or self.config.init_from != "resume":
            return
        optimizers = [optimizer for optimizer, _ in self.optimizers]
        check_moments(optimizers, saved["optimizers"], self.progress.step, self.config.out_dir)
        for optimizer, moments in zip(optimizers, saved["optimizers"], strict=True):
            checkpoint.load_optimizer(optimizer, moments, self.strategy)
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])

    @property
    def eval_model(self) -> GPT:
        """The weights that evaluations and samples use: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema

    def model_to_sample(self, count: int) -> GPT:
        """Return the model to draw `count` samples with; if sharded, a whole copy on rank 0. Every rank calls this."""
        if not (count and self.strategy.is_sharded):
            return self.eval_model
        weights = self.strategy.full_state_dict(self.eval_model)
        if self.machine.group.rank > 0:
            return self.eval_model  # which these ranks do not use
        saved = {"config": asdict(self.config), "vocab_size": self.model.vocab_size, "model": weights, "ema": None}
        return cpu.speed_up(checkpoint.load_model(saved).to(self.machine.device))

    def state_dict(self) -> Checkpoint:
        """Return the content of a checkpoint, without its format number. Every rank calls this, and rank 0 has it."""
        return {
            "config": asdict(self.config),
            "flags": self.flags,
            "vocab_size": self.model.vocab_size,
            "tokenizer": self.tokenizer.to_json(),
            "model": self.strategy.full_state_dict(self.model),
            "ema": None if self.ema is None else self.strategy.full_state_dict(self.ema),
            "optimizers": [self.strategy.full_optimizer_state_dict(optimizer) for optimizer, _ in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "data_order": self.data_order,
            "threads": torch.get_num_threads() if self.machine.device.type == "cpu" else None,
            **asdict(self.progress),
        }

    def load_state_dict(self, saved: Checkpoint) -> None:
        """Restore what `state_dict` returned, without options and flags; `add_optimizers` restores the optimizers."""
        self.progress = Progress(**{f.name: saved[f.name] for f in fields(Progress)})
        self.progress.losses = list(saved["losses"])
        self.data_order = saved["data_order"]
        self.model.load_state_dict(saved["model"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the weights' moving average, if there is one. The first step's weights are its first value.

        torch's AveragedModel does the same, but makes the host wait for a GPU at every step.
        """
        if self.ema is not None:
            local, decay = self.strategy.to_local, self.config.ema_decay
            averages, weights = [local(p) for p in self.averages], [local(p) for p in self.parameters]
            torch._foreach_lerp_(averages, weights, 1 - decay if self.progress.step else 1.0)

    def read_losses(self) -> tuple[list[float], list[float]]:
        """Return the losses and the gradient norms of the pending steps. Raise a UserError if one is not finite.

        Reading waits until the device has finished, so this is called once for many steps, and before every save.
        """
        pairs = torch.stack([value for pair in self.pending for value in pair]).view(-1, 2).cpu()
        self.pending.clear()
        pairs[:, 0] = self.machine.group.sum(pairs[:, 0].contiguous())  # each rank has its share of the loss
        kept = what_is_kept(self.config.out_dir)
        advice = f"stopped; {kept}; try a lower --learning_rate or a smaller --grad_clip"
        for step, (loss, norm) in enumerate(pairs.tolist(), self.progress.step - len(pairs) + 1):
            # A scaler skips a step that overflows, and lowers its scale.
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
                raise AgreedError(f"step {step}: loss {loss}, gradient norm {norm}: {advice}")
        if self.scaler.get_scale() < 1e-4:
            overflow = "gradients overflow float16 even with the smallest loss scale"
            raise AgreedError(f"step {self.progress.step}: {overflow}: {advice}")
        losses, norms = pairs.T.tolist()
        self.progress.losses += losses
        return losses, norms

    def record(self, val_loss: float) -> bool:
        """Record an evaluation. → whether it is the best so far"""
        better = val_loss < self.progress.best_val_loss
        self.progress.best_val_loss = min(val_loss, self.progress.best_val_loss)
        self.progress.evals_since_best = 0 if better else self.progress.evals_since_best + 1
        return better

    @property
    def out_of_patience(self) -> bool:
        """Whether config.patience evaluations in a row have brought no new best."""
        return 0 < self.config.patience <= self.progress.evals_since_best


def pick_strategy(config: TrainConfig, machine: Machine) -> Strategy:
    """Return how the machine's ranks train the model."""
    if machine.group.world_size == 1:
        if config.shard:
            note("note: --shard=True does nothing for one process; torchrun starts several")
        return Strategy(machine)
    if not config.shard:
        return DDP(machine)
    check(machine.dtype != torch.float16, "--shard=True does not work with float16; use --dtype=float32 or bfloat16")
    from quill.sharded import FSDP  # here, because torch's DTensor takes half a second to import

    return FSDP(machine)
