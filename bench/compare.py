"""Which of two configs is better: the same seeds and batches for both, and the paired difference in loss."""

import math
import statistics
from pathlib import Path

from bench.measure import machine_options, span, train_or_resume
from quill.cli import read_config_file
from quill.errors import UserError
from quill.options import TrainConfig

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
    if config.seeds < 2:
        raise UserError("--seeds=1: an interval takes two seeds or more")
    datasets = {TrainConfig(**(read_config_file(path, TrainConfig) | given)).dataset for path in paths}
    if len(datasets) > 1:
        raise UserError(f"{' and '.join(paths)}: losses on {' and '.join(sorted(datasets))} can't be compared")
    for seed in range(1, config.seeds + 1):
        for path in paths:
            own = {"seed": seed, "data_dir": config.data_dir} | machine_options(config)
            rows = train_or_resume(path, f"{config.out_dir}/compare/{names[path]}-{seed}", given | own)
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
