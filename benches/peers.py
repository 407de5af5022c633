"""Our speed beside a peer's, in turn: training, a recipe to its loss, generation, start-up, preparing text.

The peer is a checkout of nanoGPT, which stays outside. Without one, ours is measured alone.
"""

import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benches.measure import ROOT, flags, in_turn, metrics, process, row
from config._errors import UserError

LAPTOP = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0}
BABY = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "dropout": 0.2}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}


def train(config):
    """Tokens a second of training, evaluation left out, at the laptop recipe's shape and at 10.7M parameters."""
    lines = []
    for name, shape, steps in (("laptop shape", LAPTOP, 200), ("10.7M shape", BABY, 8)):
        tokens = shape["batch_size"] * shape["block_size"]
        options = shape | {"max_iters": steps, "eval_interval": steps // 4, "learning_rate": 1e-3, "warmup_iters": 100}

        def ours(options=options):
            with tempfile.TemporaryDirectory() as folder:
                extra = {"out_dir": folder, "data_dir": config.data_dir, "dataset": "shakespeare_char", "eval_iters": 1}
                extra |= {"gradient_accumulation_steps": 1, "log_interval": 1000, "device": config.device}
                process(["train.py", *flags(options | extra)])
                speeds = [float(row["tokens_per_s"]) for row in metrics(folder)]
                return statistics.harmonic_mean(speeds[1:])  # the first quarter holds the warm-up

        def theirs(options=options, steps=steps, tokens=tokens):
            with tempfile.TemporaryDirectory() as folder:
                extra = {"out_dir": folder, "compile": False, "eval_iters": 1, "log_interval": 1}
                extra |= {"device": peer_device(config), "eval_interval": 10**6, "always_save_checkpoint": False}
                _, out = process(["train.py", "config/train_shakespeare_char.py", *flags(options | extra)], config.peer)
                times = [float(ms) for ms in re.findall(r"iter \d+: loss .*?, time ([\d.]+)ms", out)]
                return tokens / (statistics.mean(times[2:]) / 1000)  # the first two hold its evaluation and warm-up

        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
        lines.append(row(f"training, {name}", "tokens/s", *figures, more_is_better=True))
    return lines


def loss(config):
    """A recipe, the laptop's for the peer, from the command to its end, and the full-split loss that it reaches.

    Each of our runs has a seed of its own, 1, 2, …; the peer's is always the same.
    """
    losses = ([], [])

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            extra = {
                "out_dir": folder,
                "data_dir": config.data_dir,
                "device": config.device,
                "seed": len(losses[0]) + 1,
            }
            seconds, _ = process(["train.py", config.recipe, *flags(extra)])
            losses[0].append(float(metrics(folder)[-1]["val_loss"]))
            return seconds

    def theirs():
        with tempfile.TemporaryDirectory() as folder:
            # nanoGPT's README, "I only have a macbook".
            recipe = LAPTOP | {"eval_iters": 20, "log_interval": 1, "max_iters": 2000, "lr_decay_iters": 2000}
            extra = {"out_dir": folder, "device": peer_device(config), "compile": False}
            argv = ["train.py", "config/train_shakespeare_char.py", *flags(recipe | extra)]
            seconds, _ = process(argv, config.peer)
            evaluation = {"init_from": f"{folder}/ckpt.pt", "dataset": "shakespeare_char", "data_dir": config.data_dir}
            _, out = process(["train.py", *flags(evaluation), "--eval_only"])
            losses[1].append(float(re.search(r"val loss ([\d.]+)", out)[1]))
            return seconds

    figures = in_turn(config.pairs, ours, theirs if config.peer else None)
    lines = [row(f"{config.recipe}, whole process", "s", *figures, more_is_better=False)]
    print(f"mean of {len(losses[0])} seeds: {statistics.mean(losses[0]):.4f}")
    return [*lines, row("full-split val loss", "nats", *losses, more_is_better=False)]


GENERATE = """
import contextlib, io, sys, time
sys.path.insert(0, {path!r})
import torch
torch.manual_seed(0)
{build}
idx = torch.zeros(({batch}, 1), dtype=torch.long)
with torch.no_grad():
    model.generate(idx, 8, temperature=0.8, top_k=50)
    began = time.perf_counter()
    model.generate(idx, {tokens}, temperature=0.8, top_k=50)
print({batch} * {tokens} / (time.perf_counter() - began))
"""
OURS = """
from config._schema import ModelConfig, SampleConfig
from config._machine import pick_machine
from model import GPT
machine = pick_machine(SampleConfig(device="cpu"))
model = GPT(ModelConfig(**{shape!r}), {vocab}).eval().to(machine.dtype)
"""
TRANSFORMERS = """
from transformers import GPT2Config, GPT2LMHeadModel
class GPT:
    def __init__(self, n_layer, n_head, n_embd, block_size):
        shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size)
        config = GPT2Config(vocab_size={vocab}, bos_token_id=0, eos_token_id=None, **shape)
        self.model = GPT2LMHeadModel(config).eval()
    def generate(self, idx, tokens, **options):
        out = self.model.generate(idx, max_new_tokens=tokens, do_sample=True, pad_token_id=0, **options)
        assert out.shape[1] == idx.shape[1] + tokens
model = GPT(**{shape!r})
"""
THEIRS = """
with contextlib.redirect_stdout(io.StringIO()):
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size={vocab}, dropout=0.0, bias=False, **{shape!r})).eval()
"""


def generate(config):
    """Tokens a second of `generate` within the block, random weights, temperature 0.8, top-k 50.

    Beside the peer, and beside transformers where it is installed, both of which draw one sample at a time.
    """
    lines = []
    baby = {key: BABY[key] for key in GPT2}
    for name, shape, vocab, batch, tokens in (
        ("10.7M, one sample", baby, 65, 1, 250),
        ("10.7M, 16 samples", baby, 65, 16, 250),
        ("124M, one sample", GPT2, 50257, 1, 100),
    ):

        def measure(build, path, batch=batch, shape=shape, vocab=vocab, tokens=tokens):
            code = GENERATE.format(
                path=str(path), build=build.format(shape=shape, vocab=vocab), batch=batch, tokens=tokens
            )
            return float(process(["-c", code], path)[1])

        def ours():
            return measure(OURS, ROOT)

        def theirs(shape=shape, vocab=vocab, tokens=tokens):
            return measure(THEIRS, config.peer, batch=1, shape=shape, vocab=vocab, tokens=tokens)

        def transformers():
            return measure(TRANSFORMERS, ROOT)

        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
        lines.append(row(f"generation, {name} (peer one at a time)", "tokens/s", *figures, more_is_better=True))
        if config.peer and batch == 1 and find_spec("transformers"):
            figures = in_turn(config.pairs, ours, transformers)
            lines.append(row(f"generation, {name}, beside transformers", "tokens/s", *figures, more_is_better=True))
    return lines


def start(config):
    """From the command to the end of the first step, on prepared data, less the time of `import torch` alone."""
    with tempfile.TemporaryDirectory() as folder:
        options = LAPTOP | {"dataset": "shakespeare_char", "data_dir": config.data_dir, "device": config.device}
        options |= {"gradient_accumulation_steps": 1, "overwrite": True, "out_dir": folder, "max_iters": 10**6}

        def ours():
            began = time.perf_counter()
            argv = [sys.executable, "train.py", *flags(options)]
            with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as training:
                for line in training.stdout:
                    if line.startswith("step 1/"):
                        break
                else:
                    raise UserError("start: train.py ended before its first step")
                seconds = time.perf_counter() - began
                training.kill()
            return seconds - process(["-c", "import torch"])[0]

        figures, _ = in_turn(config.pairs, ours)
    return [row("start-up to the first step, less import torch", "s", figures, [], more_is_better=False)]


def prepare(config):
    """100 MB of Tiny Shakespeare's characters into train.bin and val.bin, whole process."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "input.txt"
        known = os.environ.get("QUILL_CORPORA")
        if not known:
            raise UserError("prepare: set the environment variable QUILL_CORPORA to the folder of tinyshakespeare.txt")
        corpus = (Path(known) / "tinyshakespeare.txt").read_text(encoding="utf-8")
        text.write_text(corpus * math.ceil(100e6 / len(corpus)), encoding="utf-8")
        size = text.stat().st_size / 1e6

        def ours():
            return process(["prepare.py", f"--input={text}", "--dataset=x", f"--data_dir={folder}"])[0]

        def theirs():
            script = Path(config.peer) / "data" / "shakespeare_char" / "prepare.py"
            # It reads input.txt beside itself, so a copy of the script beside the text reads the text.
            (Path(folder) / "prepare.py").write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
            return process(["prepare.py"], folder)[0]

        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
    return [row(f"prepare {size:.0f} MB, char", "s", *figures, more_is_better=False)]


def peer_device(config):
    return "cpu" if config.device == "auto" else config.device
