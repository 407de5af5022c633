"""What people see of a run: what it would be, a progress bar or plain lines, metrics.csv, samples. It changes nothing.

What TensorBoard shows is quill/observers/tensorboard.py's; this file tells it.
"""

import math
import os
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from quill.cli import drop_output
from quill.data.batches import derive_seed
from quill.errors import UserError
from quill.files import replacing

COLUMNS = "step,lr,train_loss,val_loss,perplexity,tokens_per_s,seconds"


class Reporter:
    """A progress bar on a terminal and plain lines elsewhere; a row of metrics.csv at every evaluation. Rank 0's.

    board: tensorboard.py's Board, or None. Both are closed when the `with` of a Reporter ends, however it does.
    """

    def __init__(self, config, progress, machine, flops_per_token, board=None):
        self.config, self.progress, self.machine = config, progress, machine
        self.flops_per_token, self.board = flops_per_token, board
        self.quiet = machine.rank != 0
        on_terminal = sys.stderr.isatty() and not self.quiet and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self.lines = not self.quiet and not (on_terminal and sys.stdout.isatty())
        self.bar = tqdm(
            total=config.max_iters,
            initial=progress.step,
            disable=not on_terminal,
            dynamic_ncols=True,
            leave=False,
            bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self.tokens, self.busy = 0, 0.0  # tokens and seconds of training since the last row
        self.val_loss = None
        self.path = Path(config.out_dir) / "metrics.csv"
        if not self.quiet:
            self._drop_rows_after(progress.step)

    def _drop_rows_after(self, step):
        """Rows behind the checkpoint will be written again; one that a crash has torn goes too."""
        rows = []
        if self.path.exists():
            for row in self.path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
                number, *others = row.split(",")
                if number.isdecimal() and int(number) <= step and len(others) == COLUMNS.count(","):
                    rows.append(row)
        with replacing(self.path) as (file,):
            file.write(("\n".join([COLUMNS, *rows]) + "\n").encode())

    def say(self, text):
        """A line on stdout. A run goes on when its reader (`| head`) has gone."""
        if not self.quiet:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except BrokenPipeError:
                drop_output()

    @property
    def tokens_per_s(self):
        """Speed of training alone, evaluations left out, since the last row."""
        return self.tokens / max(self.busy, 1e-9)

    def step(self, tokens, seconds):
        self.tokens += tokens
        self.busy += seconds
        self.bar.update()

    def log(self, losses, norms, lr):
        """The mean of `losses` since the last call, and the readings. `norms`: the gradient's, as many."""
        loss = math.fsum(losses) / len(losses)
        if self.board:
            self.board.log(loss, math.fsum(norms) / len(norms), lr, self.tokens_per_s)
        text = f"loss {loss:.4f}"
        if self.val_loss is not None:
            text += f", val {self.val_loss:.4f}"
        text += f", lr {lr:.2e}, {self.tokens_per_s:,.0f} tokens/s"
        if self.machine.peak_flops:
            used = self.tokens_per_s * self.flops_per_token
            text += f", MFU {used / (self.machine.peak_flops * self.machine.world):.1%}"
        self.bar.set_postfix_str(text)
        if self.lines:
            self.say(f"step {self.progress.step}/{self.config.max_iters}: {text}")

    def evaluated(self, val_loss, lr, draw):
        """A row of metrics.csv, and samples. Its train loss is the mean over every step since the row before.

        draw: a number of samples → their texts.
        """
        step, losses = self.progress.step, self.progress.losses
        train_loss = math.fsum(losses) / len(losses)
        speed, seconds = round(self.tokens_per_s, 1), round(self.progress.seconds, 3)
        if not self.quiet:
            row = [step, lr, train_loss, val_loss, perplexity(val_loss), speed, seconds]
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(",".join(map(str, row)) + "\n")
            except OSError as error:
                raise UserError(f"can't write {self.path}: {error.strerror}; the last checkpoint is kept") from None
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {speed:,.0f} tokens/s")
        self.val_loss = val_loss
        self.tokens, self.busy = 0, 0.0
        texts = self.samples(draw, self.config.eval_samples)
        if self.board:
            self.board.evaluated(val_loss, texts or draw(1))

    def samples(self, draw, count):
        """Print `count` samples, and return them."""
        texts = [] if self.quiet else draw(count)
        for text in texts:
            self.say(text)
        return texts

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.board:
            self.board.close()


def describe(model, batches, config):
    """What a run would be, in lines: the modules with shapes and parameters, FLOPs, memory, steps in an epoch."""
    lines = [f"{'GPT':44}{model.num_params():>14,} parameters"]
    for name, module in model.named_modules():
        layer = re.match(r"transformer\.h\.(\d+)", name)
        if layer and int(layer[1]) > 0:
            if name == layer[0] == f"transformer.h.{config.n_layer - 1}":
                lines.append(f"  {'  ' * 2}{'h.1' if config.n_layer == 2 else f'h.1 to h.{layer[1]}'}: the same again")
            continue
        own = list(module.parameters(recurse=False))
        total = sum(parameter.numel() for parameter in module.parameters())
        if not name or not total:
            continue
        shapes = ", ".join(" × ".join(map(str, parameter.shape)) for parameter in own)
        tied = name == "lm_head" and config.tie_weights
        label = f"{'  ' * (name.count('.') + 1)}{name.rpartition('.')[2]:10} {shapes}"
        lines.append(f"{label:44}{total:>14,}{' (wte itself: counted once)' if tied else ''}")
    moments = 1 if config.optimizer == "muon" else 2
    state = sum(p.numel() * (moments if ".h." in name and p.dim() == 2 else 2) for name, p in model.named_parameters())
    weights = model.num_params() * (3 if config.ema_decay else 2)
    epoch = batches.rows_per_epoch / batches.rows
    in_epoch = batches.rows_per_epoch * config.block_size if batches.bos is None else batches.document_rows[1].sum()
    tokens = in_epoch / epoch
    flops = model.flops_per_token()
    return "\n".join(
        [
            *lines,
            f"FLOPs a token     {flops:,.0f} to train on, {flops / 3:,.0f} to generate",
            f"memory            {4 * (weights + state) / 2**20:,.1f} MiB of weights, gradients and optimizer state; "
            "activations come on top",
            f"a step            {batches.rows:,} rows, {tokens:,.0f} tokens",
            f"an epoch          {epoch:,.1f} steps, {in_epoch:,} tokens",
            f"the run           {config.max_iters:,} steps, {config.max_iters / epoch:,.2f} epochs, "
            f"{config.max_iters * tokens * flops:.2e} FLOPs",
        ]
    )


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def draw_samples(model, tokenizer, count, config, machine, step):
    """`count` texts, from a random stream of their own: asking for them changes no training step."""
    if not count:
        return []
    generator = torch.Generator(machine.device).manual_seed(derive_seed("sample", config.seed, step))
    prompt = torch.from_numpy(tokenizer.prompt("")).long().to(machine.device).repeat(count, 1)
    with machine.autocast():
        out = model.generate(
            prompt,
            config.sample_tokens,
            config.sample_temperature,
            stop_token=tokenizer.bos,
            generator=generator,
        )
    return [tokenizer.decode(row[prompt.size(1) :]).strip() for row in out.tolist()]
