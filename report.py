"""What people see of a run: a progress bar or plain lines, metrics.csv, and samples. Nothing here changes training."""

import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data.batches import derive_seed

COLUMNS = "step,lr,train_loss,val_loss,perplexity,tokens_per_s,seconds"


def note(text, machine):
    """A line for the user's attention, on stderr."""
    if machine.rank == 0:
        tqdm.write(f"note: {text}", file=sys.stderr)


class Reporter:
    """A progress bar on a terminal and plain lines elsewhere; a row of metrics.csv at every evaluation. Rank 0's."""

    def __init__(self, config, progress, machine, flops_per_token):
        self.config, self.progress, self.machine = config, progress, machine
        self.flops_per_token = flops_per_token
        self.quiet = machine.rank != 0
        on_terminal = sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(
            total=config.max_iters, initial=progress.step, unit="step", disable=not on_terminal, dynamic_ncols=True
        )
        self.tokens, self.busy = 0, 0.0  # tokens and seconds of training since the last row
        self.val_loss = None
        self.path = Path(config.out_dir) / "metrics.csv"
        if not self.quiet:
            self._drop_rows_after(progress.step)

    def _drop_rows_after(self, step):
        """Rows behind the checkpoint will be written again; a fresh run begins an empty file."""
        rows = self.path.read_text(encoding="utf-8").splitlines()[1:] if step and self.path.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) <= step]
        temporary = self.path.with_suffix(".csv.tmp")
        temporary.write_text("\n".join([COLUMNS, *rows]) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def say(self, text):
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    @property
    def tokens_per_s(self):
        """Speed of training alone, evaluations left out, since the last row."""
        return self.tokens / max(self.busy, 1e-9)

    def step(self, tokens, seconds):
        self.tokens += tokens
        self.busy += seconds
        self.bar.update()

    def log(self, losses, lr):
        """The mean of `losses` since the last call, and the readings."""
        text = f"loss {math.fsum(losses) / len(losses):.4f}"
        if self.val_loss is not None:
            text += f", val {self.val_loss:.4f}"
        text += f", lr {lr:.2e}, {self.tokens_per_s:,.0f} tokens/s"
        if self.machine.peak_flops:
            used = self.tokens_per_s * self.flops_per_token
            text += f", MFU {used / (self.machine.peak_flops * self.machine.world):.1%}"
        self.bar.set_postfix_str(text)
        if self.bar.disable and not self.quiet:
            print(f"step {self.progress.step}/{self.config.max_iters}: {text}", flush=True)

    def evaluated(self, val_loss, lr):
        """A row of metrics.csv. Its train loss is the mean over every step since the row before."""
        step, losses = self.progress.step, self.progress.losses
        train_loss = math.fsum(losses) / len(losses)
        speed, seconds = round(self.tokens_per_s, 1), round(self.progress.seconds, 3)
        if not self.quiet:
            row = [step, lr, train_loss, val_loss, perplexity(val_loss), speed, seconds]
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(",".join(map(str, row)) + "\n")
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, {speed:,.0f} tokens/s")
        self.val_loss = val_loss
        self.tokens, self.busy = 0, 0.0

    def close(self):
        self.bar.close()


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def draw_samples(model, tokenizer, count, config, machine, step):
    """`count` texts, from a random stream of their own: asking for them changes no training step."""
    generator = torch.Generator(machine.device).manual_seed(derive_seed("sample", config.seed, step))
    prompt = torch.from_numpy(tokenizer.prompt("")).long().to(machine.device).repeat(count, 1)
    with machine.autocast():
        out = model.generate(prompt, config.sample_tokens, 0.8, stop_token=tokenizer.bos, generator=generator)
    return [tokenizer.decode(row[prompt.size(1) :]).strip() for row in out.tolist()]
