"""Find the better of two configs: train both with the same seeds and batches, and compare their losses in pairs."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Line, span, train_or_resume
from quill.cli import read_config_file
from quill.errors import check
from quill.options import BenchConfig, TrainConfig


def compare(paths: list[str], given: dict[str, Any], config: BenchConfig) -> list[Line]:
    """Train both configs with seeds 1, 2, …; a run that an earlier call left unfinished is resumed.

    paths: two config files. given: train.py's options that both runs get.
    """
    check_comparable(paths, given, config)
    runs: dict[str, list[Line]] = {path: [] for path in paths}
    for seed in range(1, config.seeds + 1):
        for path in paths:
            run = train_or_resume(Path(path), seed, given, "compare", config)
            runs[path].append(run)
            print(f"{Path(path).stem}, seed {seed}: val loss {run['val_loss']:.4f}", flush=True)
    a, b = ([run["val_loss"] for run in runs[path]] for path in paths)
    for path, losses in zip(paths, (a, b), strict=True):
        loss = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        speeds, seconds = (span([run[key] for run in runs[path]]) for key in ("tokens_per_s", "seconds"))
        print(f"{Path(path).stem}: val loss {loss}, {speeds} tokens/s, {seconds} s")
    difference, margin = paired_difference(a, b)
    words = verdict(Path(paths[0]).stem, Path(paths[1]).stem, difference, margin)
    print(f"{words} (val loss, 95 % interval, {config.seeds} pairs)")
    lines: list[Line] = [{"config": path, "runs": runs[path]} for path in paths]
    return [*lines, {"difference": difference, "margin": margin, "verdict": words}]


def check_comparable(paths: list[str], given: dict[str, Any], config: BenchConfig) -> None:
    """Raise a UserError if the two configs can't be compared: same name, too few seeds, or different datasets."""
    both = " and ".join(paths)
    check(len({Path(path).stem for path in paths}) == 2, f"{both}: give two config files with different names")
    check(config.seeds > 1, "--seeds=1: an interval takes two seeds or more")
    configs = [TrainConfig(**(read_config_file(path, TrainConfig) | given)) for path in paths]
    splits = sorted({f"{config.dataset}, --val_split={config.val_split}," for config in configs})
    check(len(splits) == 1, f"{both}: losses on {' and '.join(splits)} can't be compared")


def verdict(a: str, b: str, difference: float, margin: float) -> str:
    """Say which of the configs named `a` and `b` has the lower loss. `difference` ± `margin` is b's loss minus a's."""
    if abs(difference) <= margin:
        return f"{a} and {b} can't be told apart: {b} - {a} = {difference:+.4f} ± {margin:.4f}"
    better = b if difference < 0 else a
    return f"{better} is better by {abs(difference):.4f} ± {margin:.4f}"


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Compare two samples in pairs. → mean of b - a, half the width of its 95 % interval"""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), t_quantile(len(differences) - 1) * error


def t_quantile(degrees: int, probability: float = 0.95) -> float:
    """Return the t for which Student's distribution has `probability` between -t and t.

    The density of the angle atan(t / √degrees) is proportional to cos(angle)^(degrees - 1); it is summed from 0 to π/2.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    areas = np.cumsum(np.cos((angles[:-1] + angles[1:]) / 2) ** (degrees - 1))
    angle = np.interp(probability, areas / areas[-1], angles[1:])
    return math.sqrt(degrees) * math.tan(angle)
