"""What TensorBoard shows of a run: curves, samples, histograms, embedding, attention, hyperparameters.

    python train.py config/names.py --tensorboard=True
    tensorboard --logdir=out

It looks on: no gradient, random number or weight of the training depends on it. Board alone imports `tensorboard`, so
that a run without it needs no such package.

Shapes: B sequences in a batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from model import rotate
from quill.errors import UserError

LONGEST_TEXT = 64  # tokens whose attention is drawn
MOST_TOKENS = 1024  # whose embeddings are drawn
PIXELS = 256  # a smaller image is enlarged to about this


def open_board(config, progress, machine, *parts):
    """→ Board, or None on ranks other than 0 and without --tensorboard. `parts`: the rest of Board's arguments"""
    return Board(config, progress, *parts) if config.tensorboard and machine.rank == 0 else None


class Board:
    """Event files in out_dir/tensorboard. Weights and attention are those in training, not their moving average's."""

    def __init__(self, config, progress, model, optimizers, tokenizer, val_batches):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.config, self.progress, self.model = config, progress, model
        starts, lengths = val_batches.validation_rows()
        longest = slice(lengths.argmax(), lengths.argmax() + 1)  # of a stream, whose rows are all as long, the first
        x, _, tokens = val_batches.gather(starts[longest], lengths[longest])
        self.idx = x[:, : min(tokens, LONGEST_TEXT)]  # (1, T)
        self.text = tokenizer.decode(self.idx[0].tolist())
        self.gradients = {}
        optimizers[0][0].register_step_pre_hook(self._keep_gradients)  # after clipping, before any are dropped

        self.folder = Path(config.out_dir) / "tensorboard"
        options = {name: value for name, value in asdict(config).items() if value is not None}
        options = {name: str(value) if isinstance(value, bool) else value for name, value in options.items()}
        # The experiment's summary is left out: TensorBoard then finds columns and metrics in all runs, not in one.
        _, start, self.end = hparams(options, {})
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # the writer's thread would fail with a traceback
            # TensorBoard keeps the first hyperparameters that it finds, but a resume may have changed them. Their
            # file comes before the other, because a file that is not the last is read once only.
            for path in self.folder.glob("events.out.tfevents.*.hparams"):
                path.unlink()
            with SummaryWriter(self.folder, filename_suffix=".hparams") as writer:
                writer.file_writer.add_summary(start, 0)
            # What a run wrote behind its checkpoint will come again. A start marks where, and the first of them is
            # only counted: so a fresh run has one too.
            self.writer = SummaryWriter(self.folder, purge_step=progress.step + 1, flush_secs=10)

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"can't write {self.folder}: {error.strerror or error}; try --tensorboard=False") from None

    @torch.no_grad()
    def _keep_gradients(self, optimizer, args, kwargs):
        """Copies of the gradients of a step that an evaluation follows; training drops its own with the step."""
        if self.config.evaluates_after(self.progress.step + 1):
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            # float16's scaler lets gradients overflow now and then: they have no histogram.
            self.gradients = {name: g.to("cpu", copy=True) for name, g in gradients.items() if g.isfinite().all()}

    def log(self, loss, norm, lr, tokens_per_s):
        """One point of each curve. TensorBoard sorts by name: the losses come first."""
        values = {"loss/train": loss, "optimizer/lr": lr, "optimizer/gradient_norm": norm}
        values["performance/tokens_per_s"] = tokens_per_s
        with suppress(OSError):  # `evaluated`, for which all ranks wait, will meet it again
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, self.progress.step)

    def evaluated(self, val_loss, samples):
        """All that an evaluation shows; on the disk when this returns, as the checkpoint comes next."""
        step, writer = self.progress.step, self.writer
        with self._writing():
            writer.add_scalar("loss/val", val_loss, step)
            writer.add_text("samples", "\n\n---\n\n".join(map(as_code, samples)), step)
            for name, parameter in self.model.named_parameters():
                writer.add_histogram(f"weights/{name}", parameter, step)
            for name, gradient in self.gradients.items():
                writer.add_histogram(f"weights_grad/{name}", gradient, step)
            self.gradients = {}
            embedding = self.model.transformer.wte.weight.detach()[:MOST_TOKENS].cpu()
            writer.add_image("token_embedding", signed_colors(embedding), step)
            writer.add_text("self_attention", as_code(self.text), step)
            for layer, maps in enumerate(attention_maps(self.model, self.idx)):
                for head, weights in enumerate(maps.cpu()):
                    # √: most weights are near 1/T, and would all be black beside the first token's, which is 1.
                    writer.add_image(f"self_attention/layer_{layer}_head_{head}", enlarged(weights.sqrt()[None]), step)
            writer.flush()

    def close(self):
        with self._writing():
            self.writer.file_writer.add_summary(self.end, self.progress.step)
            self.writer.close()


# ---------------------------------------------------------------- attention


@torch.no_grad()
def attention_maps(model, idx):
    """Each layer's attention weights on `idx` (1, T), in float32. → [(H, T, T)], rows are queries"""
    layers = [block.attn for block in model.transformer.h]
    qkv, was_training = [], model.training  # (1, T, 3C) each
    hooks = [layer.c_attn.register_forward_hook(lambda module, args, y: qkv.append(y)) for layer in layers]
    model.eval()
    try:
        model.hidden(idx)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    rotary = None if model.rotary is None else model.rotary[:, : idx.size(1)]
    return [attention_weights(layer, y, rotary)[0] for layer, y in zip(layers, qkv, strict=True)]


def attention_weights(layer, qkv, rotary=None):
    """softmax(q kᵀ / √D + causal mask): what `layer.attend` weighs the values by. `qkv` (B, T, 3C) → (B, H, T, T)"""
    q, k, _ = qkv.unflatten(-1, (3, layer.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    q, k = layer.qk_norm(q), layer.qk_norm(k)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


# ---------------------------------------------------------------- images, text


def signed_colors(matrix):
    """(rows, columns) → an image (3, …): white is 0, red positive, blue negative, full colour the largest."""
    x = matrix / matrix.abs().max().clamp(min=1e-12)
    return enlarged(torch.stack([1 + x.clamp(max=0), 1 - x.abs(), 1 - x.clamp(min=0)]))


def enlarged(image):
    """Whole pixels for each element of a small `image` (channels, rows, columns), so that browsers don't blur them."""
    times = max(1, PIXELS // max(image.shape[1:]))
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def as_code(text):
    """Markdown that shows `text` as it stands: fences could be part of a sample, an indent can't."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
