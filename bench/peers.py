"""Compare quill and nanoGPT: training, generation, a recipe from start to end, start-up.

The peer is a checkout of nanoGPT, which is not part of quill. Without one, quill is measured alone.
"""

import random
import re
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.measure import Lines, as_flags, cold_run, in_turn, machine_options, on_gpu, peer_machine_options, process
from quill.errors import check
from quill.machine import Machine, pick_machine
from quill.options import BenchConfig, Options, TrainConfig

PEER_CONFIG = "config/train_shakespeare_char.py"  # nanoGPT's config for Tiny Shakespeare
# The models that are measured: two of nanoGPT's recipes, and GPT-2's smallest and largest.
LAPTOP = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0}
SHAKESPEARE_10M = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "dropout": 0.2}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
GPT2_XL = GPT2 | {"n_layer": 48, "n_head": 25, "n_embd": 1600, "batch_size": 16, "activation_checkpointing": True}
GPT2_IDS = 50257


def train(given: Options, config: BenchConfig) -> Lines:
    """Measure training without evaluations, of two shapes; on a GPU, of 10.7M parameters and, ours alone, of GPT-2.

    given: options of our runs.
    """
    gpu, data = on_gpu(config), {"dataset": "shakespeare_char", "data_dir": config.data_dir}
    on_cpu = [("laptop shape", LAPTOP, 50), ("10.7M shape", SHAKESPEARE_10M, 2)]
    shapes = [("10.7M shape, batch 64", SHAKESPEARE_10M | {"batch_size": 64}, 100)] if gpu else on_cpu
    for name, shape, quarter in shapes:
        options = shape | {"learning_rate": 1e-3, "warmup_iters": 100}
        theirs = options | {"compile": gpu} | peer_machine_options(config)
        peer = partial(measure.training_speed, theirs, quarter, ["train.py", PEER_CONFIG], "iter {}:", config.peer)
        yield from training(name, options | data | given, quarter, config, peer)
    if gpu:
        yield from random_tokens("124M shape", GPT2 | {"batch_size": 16} | given, 25, config)


def xl(given: Options, config: BenchConfig) -> Lines:
    """Measure training of GPT-2 XL with activation checkpointing. given: options of our runs."""
    check(on_gpu(config) or given, "xl needs a GPU with 80 GB, or flags of a smaller model")
    yield from random_tokens("GPT-2 XL", GPT2_XL | given, 3, config)


def random_tokens(name: str, options: Options, quarter: int, config: BenchConfig) -> Lines:
    """Measure our training on random tokens, each of GPT-2's ids as frequent as the others."""
    with tempfile.TemporaryDirectory() as folder:
        text, draw = Path(folder) / "ids.txt", random.Random(0)
        alphabet = [chr(0x10000 + i) for i in range(GPT2_IDS)]  # from U+10000 on, there are no surrogates
        text.write_text("".join("".join(draw.sample(alphabet, GPT2_IDS)) for _ in range(21)), encoding="utf-8")
        process(["prepare.py", f"--input={text}", "--dataset=ids", f"--data_dir={folder}"])
        yield from training(name, options | {"dataset": "ids", "data_dir": folder}, quarter, config, ids=GPT2_IDS)


def training(name: str, options: Options, quarter: int, config: BenchConfig, peer: Any = None, ids: int = 65) -> Lines:
    """Measure tokens/s of four times `quarter` steps, and their shares of the measured product rate and of the peak."""
    options = options | machine_options(config)
    machine, what = pick_machine(TrainConfig(**options)), f"training, {name}"
    flops, gpu = measure.outline(options, ids).flops_per_token(), machine.device.type == "cuda"
    units = {what: "tokens/s"} | ({f"{what}, memory in use": "GB"} if gpu else {})
    units |= {"product of two large matrices": "TFLOP/s", f"{what}, share": "of this rate"}
    units |= {f"{what}, MFU": "of the data sheet's half-precision peak"}

    def ours():
        speed, *memory = measure.training_speed(options, quarter)
        rate = product_rate(machine, 8192 if gpu else 1024)
        shares = [speed * flops / full for full in (rate, machine.peak_flops) if full]
        return [speed, *memory, rate / 1e12, *shares]

    yield from in_turn(config, units, ours, peer)


def seconds_of(compute: Callable[[], torch.Tensor]) -> float:
    """Return the seconds that `compute()` takes: the best mean of several blocks of calls. Waits for a GPU."""
    from torch.utils.benchmark import Timer  # it is slow to import, and can warn that there is no GPU

    timer = Timer("compute()", globals={"compute": compute}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)


def product_rate(machine: Machine, size: int) -> float:
    """Return the FLOP/s of the product of two matrices of random numbers, (size, size), in the machine's dtype."""
    a, b = torch.randn(2, size, size, device=machine.device, dtype=machine.dtype)
    return 2 * size**3 / seconds_of(lambda: a @ b)


def read_bandwidth(machine: Machine, size: int = 2**27) -> float:
    """Return the bytes per second at which torch sums a float32 tensor of `size` numbers."""
    tensor = torch.ones(size, device=machine.device)
    return tensor.nbytes / seconds_of(tensor.sum)


def generate(config: BenchConfig) -> Lines:
    """Measure tokens/s with random weights, temperature 0.8, top-k 50. nanoGPT draws one sample at a time."""
    machine, many = pick_machine(config), 64 if on_gpu(config) else 16
    small = {key: SHAKESPEARE_10M[key] for key in GPT2}
    for name, shape, vocab_size, rows, tokens in (
        ("10.7M, one sample", small, 65, 1, 250),
        (f"10.7M, {many} samples", small, 65, many, 250),
        ("124M, one sample", GPT2, GPT2_IDS, 1, 100),
    ):
        options = {"shape": shape, "vocab_size": vocab_size, "tokens": tokens} | peer_machine_options(config)
        weights = 12 * shape["n_layer"] * shape["n_embd"] ** 2 + vocab_size * shape["n_embd"]

        def speed(options=options, **others):
            return [measure.program("bench.generation", **(options | others))]

        def ours(speed=speed, rows=rows, size=weights * machine.dtype.itemsize):
            (tokens_per_s,) = speed(model="quill", batch_size=rows, dtype=config.dtype)
            return [tokens_per_s, tokens_per_s / rows * size / read_bandwidth(machine)]

        what = f"generation, {name}"
        units = {f"{what} (peer one at a time)": "tokens/s", f"{what}, weights read": "of the memory's read bandwidth"}
        yield from in_turn(config, units, ours, partial(speed, model="nanogpt", batch_size=1, peer=config.peer))


def loss(given: Options, config: BenchConfig) -> Lines:
    """Measure the best full-split loss and the whole process of `--recipe`, with empty compile caches.

    The peer runs nanoGPT's laptop recipe, on a GPU its config for Tiny Shakespeare as shipped, always with the same
    seed. Our runs have the options `given` and seeds 1, 2, …
    """
    seeds = count(1)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            options = given | {"data_dir": config.data_dir, "seed": next(seeds), "out_dir": folder}
            argv = ["train.py", config.recipe, *as_flags(options | machine_options(config))]
            figures, out = cold_run(argv, Path(folder) / "best.pt")
            loss = min(float(row["val_loss"]) for row in measure.read_metrics(folder))
        return [loss, *figures, int(re.findall(r"([\d,]+) parameters on", out)[0].replace(",", ""))]

    units = {"best full-split val loss": "nats", f"{config.recipe}, whole process": "s", "to its best checkpoint": "s"}
    units |= {"compiled, at the start none": "files", "size": "parameters"}
    yield from in_turn(config, units, ours, partial(peer_recipe_run, config))


def peer_recipe_run(config: BenchConfig) -> list[float]:
    """Run nanoGPT's recipe once, and evaluate its checkpoint, of its best estimate, on the whole split. → figures"""
    with tempfile.TemporaryDirectory() as folder:
        # nanoGPT's README, "I only have a macbook".
        laptop = LAPTOP | {"eval_iters": 20, "log_interval": 1, "max_iters": 2000, "lr_decay_iters": 2000}
        recipe = {} if on_gpu(config) else laptop | {"compile": False}
        argv = ["train.py", PEER_CONFIG, *as_flags(recipe | {"out_dir": folder} | peer_machine_options(config))]
        figures, _ = cold_run(argv, Path(folder) / "ckpt.pt", config.peer)
        options = {"init_from": f"{folder}/ckpt.pt", "dataset": "shakespeare_char", "data_dir": config.data_dir}
        _, out = process(["train.py", *as_flags(options | machine_options(config)), "--eval_only"])
    return [float(re.findall(r"val loss ([\d.]+)", out)[0]), *figures]


def start(config: BenchConfig) -> Lines:
    """Measure from the command to the first step's line, on prepared data, and `import torch` alone, in turn."""
    options = LAPTOP | {"dataset": "shakespeare_char", "data_dir": config.data_dir} | machine_options(config)

    def ours():
        first = measure.start_seconds(options)
        alone = measure.seconds_to_lines(["done"], ["-c", "import torch; print('done')"])[0]
        return [first, alone, first - alone]

    yield from in_turn(config, {"start-up to the first step": "s", "import torch": "s", "the difference": "s"}, ours)
