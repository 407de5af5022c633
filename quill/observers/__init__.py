"""The output of a run: console, metrics.csv, TensorBoard, the page. Observers do not affect the weights.

The training loop calls `Observers`, which measures the speed and calls each observer in turn: metrics.csv, the console,
TensorBoard with --tensorboard=True, and the files of the page with --page=True. Ranks other than 0 have no observers.
"""

from functools import cached_property
from statistics import fmean

from quill.data.batches import Batches
from quill.generation import draw_samples
from quill.machine import Machine, StopSignals
from quill.observers.console import Console
from quill.observers.metrics_csv import MetricsFile
from quill.observers.observer import Evaluation, LogEntry, Observer
from quill.observers.page import Page
from quill.observers.tensorboard import TensorBoard
from quill.optimizer import learning_rate
from quill.scoring import bits_per_byte
from quill.state import TrainState


class Observers:
    """All observers of a run. A `with` block closes them when it ends, also after an error."""

    def __init__(self, state: TrainState, val_batches: Batches, machine: Machine):
        self.state, self.config, self.machine, self.val_batches = state, state.config, machine, val_batches
        self.tokens, self.busy = 0, 0.0  # tokens and seconds of training since the last evaluation
        self.observers: list[Observer] = []
        self.console = None
        if machine.group.rank == 0:
            step, config = state.progress.step, self.config
            # TensorBoard is first, because it may fail: then metrics.csv must not have changed.
            board = [TensorBoard(state, val_batches)] if config.tensorboard else []
            self.console = Console(config, step, machine, state.model.flops_per_token())
            self.observers = [MetricsFile(config.out_dir, step), self.console, *board]
            if config.page:
                self.observers.append(Page(state))
            if config.init_from == "resume":
                self.say(f"resumed at step {step}")

    def __enter__(self) -> "Observers":
        return self

    def __exit__(self, *error: object) -> None:
        for observer in self.observers:
            observer.close()

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.console:
            self.console.say(text)

    def tell(self, event: str, *args: object) -> None:
        """Call the method `event` of every observer."""
        for observer in self.observers:
            getattr(observer, event)(*args)

    @property
    def tokens_per_s(self) -> float:
        """The speed of training since the last evaluation, without the time of evaluations."""
        return self.tokens / max(self.busy, 1e-9)

    @cached_property
    def bytes_per_token(self) -> float:
        """The mean length of the tokens that are evaluated. Counted at the first evaluation, not at the start."""
        rows = self.config.eval_iters * self.config.batch_size or None
        return self.val_batches.bytes_per_token(self.state.tokenizer.token_bytes(), rows)

    def before_step(self, stop: StopSignals) -> None:
        """Report that a training step is next. This returns when no observer waits any longer."""
        self.tell("before_step", stop)

    def stepped(self, tokens: int, seconds: float) -> None:
        """Report a training step: the number of tokens in its global batch, and the seconds that it took."""
        self.tokens += tokens
        self.busy += seconds
        self.tell("stepped")

    def log(self, losses: list[float], norms: list[float]) -> None:
        """Report the losses and gradient norms of the steps since the last log entry."""
        step = self.state.progress.step
        lr = learning_rate(step - 1, self.config)
        self.tell("logged", LogEntry(step, fmean(losses), fmean(norms), lr, self.tokens_per_s, losses, norms))

    def evaluated(self, val_loss: float) -> None:
        """Report an evaluation, with the samples that observers show. Every rank calls this."""
        model = self.state.model_to_sample(self.config.eval_samples)
        self.machine.group.on_rank_0(self._report, val_loss, model)

    def _report(self, val_loss, model):
        progress = self.state.progress
        evaluation = Evaluation(
            step=progress.step,
            lr=learning_rate(progress.step - 1, self.config),
            train_loss=fmean(progress.losses),
            val_loss=val_loss,
            tokens_per_s=self.tokens_per_s,
            seconds=progress.seconds,
            bits_per_byte=bits_per_byte(val_loss, self.bytes_per_token),
        )
        self.tokens, self.busy = 0, 0.0
        self.tell("evaluated", evaluation)
        self.tell("sampled", progress.step, self._draw(model, max(o.samples_wanted for o in self.observers)))

    def finished(self) -> None:
        """Report the end of the run, with its final samples. Every rank calls this."""
        model = self.state.model_to_sample(self.config.final_samples)
        if self.observers:
            if self.config.final_samples:
                self.say(f"{self.config.final_samples} samples:")
            self.tell("finished", self.state.progress.best_val_loss, self._draw(model, self.config.final_samples))

    def _draw(self, model, count):
        state, step = self.state, self.state.progress.step
        return draw_samples(model, state.tokenizer, count, self.config, self.machine, step)
