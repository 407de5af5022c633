"""How cost grows with size: preparing a text, training and generating, each at sizes that are far apart.

A point is (size, cost, seconds): what grows, its cost by a formula in any unit, and the time measured. The *power* of a
series is the slope of log seconds over log size: 1 if twice the size takes twice the time. It should be the cost's.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from bench import measure
from bench.measure import Line, Lines, outline, start_seconds
from bench.peers import LAPTOP
from quill.data.corpora import CORPORA, locate
from quill.data.token_files import prepare
from quill.options import BenchConfig, Options

TOKENS, CONTEXTS = 2048, (64, 128, 256, 512, 1024)  # tokens in a training step, and in a row of it
SMALL, MEDIUM = {"n_layer": 4, "n_head": 4, "n_embd": 128}, {"n_layer": 6, "n_head": 6, "n_embd": 384}
TO_126M = [(2, 1, 64), (5, 2, 128), (6, 6, 384), (8, 10, 640), (10, 16, 1024)]  # models from 0.1M parameters on


def list_series(config: BenchConfig, folder: Path) -> Iterator[tuple[str, str, Iterator[tuple[float, float, float]]]]:
    """Yield what is measured, what grows, and the points. A point is measured when it is taken from its iterator."""
    texts = sorted({1, 10, 100, 1000, 1000 * config.gigabytes})
    data = {"data_dir": str(folder), "dataset": "1"} | measure.machine_options(config)
    yield "prepare a text", "MB", ((n, n, prepare_seconds(n, folder, config)) for n in texts)
    yield "start a training", "MB of text", ((n, 1, start_seconds(LAPTOP | data | {"dataset": n})) for n in texts)
    models = (dict(zip(SMALL, numbers, strict=True)) | {"block_size": 256} for numbers in TO_126M)
    yield "training step", "parameters", ((outline(model).num_params(), *step(model | data)) for model in models)
    yield "training step", "tokens of context", ((T, *step(SMALL | data | {"block_size": T})) for T in CONTEXTS)
    yield "generate a text", "tokens", ((T, *generation(1, T, 4096, config)) for T in (256, 512, 1024, 2048, 4096))
    yield "generate 256 tokens", "texts at once", ((B, *generation(B, 256, 256, config)) for B in (1, 4, 16, 64))


def prepare_seconds(size: int, folder: Path, config: BenchConfig) -> float:
    """Prepare copies of Tiny Shakespeare, `size` MB or more, as the dataset `size` in `folder`. → seconds"""
    corpus = locate(CORPORA["shakespeare_char"], data_dir=config.data_dir).read_bytes()
    with open(folder / "text", "wb") as file:
        file.writelines([corpus] * math.ceil(size * 1e6 / len(corpus)))
    began = time.perf_counter()
    prepare(folder / "text", folder / str(size))
    return time.perf_counter() - began


def step(options: Options) -> tuple[float, float]:
    """Train with TOKENS tokens in a step. → the FLOPs of a token, the mean seconds of a step"""
    flops = outline(options).flops_per_token()
    options = options | {"batch_size": TOKENS // options["block_size"]}
    return flops, TOKENS / measure.training_speed(options, max(2, round(2.5e11 / (flops * TOKENS))))[0]


def generation(rows: int, tokens: int, block_size: int, config: BenchConfig) -> tuple[float, float]:
    """Generate `rows` texts of `tokens` tokens at once. → how many numbers this reads from memory, its seconds"""
    shape = MEDIUM | {"position": "rope", "block_size": block_size}
    cached = rows * 2 * shape["n_layer"] * shape["n_embd"] * tokens / 2  # keys and values, half of them on average
    options = {"shape": shape, "vocab_size": 65, "batch_size": rows, "tokens": tokens}
    speed = measure.program("bench.generation", model="quill", **options, **measure.peer_machine_options(config))
    return tokens * (outline(shape).num_params() + cached), rows * tokens / speed


def growth(config: BenchConfig) -> Lines:
    """Measure all series, with --quick two sizes of each. Draw docs/growth.svg, with options one in `--out_dir`."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for what, by, points in list_series(config, Path(folder)):
            sizes, costs, seconds = zip(*islice(points, 2 if config.quick else None), strict=True)
            line: Line = {"what": what, "by": by, "sizes": sizes, "costs": costs, "seconds": seconds}
            lines.append(line | {"power": power(sizes, seconds), "expected": power(sizes, costs)})
            span = f"{sizes[0]:,} to {sizes[-1]:,} {by}, {seconds[0]:.3g} to {seconds[-1]:.3g} s"
            print(f"{what}, {span}, {verdict(lines[-1])}", flush=True)
            yield lines[-1]
    as_shipped = not config.quick and config.dtype == "auto" and config.device == "auto"
    draw(lines, (measure.ROOT / "docs" if as_shipped else Path(config.out_dir)) / "growth.svg")


def power(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of log `values` over log `sizes`, by least squares."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope


def verdict(line: Line) -> str:
    """Say whether the power of a series is within 15 % of what is expected."""
    power, expected = line["power"], line["expected"]
    close = abs(power - expected) <= 0.15 * (expected or 1)
    return f"power {power:.2f}, expected {expected:.2f}: {'within' if close else 'NOT within'} 15 %"


def draw(lines: list[Line], path: Path) -> None:
    """Draw a panel for each series: its seconds as dots, and as a line what its costs let expect from the first."""
    from matplotlib.ticker import EngFormatter, LogLocator

    with measure.picture(path, 7.5) as figure:
        for i, line in enumerate(lines):
            axes = figure.add_subplot(2, 3, i + 1, title=f"{line['what']}\n{verdict(line)}")
            axes.set(xlabel=line["by"], ylabel="seconds", xscale="log", yscale="log", xticks=line["sizes"])
            axes.set_aspect("equal", "datalim")  # a line of power 1 rises by 45°
            axes.plot(line["sizes"], [line["seconds"][0] * cost / line["costs"][0] for cost in line["costs"]])
            axes.plot(line["sizes"], line["seconds"], "o")
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:g}")
        figure.legend(["expected", "measured"], loc="outside upper center", ncols=2, frameon=False)
