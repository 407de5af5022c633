"""Experiments that train configs with several seeds: compare two configs in pairs, or train the rungs of the ladder."""

import math
import statistics
from html import escape
from pathlib import Path

import numpy as np

from bench.measure import ROOT, Line, span, train_or_resume
from quill import checkpoint
from quill.cli import read_config_file
from quill.data.token_files import open_dataset, prepare_if_missing
from quill.errors import check
from quill.files import replacing
from quill.options import BenchConfig, Options, TrainConfig
from quill.scoring import count_losses

ROW, LEFT, WIDTH = 38, 190, 720  # pixels: a rung's height, where the scale begins, the picture's width
STYLE = "text { font: 14px sans-serif; fill: #888 } .small { font-size: 12px }"
TITLE = "validation loss, nats a character; a dot is the mean of the runs, a bar their range"


def compare(paths: list[str], given: Options, config: BenchConfig) -> list[Line]:
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


def check_comparable(paths: list[str], given: Options, config: BenchConfig) -> None:
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
    return f"{b if difference < 0 else a} is better by {abs(difference):.4f} ± {margin:.4f}"


def paired_difference(a: list[float], b: list[float]) -> tuple[float, float]:
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


def ladder(paths: list[str], given: Options, config: BenchConfig) -> list[Line]:
    """Train every rung with seeds 1, 2, …; a run that an earlier call left unfinished is resumed. → a line for each

    paths: the rungs to train, all if empty. given: train.py's options that all runs get. The picture replaces
    docs/ladder.svg only if all rungs were trained as shipped, with three seeds or more; else it goes to `--out_dir`.
    """
    for path in paths:
        read_config_file(path, TrainConfig)  # so that a mistake is reported before the first run
    lines = counts(config, given.get("dataset", "shakespeare_char"))
    for path in [Path(path) for path in paths] or sorted((ROOT / "config" / "ladder").glob("*.py")):
        lines.append(line := train_rung(path, given, config))
        print(
            f"{line['rung']:12} {line['parameters']:9,} parameters  val loss {line['val_loss']:.3f} "
            f"(spread {line['spread']:.3f}, n = {len(line['runs'])})  {line['seconds']:5.1f} s",
            flush=True,
        )
    as_shipped = not (given or paths) and config.seeds >= 3 and config.dtype == "auto"
    folder = ROOT / "docs" if as_shipped else Path(config.out_dir)
    with replacing(folder / "ladder.svg") as (file,):
        file.write(draw(lines).encode())
    return lines


def counts(config: BenchConfig, dataset: str = "shakespeare_char") -> list[Line]:
    """Print the losses of a die, of counted tokens and of counted pairs; each count starts at 1. → a line for each"""
    prepare_if_missing(dataset, config.data_dir)
    data = open_dataset(config.data_dir, dataset)
    V, lines = data.tokenizer.vocab_size, []
    losses = count_losses(data.train, data.val, V).values()
    for name, n, loss in zip(("die", "unigram", "pairs"), (0, V, V * V), losses, strict=True):
        print(f"{name:12} {n:9,} parameters  val loss {loss:.3f}")
        lines.append({"rung": name, "parameters": n, "val_loss": loss, "seconds": 0, "runs": [{"val_loss": loss}]})
    return lines


def train_rung(path: Path, given: Options, config: BenchConfig) -> Line:
    """Train one config with `config.seeds` seeds."""
    runs = [train_or_resume(path, seed, given, "ladder", config) for seed in range(1, config.seeds + 1)]
    best = Path(config.out_dir) / "ladder" / f"{path.stem}-1" / "best.pt"
    losses = [run["val_loss"] for run in runs]
    return {
        "rung": path.stem,
        "parameters": checkpoint.load_model(checkpoint.load(best)).num_params(),
        "val_loss": statistics.mean(losses),
        "spread": max(losses) - min(losses),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "runs": runs,
    }


def draw(lines: list[Line]) -> str:
    """Draw models as SVG: for each its name, a dot at its mean loss, and a bar over the range of its seeds."""
    losses = [run["val_loss"] for line in lines for run in line["runs"]]
    low, high = int(min(losses) * 2) / 2, int(max(losses) * 2 + 1) / 2

    def x(loss):
        return round(LEFT + (loss - low) / (high - low) * (WIDTH - LEFT - 70), 1)

    height, parts = ROW * (len(lines) + 2), []
    for i in range(round((high - low) * 2) + 1):
        at, label = x(low + i / 2), f"{low + i / 2:.1f}"
        parts.append(f'<path d="M{at} {ROW - 8}V{height - ROW}" stroke="#8884"/>')
        parts.append(f'<text x="{at}" y="{height - ROW + 18}" text-anchor="middle" class="small">{label}</text>')
    for i, line in enumerate(lines):
        y, own = ROW * (i + 1) + 10, [run["val_loss"] for run in line["runs"]]
        size = f"{line['parameters']:,} parameters, {line['seconds']:.0f} s"
        parts.append(f'<text x="12" y="{y}">{escape(line["rung"].replace("_", " "))}</text>')
        parts.append(f'<text x="12" y="{y + 15}" class="small">{size}</text>')
        parts.append(f'<path d="M{x(min(own))} {y}H{x(max(own))}" stroke="#c73" stroke-width="5"/>')
        parts.append(f'<circle cx="{x(line["val_loss"])}" cy="{y}" r="5" fill="#36c"/>')
        parts.append(f'<text x="{x(line["val_loss"]) + 12}" y="{y + 5}">{line["val_loss"]:.3f}</text>')
    return picture("The ladder", TITLE, WIDTH, height, parts)


def picture(name: str, title: str, width: int, height: int, parts: list[str]) -> str:
    """Return an SVG file with `title` above its `parts`."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<title>{name}: {title}</title>\n<style>{STYLE}</style>\n"
        f'<text x="12" y="16" class="small">{title}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )
