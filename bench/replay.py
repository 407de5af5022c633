"""Compare the losses of quill and nanoGPT from the same weights and batches."""

import statistics
import tempfile
from typing import Any

from bench.measure import Line, as_flags, process, program, read_metrics
from bench.shapes import SHAKESPEARE_10M
from quill.errors import UserError
from quill.options import BenchConfig


def replay(config: BenchConfig, shape: dict[str, Any] = SHAKESPEARE_10M) -> list[Line]:
    """Train 30 steps in float32 with train.py, then with nanoGPT's model and optimizer from our weights and batches."""
    if not config.peer:
        raise UserError("replay: give a checkout of nanoGPT to compare with, --peer=../nanoGPT")
    options = shape | {"dropout": 0.0, "gradient_accumulation_steps": 1, "dataset": "shakespeare_char"}
    options |= {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10, "max_iters": 30, "eval_interval": 5}
    options |= {"data_dir": config.data_dir, "device": config.device, "dtype": "float32", "compile": False}
    with tempfile.TemporaryDirectory() as folder:
        process(["train.py", *as_flags(options), f"--out_dir={folder}", "--eval_iters=1"])
        ours = [float(row["train_loss"]) for row in read_metrics(folder)]
    steps = program("replay_nanogpt", peer=config.peer, options=options)
    theirs = [statistics.mean(steps[i : i + 5]) for i in range(0, len(steps), 5)]
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(steps)} steps, loss {ours[0]:.4f} to {ours[-1]:.4f}: at most {difference:.2g} from the peer's")
    what = "train loss at 10.7M, means of 5 steps"
    return [{"what": what, "unit": "nats", "n": 1, "ours": ours, "peer": theirs, "max_abs_difference": difference}]
