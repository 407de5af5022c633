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

import numpy as np
import torch

from benches.measure import ROOT, flags, in_turn, metrics, on_machine, process, row
from config._errors import UserError
from config._machine import pick_machine
from config._schema import ModelConfig
from model import GPT

LAPTOP = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0}
BABY = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "dropout": 0.2}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
GPT2_IDS = 50257


def train(config):
    """Tokens a second of training, evaluation left out, at the laptop recipe's shape and at 10.7M parameters.

    On a GPU: at 10.7M with nanoGPT's batch of 64, compiled; and ours alone at GPT-2's shape, with its MFU.
    """
    gpu = on_gpu(config)
    lines = []
    shapes = (("laptop shape", LAPTOP, 200), ("10.7M shape", BABY, 8))
    if gpu:
        shapes = (("10.7M shape, batch 64", BABY | {"batch_size": 64}, 800),)
    for name, shape, steps in shapes:
        tokens = shape["batch_size"] * shape["block_size"]
        options = shape | {"max_iters": steps, "eval_interval": steps // 4, "learning_rate": 1e-3, "warmup_iters": 100}

        def ours(options=options):
            with tempfile.TemporaryDirectory() as folder:
                extra = {"out_dir": folder, "data_dir": config.data_dir, "dataset": "shakespeare_char", "eval_iters": 1}
                extra |= {"gradient_accumulation_steps": 1, "log_interval": 1} | on_machine(config)
                process(["train.py", *flags(options | extra)])
                speeds = [float(line["tokens_per_s"]) for line in metrics(folder)]
                return statistics.harmonic_mean(speeds[1:])  # the first quarter holds the warm-up

        def theirs(options=options, steps=steps, tokens=tokens):
            with tempfile.TemporaryDirectory() as folder:
                extra = {"out_dir": folder, "compile": gpu, "eval_iters": 1, "log_interval": 1}
                extra |= peer_machine(config) | {"eval_interval": 10**6, "always_save_checkpoint": False}
                _, out = process(["train.py", "config/train_shakespeare_char.py", *flags(options | extra)], config.peer)
                times = [float(ms) for ms in re.findall(r"iter \d+: loss .*?, time ([\d.]+)ms", out)]
                return tokens / (statistics.mean(times[len(times) // 4 :]) / 1000)

        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
        lines.append(row(f"training, {name}", "tokens/s", *figures, more_is_better=True))
    return [*lines, *(gpt2(config) if gpu else [])]


def gpt2(config, shape=GPT2, ids=GPT2_IDS, batch_size=16, steps=100):
    """Training at GPT-2's shape on random tokens, ours alone: tokens a second, and the share of the peak that it is."""
    options = shape | {"batch_size": batch_size, "gradient_accumulation_steps": 1, "max_iters": steps, "eval_iters": 1}
    options |= {"eval_interval": steps // 2, "log_interval": steps // 4, "dataset": "random"} | on_machine(config)
    with tempfile.TemporaryDirectory() as folder:
        # Every id once, so that the vocabulary is whole, then at random; all from a plane without surrogates.
        drawn = np.concatenate([np.arange(ids), np.random.default_rng(0).integers(ids, size=20 * ids)])
        text = Path(folder) / "random.txt"
        text.write_text("".join(chr(0x10000 + number) for number in drawn.tolist()), encoding="utf-8")
        process(["prepare.py", f"--input={text}", "--dataset=random", f"--data_dir={folder}"])
        options |= {"data_dir": folder, "out_dir": f"{folder}/run", "overwrite": True}

        def ours():
            process(["train.py", *flags(options)])
            return float(metrics(f"{folder}/run")[-1]["tokens_per_s"])  # the first half holds the compiling

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
            extra = {"out_dir": folder, "data_dir": config.data_dir, "seed": len(losses[0]) + 1} | on_machine(config)
            seconds, _ = process(["train.py", config.recipe, *flags(extra)])
            losses[0].append(min(float(line["val_loss"]) for line in metrics(folder)))
            return seconds

    def theirs():
        with tempfile.TemporaryDirectory() as folder:
            # nanoGPT's README, "I only have a macbook".
            recipe = LAPTOP | {"eval_iters": 20, "log_interval": 1, "max_iters": 2000, "lr_decay_iters": 2000}
            recipe = {} if on_gpu(config) else recipe | {"compile": False}
            extra = {"out_dir": folder} | peer_machine(config)
            argv = ["train.py", "config/train_shakespeare_char.py", *flags(recipe | extra)]
            seconds, _ = process(argv, config.peer)
            evaluation = {"init_from": f"{folder}/ckpt.pt", "dataset": "shakespeare_char", "data_dir": config.data_dir}
            evaluation |= on_machine(config)
            _, out = process(["train.py", *flags(evaluation), "--eval_only"])
            losses[1].append(float(re.search(r"val loss ([\d.]+)", out)[1]))
            return seconds

    figures = in_turn(config.pairs, ours, theirs if config.peer else None)
    # nanoGPT's checkpoint is that of its best evaluation.
    lines = [row(f"{config.recipe}, whole process", "s", *figures, more_is_better=False)]
    print(f"mean of {len(losses[0])} seeds: {statistics.mean(losses[0]):.4f}")
    return [*lines, row("best full-split val loss", "nats", *losses, more_is_better=False)]


# The peer's model and optimizer on our first weights and our batches, in float32. Both repositories have a model.py.
REPLAY = """
import importlib.util, sys
sys.path[:0] = [{peer!r}, {root!r}]
import torch
from config._machine import pick_machine
from config._schema import ModelConfig, TrainConfig
from data.batches import Batches, derive_seed
from data.token_files import open_dataset
from model import GPT, GPTConfig
from optimizer import learning_rate
spec = importlib.util.spec_from_file_location("ours", {root!r} + "/model.py")
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
config = TrainConfig(**{options!r})
device = pick_machine(config).device
dataset = open_dataset(config.data_dir, config.dataset)
vocab, B = dataset.tokenizer.vocab_size, config.batch_size
shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=config.block_size)
torch.manual_seed(derive_seed("init", config.seed))
start = ours.GPT(ModelConfig(**shape), vocab)
model = GPT(GPTConfig(vocab_size=vocab, dropout=0.0, bias=False, **shape))
model.load_state_dict(start.state_dict())
model.to(device)
optimizer = model.configure_optimizers(
    config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type
)
batches = Batches(dataset.train, None, config.block_size, rows=B, micro_rows=B, seed=config.seed, device=device)
for step in range(config.max_iters):
    (x, y, _), = batches.step(step)[1]
    loss = model(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()
    print("step", step, loss.item())
"""


def curve(config, shape=BABY):
    """Whether training is the peer's: from the same weights, on the same batches, the losses of 30 steps in float32."""
    if not config.peer:
        raise UserError("curve: give a checkout of nanoGPT to compare with, --peer=../nanoGPT")
    options = shape | {"dropout": 0.0, "gradient_accumulation_steps": 1, "dataset": "shakespeare_char"}
    options |= {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "max_iters": 30, "eval_interval": 5}
    options |= {"data_dir": config.data_dir, "device": config.device, "dtype": "float32", "compile": False}
    with tempfile.TemporaryDirectory() as folder:
        process(["train.py", *flags(options), f"--out_dir={folder}", "--eval_iters=1"])
        ours = [float(line["train_loss"]) for line in metrics(folder)]
    _, out = process(["-c", REPLAY.format(peer=config.peer, root=str(ROOT), options=options)], config.peer)
    steps = [float(figure) for figure in re.findall(r"step \d+ (\S+)", out)]
    theirs = [statistics.mean(steps[i : i + 5]) for i in range(0, len(steps), 5)]
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(steps)} steps, loss {ours[0]:.4f} to {ours[-1]:.4f}: at most {difference:.2g} from the peer's")
    what = "train loss at 10.7M, means of 5 steps"
    return [{"what": what, "unit": "nats", "n": 1, "ours": ours, "peer": theirs, "max_abs_difference": difference}]


GENERATE = """
import contextlib, io, sys, time
sys.path.insert(0, {path!r})
import torch
torch.manual_seed(0)
device = torch.device({device!r})
context = contextlib.nullcontext()
{build}
idx = torch.zeros(({batch}, 1), dtype=torch.long, device=device)
with torch.no_grad(), context:
    model.generate(idx, 8, temperature=0.8, top_k=50).cpu()
    began = time.perf_counter()
    model.generate(idx, {tokens}, temperature=0.8, top_k=50).cpu()
print({batch} * {tokens} / (time.perf_counter() - began))
"""
OURS = """
from config._schema import ModelConfig, SampleConfig
from config._machine import pick_machine
from model import GPT
machine = pick_machine(SampleConfig(device={device!r}, dtype={dtype!r}))
model = GPT(ModelConfig(**{shape!r}), {vocab}).eval().to(device, machine.dtype)
"""
TRANSFORMERS = """
from transformers import GPT2Config, GPT2LMHeadModel
class GPT:
    def __init__(self, n_layer, n_head, n_embd, block_size):
        shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size)
        config = GPT2Config(vocab_size={vocab}, bos_token_id=0, eos_token_id=None, **shape)
        self.model = GPT2LMHeadModel(config).eval()
        self.model.to(device, torch.{dtype} if device.type == "cuda" else torch.float32)
    def generate(self, idx, tokens, **options):
        out = self.model.generate(idx, max_new_tokens=tokens, do_sample=True, pad_token_id=0, **options)
        assert out.shape[1] == idx.shape[1] + tokens
        return out
model = GPT(**{shape!r})
"""
# As its sample.py does: on a GPU in half precision by autocast, on a CPU in float32, where transformers is faster too.
THEIRS = """
with contextlib.redirect_stdout(io.StringIO()):
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size={vocab}, dropout=0.0, bias=False, **{shape!r})).eval().to(device)
if device.type == "cuda":
    context = torch.autocast("cuda", torch.{dtype}, enabled={dtype!r} != "float32")
"""


def generate(config):
    """Tokens a second of `generate` within the block, random weights, temperature 0.8, top-k 50.

    Beside the peer, and beside transformers where it is installed, both of which draw one sample at a time.
    """
    lines = []
    device, dtype = peer_machine(config).values()
    baby = {key: BABY[key] for key in GPT2}
    many = 64 if on_gpu(config) else 16
    for name, shape, vocab, batch, tokens in (
        ("10.7M, one sample", baby, 65, 1, 250),
        (f"10.7M, {many} samples", baby, 65, many, 250),
        ("124M, one sample", GPT2, GPT2_IDS, 1, 100),
    ):

        def measure(build, path, batch=batch, shape=shape, vocab=vocab, tokens=tokens):
            known = {"path": str(path), "device": device, "batch": batch, "tokens": tokens}
            build = build.format(shape=shape, vocab=vocab, device=device, dtype=dtype)
            return float(process(["-c", GENERATE.format(build=build, **known)], path)[1])

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
        options = LAPTOP | {"dataset": "shakespeare_char", "data_dir": config.data_dir} | on_machine(config)
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


def on_gpu(config):
    return pick_machine(config).device.type == "cuda"


def peer_machine(config):
    """The device and dtype that ours has, for the peer, which knows no `auto` and on a CPU is in float32 always."""
    machine = pick_machine(config)
    device = machine.device.type if config.device == "auto" else config.device
    return {"device": device, "dtype": str(machine.dtype).removeprefix("torch.")}
