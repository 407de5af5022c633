"""What every bench uses: run a command and time it, train a config, measure in turn, and describe the results."""

import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from model import GPT
from quill import checkpoint
from quill.cli import read_config_file
from quill.errors import UserError, check
from quill.files import replacing
from quill.machine import pick_machine
from quill.options import BenchConfig, Options, TrainConfig

# How pictures look, as matplotlib names it. Their text stays text, and no file has a date or a random name.
STYLE: Any = {"font.size": 9, "axes.titlesize": 9, "text.parse_math": False}
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "quill"}
GREY = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
ROOT = Path(__file__).parent.parent
Line = dict[str, Any]  # one result: what was measured and its figures
Run = Callable[[], Sequence[float]]  # measures once. → figures
Lines = Iterator[Line]  # what a bench yields: each line when it is new, and again when it has another figure


def full_path(path: str) -> str:
    """Make the path of a file absolute. One that is not there may be in quill's folder, where runs start."""
    return str(Path(path).resolve()) if Path(path).is_file() else path


def process(argv: Iterable[Any], cwd: Path | str = ROOT, stdin: str | None = None, **env: str) -> tuple[float, str]:
    """Run `python *argv` with `env` added to its environment. → seconds, what it printed. UserError if it fails."""
    argv, began = [str(arg) for arg in argv], time.perf_counter()
    settings: Options = {"cwd": cwd, "input": stdin, "env": os.environ | env}
    done = subprocess.run([sys.executable, *argv], capture_output=True, encoding="utf-8", **settings)
    seconds = time.perf_counter() - began
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        words = [arg for arg in argv if not arg.startswith("-")]
        raise UserError(f"{' '.join(words)} in {cwd} failed: {reason}")
    return seconds, done.stdout


def program(module: str, **options: Any) -> Any:
    """Run `python -m module` with `options` as JSON on its stdin. → the JSON value on the last line that it prints"""
    return json.loads(process(["-m", module], stdin=json.dumps(options))[1].splitlines()[-1])


def as_flags(options: Options) -> list[str]:
    """Convert {key: value} to flags `--key=value`."""
    return [f"--{key}={value}" for key, value in options.items()]


def cold_run(argv: Iterable[Any], best: Path, cwd: Path | str = ROOT) -> tuple[list[float], str]:
    """Run `python *argv` with empty compile caches. → [seconds, those to the last `best`, files compiled], output"""
    with TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        began, (seconds, out) = time.time(), process(argv, cwd, **caches)
        return [seconds, best.stat().st_mtime - began, sum(path.is_file() for path in Path(folder).rglob("*"))], out


def seconds_to_lines(starts: Sequence[str], argv: Iterable[Any], cwd: Path | str = ROOT) -> list[float]:
    """Run `python *argv` until it has printed lines with these `starts`. → seconds to each, and a GPU's GB in use"""
    argv, seconds, line = [sys.executable, "-u", *map(str, argv)], [], ""
    began, pipe = time.perf_counter(), subprocess.PIPE
    with subprocess.Popen(argv, cwd=cwd, encoding="utf-8", stdout=pipe, stderr=subprocess.STDOUT) as running:
        try:
            for line in running.stdout or ():
                if line.startswith(starts[len(seconds)]):
                    seconds.append(time.perf_counter() - began)
                if len(seconds) == len(starts):
                    break
            memory = [torch.cuda.mem_get_info()] if torch.cuda.is_initialized() else []
        finally:
            running.kill()
    check(len(seconds) == len(starts), f"{argv[2]} ended before it printed {starts[-1]}: {line.strip()}")
    return seconds + [(total - free) / 1e9 for free, total in memory]


def training_speed(
    options: Options, quarter: int, argv: Sequence[str] = ("train.py",), start: str = "step {}/", cwd: str | Path = ROOT
) -> list[float]:
    """Train four times `quarter` steps, of which a line has `start`. → [tokens/s after the first quarter, GPU's GB]"""
    rows = {"gradient_accumulation_steps": 1, "eval_iters": 1, "eval_interval": 10**6, "max_iters": 4 * quarter + 1}
    with TemporaryDirectory() as folder:
        flags = as_flags(rows | options | {"log_interval": quarter, "out_dir": folder})
        lines = [start.format(quarter), start.format(4 * quarter)]
        began, ended, *memory = seconds_to_lines(lines, [*argv, *flags], cwd)
    return [3 * quarter * options["batch_size"] * options["block_size"] / (ended - began), *memory]


def start_seconds(options: Options) -> float:
    """Return the seconds from `python train.py` to its first step's line."""
    with TemporaryDirectory() as folder:
        options = options | {"gradient_accumulation_steps": 1, "max_iters": 10**6, "out_dir": folder}
        return seconds_to_lines(["step 1/"], ["train.py", *as_flags(options)])[0]


def outline(options: Options, vocab_size: int = 65) -> GPT:
    """Return the model of a training, without memory for its weights, to count its parameters and FLOPs."""
    with torch.device("meta"):
        return GPT(TrainConfig(**options), vocab_size)


def train_or_resume(path: str, given: Options, seed: int, name: str, config: BenchConfig) -> Line:
    """Train config `path` with the options `given` in `--out_dir`/`name`-`seed`, or resume the run there.

    A run that is finished is not trained again. Raise a UserError if the folder has a run with other options.
    → the run's figures: its seed, last and best validation loss, the step of the best, parameters, seconds
    """
    out_dir = f"{config.out_dir}/{name}-{seed}"
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
    rows = [{key: float(value) for key, value in row.items()} for row in read_metrics(out_dir)]
    best = min(rows, key=lambda row: row["val_loss"])
    run: Line = {"seed": seed, "best_loss": best["val_loss"], "best_step": int(best["step"])}
    run["parameters"] = checkpoint.load_model(checkpoint.load(f"{out_dir}/best.pt")).num_params()
    return run | {key: rows[-1][key] for key in ("val_loss", "seconds")}


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
    names.append(platform.processor() or platform.machine())
    return f"{names[0]}, {machine.name.removeprefix('cpu, ')}, torch {torch.__version__}"


def in_turn(config: BenchConfig, units: dict[str, str], ours: Run, peer: Run | None = None) -> Lines:
    """Measure `ours()` and, with `--peer`, `peer()` alternately, `--pairs` times each, and print each figure.

    Yield a line for each of `units`, {what: unit}, again whenever it has another figure. The peer may have fewer.
    """
    lines: list[Line] = [{"what": what, "unit": unit, "ours": [], "peer": []} for what, unit in units.items()]
    for _ in range(config.pairs):
        for side, run in (("ours", ours), ("peer", peer if config.peer else None)):
            for line, figure in zip(lines, run() if run else (), strict=False):
                line[side].append(figure)
                print(f"{line['what']}, {side}: {span([figure])} {line['unit']}", flush=True)
                yield line


def describe(line: Line, target: float = 0) -> str:
    """Return a line's medians and ranges, means of losses, and ratios in pairs, which are above 1 if ours is better."""
    ours, peer, unit = line["ours"], line["peer"], line["unit"]
    text = f"{line['what']}: {span(ours)} {unit}"
    if unit == "nats":
        text += f", mean {statistics.mean(ours):.4f}"
        text += f", {'at most' if statistics.mean(ours) <= target else 'NOT at most'} {target}" if target else ""
    if peer:
        text += f", peer {span(peer)}"
    if peer and unit in ("s", "nats", "tokens/s"):
        ratios = [a / b if unit == "tokens/s" else b / a for a, b in zip(ours, peer, strict=False)]
        text += f", ratio {span(ratios)}"
    return f"{text} (n = {len(ours)})"


def span(values: Sequence[float]) -> str:
    """Format the median and the range of `values`, to four digits."""
    figures = (statistics.median(values), min(values), max(values))
    shown = [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in figures]
    return f"{shown[0]} ({shown[1]}–{shown[2]})" if len(values) > 1 else shown[0]


@contextmanager
def picture(path: Path, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure to draw in, and write it as SVG, the same each time. height: in units of 80 pixels.

    Its text is grey and its background transparent, so that it can be read on a dark and on a light page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | dict.fromkeys(GREY, "#888888")):
        figure = Figure(figsize=(10, height), layout="constrained")
        yield figure
        with replacing(path) as (file,):
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
