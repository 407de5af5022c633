"""Measure the speed of quill and of nanoGPT, or find out which of several configs is best.

    python -m bench train --peer=../nanoGPT         # tokens/s of training, at two shapes; on a GPU, GPT-2's too
    python -m bench xl                              # tokens/s of training GPT-2 XL, on a GPU with 80 GB
    python -m bench loss --peer=../nanoGPT          # nanoGPT's laptop recipe: time of the whole process, best loss
    python -m bench replay --peer=../nanoGPT        # compare the losses of both from the same weights and batches
    python -m bench generate --peer=../nanoGPT      # tokens/s of generation, with random weights
    python -m bench start                           # time from the command to the first step, without `import torch`
    python -m bench counts                          # the loss of a die, of counted characters and of counted pairs
    python -m bench ladder                          # train config/ladder, 3 seeds each, and draw docs/ladder.svg
    python -m bench growth                          # time against size of text, model, context …; docs/growth.svg
    python -m bench compare config/a.py config/b.py --seeds=5 --max_iters=500
    python -m bench compare variants.txt --jobs=4   # a line is what follows `python train.py`; 4 runs at a time
    python -m bench faults                          # break quill on purpose: hours; kill, damage … for some of it
    python -m bench faults kill:adamw-3             # repeat one case

The peer is a checkout of nanoGPT, which is not part of quill. Runs of quill and of the peer alternate, each in a new
process. A ratio compares a run with the one next to it: absolute times drift from hour to hour, ratios of such runs
drift less. A bench prints medians and ranges at its end, and writes each figure to out/bench, as JSON, when it has it.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import signal
import sys
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bench import peers
from bench.experiments import compare, counts, ladder, refuse_fixed
from bench.growth import growth
from bench.measure import ROOT, describe, full_path, hardware
from quill.cli import read_args, run
from quill.errors import UserError, check
from quill.files import folder_lock, replacing
from quill.machine import pick_machine
from quill.options import BenchConfig, TrainConfig

BENCHES = {"train": peers.train, "xl": peers.xl, "loss": peers.loss, "generate": peers.generate, "start": peers.start}
BENCHES |= {"counts": counts, "growth": growth, "ladder": ladder, "compare": compare}
CHECKS = ["replay", "faults"]  # tests, which lie in tests/
WITH_PATHS, WITH_OPTIONS = ("ladder", "compare", *CHECKS), ("train", "xl", "loss", "ladder", "compare")  # of train.py


def main(argv: list[str]) -> int:
    """Run one bench, print its results, and write them to `--out_dir` after each. → exit code, 1 if it found faults"""
    own_keys = {f"--{f.name}" for f in fields(BenchConfig)} | {"--help"}
    own = [arg for arg in argv if arg.partition("=")[0] in own_keys or not arg.startswith("--")]
    rest = [arg for arg in argv if arg not in own]  # train.py's
    positional, values = read_args(own, BenchConfig, __doc__)
    name, *paths = positional or [""]
    check(name in (*BENCHES, *CHECKS), f"give one of {', '.join((*BENCHES, *CHECKS))} (see --help)")
    for argument in [*rest * (name not in WITH_OPTIONS), *paths * (name not in WITH_PATHS)]:
        raise UserError(f"{argument}: not an option of python -m bench {name} (see --help)")
    config, given = with_full_paths(BenchConfig(**values)), read_args(rest, TrainConfig, __doc__)[1]
    refuse_fixed(given, name)
    if name in ("ladder", "growth") and not find_spec("matplotlib"):
        raise UserError(f"python -m bench {name} needs a package: pip install matplotlib")
    machine = pick_machine(config)  # so that a missing device or dtype is reported before the first run
    if name != "generate" and machine.device.type == "cpu" and config.dtype in ("float16", "int8"):
        raise UserError(f"--dtype={config.dtype}: on a CPU, only python -m bench generate takes it")
    with folder_lock(Path(config.out_dir)):
        pass  # so that a folder that can't be written to is reported before the first run
    sys.path.insert(0, str(ROOT / "tests"))
    bench = BENCHES.get(name) or getattr(import_module(name), name)
    arguments = [list(map(full_path, paths))] * (name in WITH_PATHS) + [given] * (name in WITH_OPTIONS)
    report = {"command": f"python -m bench {' '.join(argv)}", "hardware": hardware(config)}
    path, lines = Path(config.out_dir) / f"{name}.json", {}
    try:
        for line in bench(*arguments, config):
            lines[id(line)] = line  # a line comes again when it has another figure
            with replacing(path) as (file,):
                text = json.dumps(report | {"results": list(lines.values())}, indent=2, default=str)
                file.write(f"{text}\n".encode())
    finally:
        for line in (line for line in lines.values() if "unit" in line):
            print(describe(line, config.target))
        if lines:
            print(f"{report['hardware']}; written to {path}")
    return int(any(line.get("problems") for line in lines.values()))


def with_full_paths(config: BenchConfig) -> BenchConfig:
    """Make the folders absolute, as runs start in quill's folder. Raise a UserError if `--peer` is not nanoGPT's."""
    folders = {key: str(Path(getattr(config, key)).resolve()) for key in ("data_dir", "out_dir")}
    config = replace(config, **folders, peer=config.peer and str(Path(config.peer).resolve()))
    for file in ("model.py", "train.py") if config.peer else ():
        is_there = (Path(config.peer) / file).is_file()
        check(is_there, f"--peer={config.peer}: there is no {file}; give the folder of a nanoGPT checkout")
    return config


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the run that is being measured ends too
    run(main)
