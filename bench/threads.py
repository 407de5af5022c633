"""Compare the number of threads that quill chooses with one thread and with all, on a quiet and on a busy machine."""

import statistics
import subprocess
import sys
from contextlib import ExitStack

import torch

from bench.measure import Line, report, train
from quill.options import BenchConfig

CONFIGS = {"config/names.py": 120, "config/shakespeare_char_cpu.py": 120}  # path: steps


def threads(config: BenchConfig) -> list[Line]:
    """Measure tokens/s of training with --threads=auto; the peer is the faster of one thread and all.

    The three take turns. The machine is busy while a program spins on one core.
    """
    lines = []
    for busy in (False, True):
        for path, steps in CONFIGS.items():
            ours, peer = [], []
            with ExitStack() as stack:
                if busy:
                    spinning = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                    stack.callback(spinning.kill)
                for _ in range(config.pairs):
                    one, chosen, every = (speed(path, steps, config, n) for n in (1, "auto", torch.get_num_threads()))
                    print(f"one {one:,.0f}, auto {chosen:,.0f}, all {every:,.0f}", flush=True)
                    ours.append(chosen)
                    peer.append(max(one, every))
            what = f"{path}, {'busy' if busy else 'quiet'}, auto (peer: the better of 1 and all)"
            lines.append(report(what, "tokens/s", ours, peer))
    return lines


def speed(path: str, steps: int, config: BenchConfig, number: int | str) -> float:
    """Train for `steps` steps with `number` threads. → the median of metrics.csv's tokens per second"""
    options = {"threads": number, "max_iters": steps, "eval_interval": steps // 4, "final_samples": 0}
    _, rows = train(options | {"data_dir": config.data_dir}, path)
    return statistics.median(float(row["tokens_per_s"]) for row in rows[1:])
