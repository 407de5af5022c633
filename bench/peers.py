"""Our speed beside a peer's, in turn: training, a recipe to its loss, start-up, preparing text.

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
from pathlib import Path

import numpy as np
import torch

from bench.measure import (
    ROOT,
    flags,
    in_turn,
    machine_options,
    on_gpu,
    peer_machine_options,
    process,
    read_metrics,
    row,
)
from bench.shapes import GPT2, GPT2_IDS, LAPTOP, SHAKESPEARE_10M
from model import GPT
from quill.errors import UserError
from quill.machine import pick_machine
from quill.options import ModelConfig


def train(config):
    """Tokens a second of training, evaluation left out, at the laptop recipe's shape and at 10.7M parameters.

    On a GPU: at 10.7M with nanoGPT's batch of 64, compiled; and ours alone at GPT-2's shape, with its MFU.
    """
    gpu = on_gpu(config)
    lines = []
    shapes = (("laptop shape", LAPTOP, 200), ("10.7M shape", SHAKESPEARE_10M, 8))
    if gpu:
        shapes = (("10.7M shape, batch 64", SHAKESPEARE_10M | {"batch_size": 64}, 800),)
    for name, shape, steps in shapes:
        tokens = shape["batch_size"] * shape["block_size"]
        options = shape | {"max_iters": steps, "eval_interval": steps // 4, "learning_rate": 1e-3, "warmup_iters": 100}

        def ours(options=options):
            with tempfile.TemporaryDirectory() as folder:
                extra = {"out_dir": folder, "data_dir": config.data_dir, "dataset": "shakespeare_char", "eval_iters": 1}
                extra |= {"gradient_accumulation_steps": 1, "log_interval": 1} | machine_options(config)
                process(["train.py", *flags(options | extra)])
                speeds = [float(line["tokens_per_s"]) for line in read_metrics(folder)]
                return statistics.harmonic_mean(speeds[1:])  # the first quarter holds the warm-up

        def theirs(options=options, steps=steps, tokens=tokens):
            with tempfile.TemporaryDirectory() as folder:
                extra = {"out_dir": folder, "compile": gpu, "eval_iters": 1, "log_interval": 1}
                extra |= peer_machine_options(config) | {"eval_interval": 10**6, "always_save_checkpoint": False}
                _, out = process(["train.py", "config/train_shakespeare_char.py", *flags(options | extra)], config.peer)
                times = [float(ms) for ms in re.findall(r"iter \d+: loss .*?, time ([\d.]+)ms", out)]
                return tokens / (statistics.mean(times[len(times) // 4 :]) / 1000)

        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
        lines.append(row(f"training, {name}", "tokens/s", *figures, more_is_better=True))
    return [*lines, *(gpt2(config) if gpu else [])]


def gpt2(config, shape=GPT2, ids=GPT2_IDS, batch_size=16, steps=100):
    """Training at GPT-2's shape on random tokens, ours alone: tokens a second, and the share of the peak that it is."""
    options = shape | {"batch_size": batch_size, "gradient_accumulation_steps": 1, "max_iters": steps, "eval_iters": 1}
    options |= {"eval_interval": steps // 2, "log_interval": steps // 4, "dataset": "random"} | machine_options(config)
    with tempfile.TemporaryDirectory() as folder:
        # Every id once, so that the vocabulary is whole, then at random; all from a plane without surrogates.
        drawn = np.concatenate([np.arange(ids), np.random.default_rng(0).integers(ids, size=20 * ids)])
        text = Path(folder) / "random.txt"
        text.write_text("".join(chr(0x10000 + number) for number in drawn.tolist()), encoding="utf-8")
        process(["prepare.py", f"--input={text}", "--dataset=random", f"--data_dir={folder}"])
        options |= {"data_dir": folder, "out_dir": f"{folder}/run", "overwrite": True}

        def ours():
            process(["train.py", *flags(options)])
            return float(read_metrics(f"{folder}/run")[-1]["tokens_per_s"])  # the first half holds the compiling

        speeds, _ = in_turn(config.pairs, ours)
    machine = pick_machine(config)
    lines = [row("training, 124M shape, random tokens", "tokens/s", speeds, [], more_is_better=True)]
    if machine.peak_flops:
        with torch.device("meta"):
            flops = GPT(ModelConfig(**shape), ids).flops_per_token()
        shares = [speed * flops / machine.peak_flops for speed in speeds]
        lines.append(row("MFU of that", "of the data sheet's half-precision peak", shares, [], more_is_better=True))
    return lines


def loss(config):
    """A recipe, the laptop's for the peer, from the command to its end, and the best full-split loss that it reaches.

    On a GPU, the peer's is its own for Tiny Shakespeare, as shipped, compiling included. Each of our runs has a seed of
    its own, 1, 2, …; the peer's is always the same.
    """
    losses = ([], [])

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            extra = {"out_dir": folder, "data_dir": config.data_dir, "seed": len(losses[0]) + 1} | machine_options(
                config
            )
            seconds, _ = process(["train.py", config.recipe, *flags(extra)])
            losses[0].append(min(float(line["val_loss"]) for line in read_metrics(folder)))
            return seconds

    def theirs():
        with tempfile.TemporaryDirectory() as folder:
            # nanoGPT's README, "I only have a macbook".
            recipe = LAPTOP | {"eval_iters": 20, "log_interval": 1, "max_iters": 2000, "lr_decay_iters": 2000}
            recipe = {} if on_gpu(config) else recipe | {"compile": False}
            extra = {"out_dir": folder} | peer_machine_options(config)
            argv = ["train.py", "config/train_shakespeare_char.py", *flags(recipe | extra)]
            seconds, _ = process(argv, config.peer)
            evaluation = {"init_from": f"{folder}/ckpt.pt", "dataset": "shakespeare_char", "data_dir": config.data_dir}
            evaluation |= machine_options(config)
            _, out = process(["train.py", *flags(evaluation), "--eval_only"])
            losses[1].append(float(re.search(r"val loss ([\d.]+)", out)[1]))
            return seconds

    figures = in_turn(config.pairs, ours, theirs if config.peer else None)
    # nanoGPT's checkpoint is that of its best evaluation.
    lines = [row(f"{config.recipe}, whole process", "s", *figures, more_is_better=False)]
    print(f"mean of {len(losses[0])} seeds: {statistics.mean(losses[0]):.4f}")
    return [*lines, row("best full-split val loss", "nats", *losses, more_is_better=False)]


def start(config):
    """From the command to the end of the first step, on prepared data, less the time of `import torch` alone."""
    with tempfile.TemporaryDirectory() as folder:
        options = LAPTOP | {"dataset": "shakespeare_char", "data_dir": config.data_dir} | machine_options(config)
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
