"""Experiments that train configs with several seeds: compare configs in pairs, or train the rungs of the ladder."""

import math
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.measure import ROOT, Line, Lines, full_path, picture, train_or_resume
from quill.cli import read_args, read_config_file
from quill.data.token_files import open_dataset, prepare_if_missing
from quill.errors import UserError, check
from quill.options import BenchConfig, Options, TrainConfig
from quill.scoring import count_losses

FIXED = {"seed", "init_from", "overwrite", "dry_run", "eval_only", "data_dir", "out_dir"}  # a bench decides these


def compare(paths: list[str], given: Options, config: BenchConfig) -> Lines:
    """Train variants with the same seeds, and rank them.

    paths: config files, or .txt files of which a line is what follows `python train.py`. given: options for all runs.
    """
    variants, splits = {}, set()
    for where, name, words in list_variants(paths):
        try:
            check(name not in variants, f"{name}: give different lines, or config files with different names")
            check(not {"-h", "--help"} & set(words), "give a config file and flags")
            files, flags = read_args(words, TrainConfig, None)
            check(len(files) == 1, f"{name[:80]}: give one config file, and flags")
            twice = flags.keys() & given.keys()
            check(not twice, f"--{min(twice, default='')} is given for all runs already")
            refuse_fixed(flags, "compare")
            variants[name] = full_path(files[0]), flags | given
            run = TrainConfig(**(read_config_file(files[0], TrainConfig) | flags | given))
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        splits.add(f"{run.dataset}, --val_split={run.val_split},")
    check(len(variants) > 1, "compare takes two config files or more, or a .txt file with a line for each variant")
    check(len(splits) == 1, f"losses on {' and '.join(sorted(splits))} can't be compared")
    yield from train_variants("compare", variants, config)


def list_variants(paths: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the variants that `paths` name: for error messages, where it is; its name; its config file and flags."""
    for path in paths:
        if not path.endswith(".txt"):
            yield "", Path(path).stem, [path]
            continue
        for number, text in enumerate(Path(path).read_text("utf-8-sig", "surrogateescape").splitlines(), start=1):
            if words := f" {text}".partition(" #")[0].split():
                yield f"{path}, line {number}: ", " ".join(words), words


def train_variants(bench: str, variants: dict[str, tuple[str, Options]], config: BenchConfig) -> Lines:
    """Train variants, {name: (config file, options)}, with seeds 1, 2, …, and rank them by their last loss.

    Yield a variant's line after each of its runs. A run that an earlier call left unfinished is resumed. One that fails
    does not stop the others, and after `--minutes` none is started: `problems` in the line tells.
    """
    end = time.monotonic() + 60 * config.minutes
    lines: list[Line] = [{"name": name, "runs": [], "problems": []} for name in variants]
    cases = [(line, seed) for seed in range(1, config.seeds + 1) for line in lines]

    def run(case: tuple[Line, int]) -> Line | str:
        name, seed = case[0]["name"], case[1]
        try:
            check(time.monotonic() < end, f"not started, as --minutes={config.minutes:g} were over")
            folder = re.sub(r"[^\w.=-]+", "_", name)[-200:]
            return train_or_resume(*variants[name], seed, f"{bench}/{folder}", config)
        except UserError as error:
            return f"seed {seed}: {error}"

    with ThreadPoolExecutor(config.jobs) as pool:  # a single job runs in this thread
        for (line, _), result in zip(cases, (pool.map if config.jobs > 1 else map)(run, cases), strict=True):
            line["problems" if isinstance(result, str) else "runs"].append(result)
            if runs := line["runs"]:
                losses, seconds = [run["val_loss"] for run in runs], [run["seconds"] for run in runs]
                line |= {"val_loss": statistics.mean(losses), "spread": max(losses) - min(losses)}
                line |= {"seconds": statistics.median(seconds), "parameters": runs[0]["parameters"]}
            print(describe_variant(line), flush=True)
            yield line
    for line in sorted(lines, key=lambda line: line.get("val_loss", math.inf)):
        print(describe_variant(line, lines[0]))


def describe_variant(line: Line, first: Line | None = None) -> str:
    """Return a variant's figures and problems. With `first`, say which is better, from runs with the same seed."""
    texts, runs = [], line["runs"]
    if runs:
        best = min(runs, key=lambda run: run["best_loss"])
        texts.append(f"val loss {line['val_loss']:.4f} (spread {line['spread']:.4f}, n = {len(runs)})")
        texts.append(f"best {best['best_loss']:.4f} at step {best['best_step']}, {line['seconds']:.1f} s")
    others = {run["seed"]: run["val_loss"] for run in first["runs"]} if first and first is not line else {}
    differences = [run["val_loss"] - others[run["seed"]] for run in runs if run["seed"] in others]
    if first and len(differences) > 1:
        texts.append(verdict(*interval(differences), first["name"]))
    return f"{', '.join(texts + line['problems'][:1])}: {line['name']}"


def verdict(difference: float, margin: float, first: str) -> str:
    """Compare a loss with that of the variant `first`: `difference` ± `margin` is it minus the first, at 95 %."""
    if abs(difference) <= margin:
        return f"can't be told apart from {first}: {difference:+.4f} ± {margin:.4f}"
    return f"{'better' if difference < 0 else 'worse'} than {first} by {abs(difference):.4f} ± {margin:.4f}"


def refuse_fixed(given: Options, bench: str) -> None:
    """Raise a UserError for an option that a bench decides for its runs."""
    if taken := given.keys() & FIXED:
        raise UserError(f"--{min(taken)}: not with python -m bench {bench}, which decides this for its runs")


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean of a sample of differences, and half the width of its 95 % interval."""
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


def ladder(paths: list[str], given: Options, config: BenchConfig) -> Lines:
    """Train every rung with the same seeds, and draw the ladder. Yield a rung's line after each of its runs.

    paths: the rungs to train, all if empty. given: train.py's options that all runs get. The picture replaces
    docs/ladder.svg only if all rungs were trained as shipped, with three seeds or more; else it goes to `--out_dir`.
    """
    files = paths or sorted(map(str, (ROOT / "config/ladder").glob("*.py")))
    for path in files:
        read_config_file(path, TrainConfig)  # so that a mistake is reported before the first run
    lines = {line["name"]: line for line in counts(config, given.get("dataset", "shakespeare_char"))}
    yield from lines.values()
    for line in train_variants("ladder", {Path(path).stem: (path, given) for path in files}, config):
        lines[line["name"]] = line
        yield line
    if any(line.get("problems") for line in lines.values()):
        return
    as_shipped = not (given or paths) and config.seeds >= 3 and config.dtype == "auto"
    folder = ROOT / "docs" if as_shipped else Path(config.out_dir)
    draw(list(lines.values()), folder / "ladder.svg")


def counts(config: BenchConfig, dataset: str = "shakespeare_char") -> Lines:
    """Print the losses of a die, of counted tokens and of counted pairs; each count starts at 1. Yield them."""
    prepare_if_missing(dataset, config.data_dir)
    data = open_dataset(config.data_dir, dataset)
    V = data.tokenizer.vocab_size
    losses = count_losses(data.train, data.val, V).values()
    for name, n, loss in zip(("die", "unigram", "pairs"), (0, V, V * V), losses, strict=True):
        print(f"{name:12} {n:9,} parameters  val loss {loss:.3f}")
        yield {"name": name, "parameters": n, "val_loss": loss, "seconds": 0, "runs": [{"val_loss": loss}]}


def draw(lines: list[Line], path: Path) -> None:
    """Draw a row for each model: a dot at its mean loss, and a bar over the range of its seeds."""
    with picture(path, 0.5 * len(lines) + 0.8) as figure:
        axes = figure.add_subplot(xlabel="validation loss, nats a character: the mean of the runs, and their range")
        for line in lines:
            losses, mean = [run["val_loss"] for run in line["runs"]], line["val_loss"]
            row = f"{line['name'].replace('_', ' ')}\n{line['parameters']:,} parameters, {line['seconds']:.0f} s"
            axes.plot([min(losses), max(losses)], [row, row], "C1", linewidth=16, solid_capstyle="butt")
            axes.plot(mean, row, "C0o")
            axes.annotate(f"{mean:.3f}", (mean, row), (9, 0), textcoords="offset points", va="center")
        axes.grid(axis="x", alpha=0.4)
        axes.margins(x=0.1)
        axes.invert_yaxis()  # the first row at the top
