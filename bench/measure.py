"""What every bench uses: run a command and time it, train a config, read the results and print them."""

import csv
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from model import GPT
from quill import checkpoint
from quill.cli import read_config_file
from quill.data.corpora import CORPORA, locate
from quill.errors import UserError, check
from quill.machine import pick_machine
from quill.options import BenchConfig, Options, TrainConfig

ROOT = Path(__file__).parent.parent
Line = dict[str, Any]  # one result: what was measured, its figures, and what is derived from them


def process(argv: Iterable[Any], cwd: Path | str = ROOT, stdin: str | None = None) -> tuple[float, str]:
    """Run `python *argv` to its end. → seconds, what it printed. Raise a UserError if it fails."""
    argv = [str(arg) for arg in argv]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *argv], cwd=cwd, input=stdin, capture_output=True, encoding="utf-8")
    seconds = time.perf_counter() - began
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        words = [arg for arg in argv if not arg.startswith("-")]
        raise UserError(f"{' '.join(words)} in {cwd} failed: {reason}")
    return seconds, done.stdout


def program(module: str, **options: Any) -> Any:
    """Run `python -m module` with `options` as JSON on its stdin. → the JSON value on the last line that it prints"""
    _, out = process(["-m", module], stdin=json.dumps(options))
    return json.loads(out.splitlines()[-1])


def as_flags(options: Options) -> list[str]:
    """Convert {key: value} to flags `--key=value`."""
    return [f"--{key}={value}" for key, value in options.items()]


def train(options: Options, *config_file: str) -> tuple[float, list[dict[str, str]]]:
    """Train with `options` in a temporary out_dir. → seconds of the whole process, the rows of metrics.csv"""
    with TemporaryDirectory() as folder:
        seconds, _ = process(["train.py", *config_file, *as_flags(options | {"out_dir": folder})])
        return seconds, read_metrics(folder)


def training_speed(options: Options) -> float:
    """Train a short run. → tokens per second, without those up to the first evaluation, which warm up"""
    _, rows = train({"gradient_accumulation_steps": 1, "eval_iters": 1} | options)
    return statistics.harmonic_mean(float(row["tokens_per_s"]) for row in rows[1:])


def start_seconds(options: Options) -> float:
    """Return the seconds from `python train.py` to its first step's line."""
    with TemporaryDirectory() as folder:
        options = options | {"gradient_accumulation_steps": 1, "max_iters": 10**6, "out_dir": folder}
        return seconds_to_line("step 1/", ["train.py", *as_flags(options)])


def seconds_to_line(start: str, argv: list[str]) -> float:
    """Return the seconds until `python *argv` prints a line that starts with `start`; its end is not waited for."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as running:
        assert running.stdout
        check(any(line.startswith(start) for line in running.stdout), f"{argv[0]} ended before it printed {start}")
        seconds = time.perf_counter() - began
        running.kill()
    return seconds


def write_text(path: Path, size: float, config: BenchConfig) -> None:
    """Write Tiny Shakespeare again and again, until the file has `size` MB or more."""
    corpus = locate(CORPORA["shakespeare_char"], data_dir=config.data_dir).read_bytes()
    with open(path, "wb") as file:
        file.writelines([corpus] * math.ceil(size * 1e6 / len(corpus)))


def outline(options: Options, vocab_size: int = 65) -> GPT:
    """Return the model of a training, without memory for its weights, to count its parameters and FLOPs."""
    with torch.device("meta"):
        return GPT(TrainConfig(**options), vocab_size)


def train_or_resume(path: Path, seed: int, given: Options, folder: str, config: BenchConfig) -> Line:
    """Train config `path` with the options `given` in a folder of `--out_dir`/`folder`, or resume the run there.

    A run that is finished is not trained again. Raise a UserError if the folder has a run with other options.
    → the run's seed, last validation loss, seconds and median speed
    """
    out_dir = f"{config.out_dir}/{folder}/{path.stem}-{seed}"
    options = given | {"seed": seed, "data_dir": config.data_dir, "out_dir": out_dir, "init_from": "auto"}
    options |= machine_options(config)
    held = Path(out_dir) / "last.pt"
    if held.is_file():
        wanted = vars(TrainConfig(**(read_config_file(path, TrainConfig) | options)))
        may_differ = ("init_from", "device", "data_dir", "out_dir")
        old = vars(TrainConfig()) | checkpoint.load(held)["config"]  # an older quill has saved fewer options
        if other := [key for key in wanted if key not in may_differ and old[key] != wanted[key]]:
            raise UserError(f"{out_dir} has a run with another {', '.join(other)}; remove it, or give --out_dir")
    process(["train.py", path, *as_flags(options)])
    rows = read_metrics(out_dir)
    speed = statistics.median(float(row["tokens_per_s"]) for row in rows)
    return {"seed": seed, "tokens_per_s": speed} | {key: float(rows[-1][key]) for key in ("val_loss", "seconds")}


def read_metrics(folder: str | Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    return list(csv.DictReader((Path(folder) / "metrics.csv").read_text(encoding="utf-8").splitlines()))


def machine_options(config: BenchConfig) -> dict[str, str]:
    """Return the bench's `--device` and `--dtype` as options of our scripts, without `auto`: a config may set them."""
    return {key: getattr(config, key) for key in ("device", "dtype") if getattr(config, key) != "auto"}


def peer_machine_options(config: BenchConfig) -> dict[str, str]:
    """Return the device and dtype of our runs, for the peer, which has no `auto`. On a CPU it always uses float32."""
    machine = pick_machine(config)
    device = machine.device.type if config.device == "auto" else config.device
    dtype = torch.float32 if machine.device.type == "cpu" else machine.dtype
    return {"device": device, "dtype": str(dtype).removeprefix("torch.")}


def on_gpu(config: BenchConfig) -> bool:
    """Return whether the bench's device is CUDA."""
    return pick_machine(config).device.type == "cuda"


def hardware(config: BenchConfig) -> str:
    """Describe the GPU, or the processor and the number of threads that torch uses; and torch's version."""
    machine = pick_machine(config)
    if machine.device.type != "cpu":
        return f"{machine.name}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {machine.name.removeprefix('cpu, ')}, torch {torch.__version__}"


def in_turn(config: BenchConfig, ours: Callable[[], Any], peer: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    """Measure `ours()` and, with `--peer`, `peer()` alternately, `--pairs` times each. → our figures, the peer's"""
    pairs = [(ours(), peer() if config.peer else None) for _ in range(config.pairs)]
    return [a for a, _ in pairs], [b for _, b in pairs if config.peer]


def report(what: str, unit: str, ours: list[float], peer: Sequence[float] = ()) -> Line:
    """Print medians and ranges of both, and their ratio in pairs, which is above 1 where ours is better. → the line"""
    line = {"what": what, "unit": unit, "n": len(ours), "ours": ours, "peer": peer}
    text = f"{what}: {span(ours)} {unit}"
    if peer:
        line["ratio"] = [b / a if unit in ("s", "nats") else a / b for a, b in zip(ours, peer, strict=True)]
        text += f", peer {span(peer)}, ratio {span(line['ratio'])}"
    print(f"{text} (n = {len(ours)})", flush=True)
    return line


def span(values: Sequence[float]) -> str:
    """Format the median and the range of `values`, to four digits."""
    figures = (statistics.median(values), min(values), max(values))
    shown = [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in figures]
    return f"{shown[0]} ({shown[1]}–{shown[2]})" if len(values) > 1 else shown[0]
