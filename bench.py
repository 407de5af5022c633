"""The speed figures, ours beside a peer's, in one run on one machine; and which of two configs is better.

    python bench.py train --peer=../nanoGPT         # training tokens/s at two shapes
    python bench.py loss --peer=../nanoGPT          # the laptop recipe, whole process, and the loss that it ends with
    python bench.py generate --peer=../nanoGPT      # tokens/s of generation, with random weights
    python bench.py start                           # from the command to the first step, less `import torch`
    python bench.py prepare --peer=../nanoGPT       # 100 MB of text into tokens
    python bench.py compare config/a.py config/b.py --seeds=5 --max_iters=500

Whole processes, ours and the peer's in turn, median and range; the peer is a checkout of nanoGPT, which stays outside.
Absolute times drift from hour to hour, ratios of neighbours in time do not. Each run is written to out/bench as JSON.
"""

import csv
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from config._cli import read_args, run
from config._errors import UserError
from config._files import replacing
from config._schema import BenchConfig, TrainConfig

ROOT = Path(__file__).parent
LAPTOP = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0}
BABY = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "dropout": 0.2}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}


# ---------------------------------------------------------------- running and reporting


def process(argv, cwd=ROOT):
    """Run a command to its end. → seconds, what it printed. It must succeed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"{' '.join(map(str, argv))} in {cwd} failed: {done.stderr.strip().splitlines()[-1]}")
    return seconds, done.stdout


def flags(options):
    return [f"--{key}={value}" for key, value in options.items()]


def hardware():
    """→ the processor's name and the threads that torch would use."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = names[0] if names else name
    return f"{name}, {os.environ.get('OMP_NUM_THREADS') or os.cpu_count()} threads"


def in_turn(pairs, ours, peer=None):
    """Measure `ours()` and `peer()` alternately. → [ours], [peer]"""
    figures = ([], [])
    for _ in range(pairs):
        for measure, into in zip((ours, peer), figures, strict=True):
            if measure is not None:
                into.append(measure())
    return figures


def row(what, unit, ours, peer, more_is_better):
    """A line of the table: medians, ranges, and the ratio pair by pair, above 1 where we are better."""
    line = {"what": what, "unit": unit, "n": len(ours), "ours": ours, "peer": peer}
    text = f"{what}: {span(ours)} {unit}"
    if peer:
        line["ratio"] = [a / b if more_is_better else b / a for a, b in zip(ours, peer, strict=True)]
        text += f", peer {span(peer)}, ratio {span(line['ratio'])}"
    print(f"{text} (n = {len(ours)})", flush=True)
    return line


def span(values):
    """Median and range, to four digits."""
    shown = [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in (
        statistics.median(values), min(values), max(values)
    )]  # fmt: skip
    return f"{shown[0]} ({shown[1]}–{shown[2]})" if len(values) > 1 else shown[0]


# ---------------------------------------------------------------- the benches


def bench_train(config):
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


def bench_loss(config):
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


def bench_generate(config):
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


def bench_start(config):
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
                seconds = time.perf_counter() - began
                training.kill()
            return seconds - process(["-c", "import torch"])[0]

        figures, _ = in_turn(config.pairs, ours)
    return [row("start-up to the first step, less import torch", "s", figures, [], more_is_better=False)]


def bench_prepare(config):
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


def metrics(folder):
    with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- a paired comparison

# Student's t, two-sided 95 %, by degrees of freedom; beyond the table, the normal distribution's 1.96.
T_95 = [math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145]


def paired(a, b):
    """Mean of b - a over pairs, and the half-width of its 95 % interval."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return differences[0], math.inf
    degrees = len(differences) - 1
    t = T_95[degrees] if degrees < len(T_95) else 1.96
    return statistics.mean(differences), t * statistics.stdev(differences) / math.sqrt(len(differences))


def verdict(a, b, difference, margin):
    """Two names and their paired difference in loss → words."""
    if abs(difference) <= margin:
        return f"{a} and {b} can't be told apart: {b} - {a} = {difference:+.4f} ± {margin:.4f}"
    better = b if difference < 0 else a
    return f"{better} is better by {abs(difference):.4f} ± {margin:.4f}"


def compare(paths, given, config):
    """Train both configs with the same seeds and batches; each run resumes where an earlier call was stopped."""
    results = {}
    for path in paths:
        results[path] = []
    names = {path: Path(path).stem for path in paths}
    if len(set(names.values())) < 2:
        raise UserError(f"{' and '.join(paths)}: give two config files with different names")
    for seed in range(1, config.seeds + 1):
        for path in paths:
            out_dir = Path(config.out_dir) / "compare" / f"{names[path]}-{seed}"
            own = {"seed": seed, "out_dir": out_dir, "init_from": "auto", "data_dir": config.data_dir}
            process(["train.py", path, *flags(given | own)])
            rows = metrics(out_dir)
            speeds = [float(row["tokens_per_s"]) for row in rows]
            result = {"seed": seed, "val_loss": float(rows[-1]["val_loss"])}
            result |= {"tokens_per_s": statistics.median(speeds), "seconds": float(rows[-1]["seconds"])}
            results[path].append(result)
            print(f"{names[path]}, seed {seed}: val loss {result['val_loss']:.4f}", flush=True)
    lines = []
    for path in paths:
        column = {key: [result[key] for result in results[path]] for key in ("val_loss", "tokens_per_s", "seconds")}
        std = statistics.stdev(column["val_loss"]) if config.seeds > 1 else math.nan
        print(
            f"{names[path]}: val loss {statistics.mean(column['val_loss']):.4f} ± {std:.4f}, "
            f"{span(column['tokens_per_s'])} tokens/s, {span(column['seconds'])} s"
        )
        lines.append({"config": path, "runs": results[path]})
    a, b = ([result["val_loss"] for result in results[path]] for path in paths)
    difference, margin = paired(a, b)
    words = verdict(*names.values(), difference, margin)
    print(f"{words} (val loss, 95 % interval, {config.seeds} pairs)")
    return [*lines, {"difference": difference, "margin": margin, "verdict": words}]


BENCHES = {
    "train": bench_train,
    "loss": bench_loss,
    "generate": bench_generate,
    "start": bench_start,
    "prepare": bench_prepare,
}


def main(argv):
    names = {*BENCHES, "compare"}
    if not argv or argv[0] not in names and not argv[0].startswith("-"):
        raise UserError(f"give one of {', '.join([*BENCHES, 'compare'])} (see --help)")
    known = {f"--{key}" for key in asdict(BenchConfig())}
    own = [arg for arg in argv[1:] if arg.partition("=")[0] in known or not arg.startswith("--")]
    rest = [arg for arg in argv[1:] if arg not in own]
    positional, given = read_args(argv[:1] + own if argv[0] != "compare" else own, BenchConfig, __doc__)
    config = BenchConfig(**given)
    if config.peer and not (Path(config.peer) / "model.py").is_file():
        raise UserError(f"--peer={config.peer}: there is no model.py; give the folder of a nanoGPT checkout")
    if argv[0] == "compare":
        if len(positional) != 2:
            raise UserError("compare takes two config files, as in bench.py compare config/a.py config/b.py")
        lines = compare(positional, read_args(rest, TrainConfig, __doc__)[1], config)
    elif rest:
        raise UserError(f"{rest[0]}: not an option of bench.py {argv[0]} (see --help)")
    else:
        lines = BENCHES[argv[0]](config)
    report = {"command": f"python bench.py {' '.join(argv)}", "hardware": hardware(), "results": lines}
    path = Path(config.out_dir) / f"{argv[0]}.json"
    with replacing(path) as (file,):
        file.write((json.dumps(report, indent=2, default=str) + "\n").encode())
    print(f"{hardware()}; written to {path}")


if __name__ == "__main__":
    run(main)
