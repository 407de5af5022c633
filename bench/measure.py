"""Running a command to its end, timing it, and showing what came out: what every bench needs."""

import csv
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from quill import checkpoint
from quill.cli import read_config_file
from quill.errors import UserError
from quill.machine import pick_machine
from quill.options import TrainConfig

ROOT = Path(__file__).parent.parent


def process(argv, cwd=ROOT, stdin=None):
    """Run a Python command to its end. → seconds, what it printed. It must succeed."""
    argv = [str(arg) for arg in argv]
    began = time.perf_counter()
    done = run_python(argv, cwd, stdin)
    seconds = time.perf_counter() - began
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        words = [arg for arg in argv if not arg.startswith("-")]
        raise UserError(f"{' '.join(words)} in {cwd} failed: {reason}")
    return seconds, done.stdout


def run_python(argv, cwd, stdin):
    """Run `python *argv` in folder `cwd`, with the text `stdin` as its input. → CompletedProcess"""
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, input=stdin, capture_output=True, text=True, encoding="utf-8"
    )


def program(name, **options):
    """Run bench/programs/`name`.py with `options` in a process of its own. → the JSON that it printed last"""
    _, out = process(["-m", f"bench.programs.{name}"], stdin=json.dumps(options))
    return json.loads(out.splitlines()[-1])


def flags(options):
    return [f"--{key}={value}" for key, value in options.items()]


def machine_options(config):
    """The device and dtype that the bench was given, for a run's options; `auto` leaves a config file its own."""
    return {key: getattr(config, key) for key in ("device", "dtype") if getattr(config, key) != "auto"}


def on_gpu(config):
    """Whether the bench's device is CUDA."""
    return pick_machine(config).device.type == "cuda"


def peer_machine_options(config):
    """The device and dtype that ours has, for the peer, which knows no `auto` and on a CPU is in float32 always."""
    machine = pick_machine(config)
    device = machine.device.type if config.device == "auto" else config.device
    return {"device": device, "dtype": str(machine.dtype).removeprefix("torch.")}


def hardware(config):
    """→ the processor's name and the threads that torch would use, the GPU if that is used, and torch's version."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = names[0] if names else name
    machine = pick_machine(config)
    if machine.device.type == "cpu":
        return f"{name}, {machine.name.removeprefix('cpu, ')}, torch {torch.__version__}"
    return f"{machine.name}, torch {torch.__version__}"


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


def train_or_resume(path, out_dir, options):
    """Train config `path` with `options` in out_dir, or go on there where it was stopped. → rows of metrics.csv"""
    options |= {"out_dir": out_dir, "init_from": "auto"}
    last = Path(out_dir) / "last.pt"
    if last.is_file():
        state = checkpoint.load(last)
        held = state["config"]
        wanted = asdict(TrainConfig(**(read_config_file(path, TrainConfig) | options)))
        if other := [
            key
            for key in wanted
            if key not in ("init_from", "device", "data_dir", "out_dir") and held.get(key) != wanted[key]
        ]:
            raise UserError(f"{out_dir} holds a run with another {', '.join(other)}; remove it, or give --out_dir")
        if state["step"] >= wanted["max_iters"]:
            return read_metrics(out_dir)
    process(["train.py", path, *flags(options)])
    return read_metrics(out_dir)


def read_metrics(folder):
    with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))
