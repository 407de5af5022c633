"""The output of a run in a terminal: a progress bar and lines, or lines only if there is no terminal."""

import math
import os
import sys

from tqdm import tqdm

from quill.cli import drop_output
from quill.machine import Machine
from quill.observers.observer import Evaluation, LogEntry, Observer
from quill.options import TrainConfig


class Console(Observer):
    """Lines on stdout, with the model FLOPs utilisation (MFU), and a progress bar on stderr if that is a terminal."""

    def __init__(self, config: TrainConfig, step: int, machine: Machine, flops_per_token: float):
        self.config, self.machine, self.flops_per_token = config, machine, flops_per_token
        on_terminal = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self.plain_lines = not (on_terminal and sys.stdout.isatty())
        self.val_loss = None
        self.samples_wanted = config.eval_samples
        form = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        settings = {"disable": not on_terminal, "dynamic_ncols": True, "leave": False, "bar_format": form}
        self.bar = tqdm(total=config.max_iters, initial=step, **settings)

    def say(self, text: str) -> None:
        """Print a line on stdout. A run continues when the reader of stdout (`| head`) has closed it."""
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            drop_output()

    def stepped(self) -> None:
        """Move the bar."""
        self.bar.update()

    def logged(self, entry: LogEntry) -> None:
        """Show the loss, the learning rate and the speed."""
        text = f"loss {entry.loss:.4f}"
        if self.val_loss is not None:
            text += f", val {self.val_loss:.4f}"
        text += f", lr {entry.lr:.2e}, {entry.tokens_per_s:,.0f} tokens/s"
        if self.machine.peak_flops:
            used = entry.tokens_per_s * self.flops_per_token
            text += f", MFU {used / (self.machine.peak_flops * self.machine.group.world_size):.1%}"
        self.bar.set_postfix_str(text)
        if self.plain_lines:
            self.say(f"step {entry.step}/{self.config.max_iters}: {text}")

    def evaluated(self, evaluation: Evaluation) -> None:
        """Print the losses."""
        self.val_loss, bits = evaluation.val_loss, evaluation.bits_per_byte
        losses = f"train loss {evaluation.train_loss:.4f}, val loss {evaluation.val_loss:.4f}"
        losses += f" ({'–' if math.isnan(bits) else f'{bits:.4f}'} bits per byte)"
        self.say(f"step {evaluation.step}: {losses}, {evaluation.tokens_per_s:,.0f} tokens/s")

    def sampled(self, step: int, texts: list[str]) -> None:
        """Print config.eval_samples samples."""
        for text in texts[: self.samples_wanted]:
            self.say(text)

    def finished(self, best_val_loss: float, texts: list[str]) -> None:
        """Print the final samples, and the command that draws more."""
        for text in texts:
            self.say(text)
        self.say(f"best val loss {best_val_loss:.4f}; sample with: python sample.py --out_dir={self.config.out_dir}")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
