"""What safety costs, and whether the order of the data depends on the number of processes."""

import hashlib
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.measure import as_flags
from faults.campaign import Cases, Result, Workplace
from quill import checkpoint
from quill.cli import read_config_file
from quill.data.batches import Batches
from quill.data.token_files import open_dataset
from quill.errors import UserError
from quill.options import TrainConfig

MOST = 0.01  # of a run's time that its saves may take


def cost(place: Workplace) -> Cases:
    """Seconds and bytes of a save, and the share of a default run's time that its saves take."""
    yield Path(place.config.recipe).stem, partial(cost_case, place)


def cost_case(place: Workplace, folder: Path) -> Result:
    """Train the recipe, or with --quick its model on tiny data, and save and load its last checkpoint."""
    config = TrainConfig(**read_config_file(place.config.recipe, TrainConfig))
    options: dict[str, Any] = {"out_dir": folder, "data_dir": place.config.data_dir}
    if place.config.quick:
        options |= {"data_dir": place.folder / "data", "dataset": "prose", "max_iters": 4, "lr_decay_iters": 100}
    end = place.ask("train.py", [place.config.recipe, *as_flags(options)], limit=3600.0)
    if end["codes"] != [0]:
        raise UserError(end["err"])
    state, path = checkpoint.load(folder / "last.pt"), folder / "saved.pt"
    seconds = state["seconds"] * config.max_iters / state["step"]
    saves = 2 * -(-config.max_iters // config.eval_interval)  # last.pt, and at most as often best.pt
    state.pop("format")
    result = {"save s": timed(place, lambda: checkpoint.save(path, state)), "bytes": path.stat().st_size}
    result |= {"load s": timed(place, lambda: checkpoint.load(path)), "saves": saves, "run s": seconds}
    with patch.object(os, "fsync", lambda descriptor: None):
        result["save without fsync s"] = timed(place, lambda: checkpoint.save(path, state))
    result["torch.save s"] = timed(place, lambda: torch.save(state, path))
    result["load without checks s"] = timed(place, lambda: torch.load(path, weights_only=True))
    result["share"] = saves * result["save s"] / seconds
    return {**result, "problems": [f"saves take {result['share']:.2%} of a run"] if result["share"] > MOST else []}


def timed(place: Workplace, work: Callable[[], object]) -> float:
    """The median time of 20 calls, or with --quick of 3."""
    times = [time.perf_counter()]
    for _ in range(place.size(20, 3)):
        work()
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def order(place: Workplace) -> Cases:
    """The first million windows at 1, 2 and 4 ranks, of a stream and of documents."""
    for name in ("prose", "words"):
        yield name, partial(order_case, place, name, place.size(1_000_000, 1_000))


def order_case(place: Workplace, name: str, windows: int, folder: Path) -> Result:
    """Equal hashes of all windows, in the order of the steps and, in a step, of the ranks."""
    data, hashes = open_dataset(place.folder / "data", name), []
    shape: dict[str, Any] = {"rows": 40, "micro_rows": 10, "seed": 1337, "device": torch.device("cpu")}
    for ranks in (1, 2, 4):
        each = [Batches(data.train, data.tokenizer.bos, 16, **shape, rank=i, world_size=ranks) for i in range(ranks)]
        digest = hashlib.sha256()
        for step in range(windows // 40):
            for x, y, _ in (part for batches in each for part in batches.global_batch(step)[1]):
                digest.update(x.numpy().tobytes() + y.numpy().tobytes())
        hashes.append(digest.hexdigest()[:16])
    problems = [] if len(set(hashes)) == 1 else [f"hashes differ: {hashes}"]
    return {"windows": windows, f"hash of {name}": hashes[0], "problems": problems}
