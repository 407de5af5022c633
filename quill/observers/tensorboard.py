"""The output of a run in TensorBoard: curves, samples, histograms, embedding, attention, hyperparameters.

    python train.py config/names.py --tensorboard=True
    tensorboard --logdir=out

The package `tensorboard` is imported when a TensorBoard is created, so that a run without it does not need the package.

Shapes: T tokens in a sequence.
"""

import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from quill.data.batches import Batches
from quill.errors import UserError
from quill.observers.observer import Evaluation, LogEntry, Observer
from quill.state import TrainState
from quill.trace import attention_steps

LONGEST_TEXT = 64  # tokens whose attention is drawn
MOST_TOKENS = 1024  # tokens whose embeddings are drawn
PIXELS = 256  # a smaller image is enlarged to about this


class TensorBoard(Observer):
    """Event files in out_dir/tensorboard. Weights and attention are those in training, not their moving average's."""

    def __init__(self, state: TrainState, val_batches: Batches):
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        self.config, self.progress, self.model = state.config, state.progress, state.model
        starts, lengths = val_batches.validation_rows(0, 2**16)
        longest = [lengths.argmax()]  # of a stream, whose rows have equal lengths, the first row
        x, _, tokens = val_batches.gather(starts[longest], lengths[longest])
        self.idx = x[:, : min(tokens, LONGEST_TEXT)]  # (1, T)
        self.text = state.tokenizer.decode(self.idx[0].tolist())
        self.samples_wanted = max(1, self.config.eval_samples)
        self.gradients = {}
        # This hook runs after clipping, and before the gradients are deleted.
        state.optimizers[0][0].register_step_pre_hook(self._keep_gradients)

        # TensorBoard writes in a thread, which keeps its error for the next call and prints a traceback as well.
        self.hook_before, threading.excepthook = threading.excepthook, self._report_thread
        self.folder = Path(self.config.out_dir) / "tensorboard"
        options = {name: value for name, value in vars(self.config).items() if value is not None}
        options = {name: str(value) if isinstance(value, bool) else value for name, value in options.items()}
        # Without the experiment's summary, TensorBoard shows the columns of all runs, not of one run.
        _, start, self.end = hparams(options, {})
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # the writer's thread would fail with a traceback
            # TensorBoard keeps the first hyperparameters that it finds, but a resume may have changed them. Their
            # file is written first, because TensorBoard reads every file but the last only once.
            for path in self.folder.glob("events.out.tfevents.*.hparams"):
                path.unlink()
            with SummaryWriter(self.folder, filename_suffix=".hparams") as writer:
                writer._get_file_writer().add_summary(start, 0)  # SummaryWriter has no method for such a summary
            # Steps after the checkpoint will run again; purge_step drops their old points. TensorBoard ignores the
            # first purge_step that it finds, so a new run writes one too.
            self.writer = SummaryWriter(self.folder, purge_step=self.progress.step + 1, flush_secs=10)

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"can't write {self.folder}: {error.strerror or error}; try --tensorboard=False") from None

    def _report_thread(self, args):
        if not isinstance(args.exc_value, OSError):
            self.hook_before(args)

    def _keep_gradients(self, optimizer, args, kwargs):
        """Keep the gradients of a step that an evaluation follows. No copy: training lets go of them after the step."""
        if self.config.evaluates_after(self.progress.step + 1):
            self.gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def logged(self, entry: LogEntry) -> None:
        """Add one point to each curve. TensorBoard sorts by name, so the losses are first."""
        values = {"loss/train": entry.loss, "optimizer/lr": entry.lr}
        values |= {"optimizer/gradient_norm": entry.gradient_norm, "performance/tokens_per_s": entry.tokens_per_s}
        with suppress(OSError):  # ignored here: `evaluated` writes too, and reports the error on all ranks
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, entry.step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Write everything that an evaluation shows; it is on the disk when this returns, before the checkpoint is."""
        step, writer = evaluation.step, self.writer
        with self._writing():
            writer.add_scalar("loss/val", evaluation.val_loss, step)
            writer.add_scalar("loss/val_bits_per_byte", evaluation.bits_per_byte, step)
            for name, parameter in self.model.named_parameters():
                writer.add_histogram(f"weights/{name}", parameter, step)
            for name, gradient in self.gradients.items():
                if gradient.isfinite().all():  # float16's scaler lets some overflow now and then
                    writer.add_histogram(f"weights_grad/{name}", gradient, step)
            self.gradients = {}
            embedding = self.model.transformer.wte.weight.detach()[:MOST_TOKENS].cpu()
            writer.add_image("token_embedding", signed_colors(embedding), step)
            writer.add_text("self_attention", as_code(self.text), step)
            for layer, steps in enumerate(attention_steps(self.model, self.idx)):
                for head, weights in enumerate(steps["softmax"].cpu()):
                    # √, because most weights are near 1/T and would look black next to the first token's, which is 1.
                    writer.add_image(f"self_attention/layer_{layer}_head_{head}", enlarged(weights.sqrt()[None]), step)
            writer.flush()

    def sampled(self, step: int, texts: list[str]) -> None:
        """Write the samples."""
        with self._writing():
            self.writer.add_text("samples", "\n\n---\n\n".join(map(as_code, texts)), step)
            self.writer.flush()

    def close(self) -> None:
        """Mark the run's end, and close the event file."""
        with self._writing():
            self.writer._get_file_writer().add_summary(self.end, self.progress.step)
            self.writer.close()
        threading.excepthook = self.hook_before


def signed_colors(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, columns) → an image (3, …): white is 0, red positive, blue negative, full colour the largest."""
    x = matrix / matrix.abs().max().clamp(min=1e-12)
    return enlarged(torch.stack([1 + x.clamp(max=0), 1 - x.abs(), 1 - x.clamp(min=0)]))


def enlarged(image: torch.Tensor) -> torch.Tensor:
    """Repeat each element of a small `image` (channels, rows, columns), so that browsers don't blur it."""
    times = max(1, PIXELS // max(image.shape[1:]))
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def as_code(text: str) -> str:
    """Markdown that shows `text` unchanged. It is indented, because a sample may contain a fence."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
