"""The events of a run, and the base class of the observers that receive them."""

from dataclasses import dataclass

from quill.machine import StopSignals


@dataclass(frozen=True)
class LogEntry:
    """The training steps since the previous entry: means of their losses and gradient norms, and their speed."""

    step: int
    loss: float  # nats per token
    gradient_norm: float
    lr: float  # of the last of these steps
    tokens_per_s: float  # since the last evaluation
    losses: list[float]  # of each of these steps
    gradient_norms: list[float]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the validation split, and the training since the previous evaluation."""

    step: int
    lr: float
    train_loss: float  # the mean over the steps since the previous evaluation, nats per token
    val_loss: float  # nats per token
    tokens_per_s: float  # without the time of evaluations
    seconds: float  # since the run began, evaluations included
    bits_per_byte: float  # val_loss in bits, per byte of the text; nan where the tokens have no bytes


class Observer:
    """Base class of all observers: each method does nothing, and a subclass overrides those that it needs."""

    samples_wanted = 0  # samples to be drawn at each evaluation

    def before_step(self, stop: StopSignals) -> None:
        """A training step is next. An observer may wait here, as long as there is no signal to stop."""

    def stepped(self) -> None:
        """A training step has ended. The device may still be busy with it."""

    def logged(self, entry: LogEntry) -> None:
        """The losses have been read: every config.log_interval steps, before evaluations, and after a stop signal."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The model has been evaluated."""

    def sampled(self, step: int, texts: list[str]) -> None:
        """Samples have been drawn, after an evaluation. A checkpoint is written next."""

    def finished(self, best_val_loss: float, texts: list[str]) -> None:
        """The run has ended, and no signal stopped it. `texts` are the final samples."""

    def close(self) -> None:
        """Release files and the terminal, also after an error."""
