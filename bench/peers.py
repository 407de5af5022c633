"""Compare quill and nanoGPT: training, generation, a recipe from start to end, start-up.

The peer is a checkout of nanoGPT, which is not part of quill. Without one, quill is measured alone.
"""

import re
import statistics
import tempfile
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from timeit import repeat

import torch

from bench import measure
from bench.measure import Line, as_flags, in_turn, machine_options, on_gpu, peer_machine_options, process, report
from quill.machine import pick_machine
from quill.options import BenchConfig, Options

PEER_CONFIG = "config/train_shakespeare_char.py"  # nanoGPT's config for Tiny Shakespeare
# The models that are measured: two of nanoGPT's recipes, and GPT-2's smallest.
LAPTOP = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0}
SHAKESPEARE_10M = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "dropout": 0.2}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
GPT2_IDS = 50257


def train(config: BenchConfig) -> list[Line]:
    """Measure tokens per second of training, without evaluations, at the laptop recipe's shape and at 10.7M parameters.

    On a GPU: at 10.7M with nanoGPT's batch of 64, compiled; and ours alone at GPT-2's shape, with its MFU.
    """
    gpu = on_gpu(config)
    shapes = [("laptop shape", LAPTOP, 200), ("10.7M shape", SHAKESPEARE_10M, 8)]
    if gpu:
        shapes = [("10.7M shape, batch 64", SHAKESPEARE_10M | {"batch_size": 64}, 800)]
    lines = []
    for name, shape, steps in shapes:
        options = shape | {"max_iters": steps, "eval_interval": steps // 4, "learning_rate": 1e-3, "warmup_iters": 100}
        data = {"data_dir": config.data_dir, "dataset": "shakespeare_char"} | machine_options(config)
        ours, theirs = partial(measure.training_speed, options | data), partial(peer_training_speed, config, options)
        lines.append(report(f"training, {name}", "tokens/s", *in_turn(config, ours, theirs)))
    return lines + gpt2(config) if gpu else lines


def peer_training_speed(config: BenchConfig, options: Options) -> float:
    """Return the tokens per second of one run of nanoGPT, from the times that it prints, without its first quarter."""
    with tempfile.TemporaryDirectory() as folder:
        extra = {"out_dir": folder, "compile": on_gpu(config), "eval_iters": 1, "log_interval": 1}
        extra |= peer_machine_options(config) | {"eval_interval": 10**6, "always_save_checkpoint": False}
        _, out = process(["train.py", PEER_CONFIG, *as_flags(options | extra)], config.peer)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss .*?, time ([\d.]+)ms", out)]
    tokens = options["batch_size"] * options["block_size"]
    return tokens / (statistics.mean(times[len(times) // 4 :]) / 1000)


def gpt2(config: BenchConfig, shape: Options = GPT2, ids=GPT2_IDS, batch_size=16, steps=100) -> list[Line]:
    """Measure our training at GPT-2's shape on any tokens: tokens per second, and their share of the peak (MFU)."""
    options = shape | {"batch_size": batch_size, "max_iters": steps, "eval_interval": steps // 2, "dataset": "ids"}
    options |= {"log_interval": steps // 4} | machine_options(config)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "ids.txt"
        # Every id in order, again and again. From U+10000 on, there are no surrogates.
        text.write_text("".join(map(chr, range(0x10000, 0x10000 + ids))) * 21, encoding="utf-8")
        process(["prepare.py", f"--input={text}", "--dataset=ids", f"--data_dir={folder}"])
        speeds = [measure.training_speed(options | {"data_dir": folder}) for _ in range(config.pairs)]
    machine = pick_machine(config)
    lines = [report("training, 124M shape", "tokens/s", speeds)]
    if machine.peak_flops:
        flops = measure.outline(shape, ids).flops_per_token()
        shares = [speed * flops / machine.peak_flops for speed in speeds]
        lines.append(report("MFU of that", "of the data sheet's half-precision peak", shares))
    return lines


def generate(config: BenchConfig) -> list[Line]:
    """Measure tokens per second of `generate` within the block: random weights, temperature 0.8, top-k 50.

    nanoGPT draws one sample at a time, so its batch is always 1. Where transformers is installed and a peer is given,
    single samples are compared with transformers' too.
    """
    lines = []
    small = {key: SHAKESPEARE_10M[key] for key in GPT2}
    many = 64 if on_gpu(config) else 16
    for name, shape, vocab_size, batch_size, tokens in (
        ("10.7M, one sample", small, 65, 1, 250),
        (f"10.7M, {many} samples", small, 65, many, 250),
        ("124M, one sample", GPT2, GPT2_IDS, 1, 100),
    ):
        options = {"shape": shape, "vocab_size": vocab_size, "tokens": tokens} | peer_machine_options(config)
        speed = partial(measure.program, "bench.generation", batch_size=1, **options)
        ours = partial(speed, model="quill", batch_size=batch_size, dtype=config.dtype)
        theirs = partial(speed, model="nanogpt", peer=config.peer)
        what = f"generation, {name}"
        lines.append(report(f"{what} (peer one at a time)", "tokens/s", *in_turn(config, ours, theirs)))
        if not on_gpu(config):
            weights = 12 * shape["n_layer"] * shape["n_embd"] ** 2 + vocab_size * shape["n_embd"]
            size = weights * pick_machine(config).dtype.itemsize / read_bandwidth()
            shares = [speed / batch_size * size for speed in lines[-1]["ours"]]
            lines.append(report(f"{what}, weights read", "of the memory's read bandwidth", shares))
        if config.peer and batch_size == 1 and find_spec("transformers"):
            figures = in_turn(config, ours, partial(speed, model="transformers"))
            lines.append(report(f"{what}, with transformers as the peer", "tokens/s", *figures))
    return lines


def read_bandwidth() -> float:
    """Return the bytes per second at which torch sums a tensor of 512 MiB, the best of five times."""
    tensor = torch.ones(2**27)
    return tensor.nbytes / min(repeat(tensor.sum, number=1, repeat=5))


def recipe(config: BenchConfig) -> list[Line]:
    """Measure the whole process of `--recipe`, nanoGPT's laptop recipe for the peer, and the best full-split loss.

    On a GPU, the peer runs its own config for Tiny Shakespeare as shipped, compiling included. Our runs have seeds
    1, 2, …; the peer's seed is always the same.
    """
    seeds = count(1)

    def ours():
        options = {"data_dir": config.data_dir, "seed": next(seeds)} | machine_options(config)
        seconds, rows = measure.train(options, config.recipe)
        return seconds, min(float(row["val_loss"]) for row in rows)

    runs = in_turn(config, ours, partial(peer_recipe_run, config))
    seconds, losses = ([[run[i] for run in side] for side in runs] for i in range(2))
    lines = [report(f"{config.recipe}, whole process", "s", *seconds)]
    print(f"mean of {len(losses[0])} seeds: {statistics.mean(losses[0]):.4f}")
    return [*lines, report("best full-split val loss", "nats", *losses)]


def peer_recipe_run(config: BenchConfig) -> tuple[float, float]:
    """Run nanoGPT's recipe once. → seconds, the validation loss of its checkpoint, which is of its best evaluation

    nanoGPT estimates its loss on random batches. Ours evaluates the checkpoint on the whole split.
    """
    with tempfile.TemporaryDirectory() as folder:
        # nanoGPT's README, "I only have a macbook".
        laptop = LAPTOP | {"eval_iters": 20, "log_interval": 1, "max_iters": 2000, "lr_decay_iters": 2000}
        laptop = {} if on_gpu(config) else laptop | {"compile": False}
        options = laptop | {"out_dir": folder} | peer_machine_options(config)
        seconds, _ = process(["train.py", PEER_CONFIG, *as_flags(options)], config.peer)
        options = {"init_from": f"{folder}/ckpt.pt", "dataset": "shakespeare_char", "data_dir": config.data_dir}
        _, out = process(["train.py", *as_flags(options | machine_options(config)), "--eval_only"])
    printed = re.search(r"val loss ([\d.]+)", out)
    assert printed, out
    return seconds, float(printed[1])


def start(config: BenchConfig) -> list[Line]:
    """Measure from the command to the first step's line, on prepared data, and less `import torch` alone, in turn."""
    options = LAPTOP | {"dataset": "shakespeare_char", "data_dir": config.data_dir} | machine_options(config)
    program = ["-c", "import torch; print('done', flush=True)"]
    pairs = [(measure.start_seconds(options), measure.seconds_to_line("done", program)) for _ in range(config.pairs)]
    ours, alone = ([pair[i] for pair in pairs] for i in range(2))
    print(f"less the medians: {statistics.median(ours) - statistics.median(alone):.3f} s")
    return [report("start-up to the first step", "s", ours), report("import torch", "s", alone)]
