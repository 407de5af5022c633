"""Measure the speed of quill and of nanoGPT, or find out which of two configs is better.

    python -m bench train --peer=../nanoGPT         # tokens/s of training, at two shapes
    python -m bench loss --peer=../nanoGPT          # nanoGPT's laptop recipe: time of the whole process, best loss
    python -m bench replay --peer=../nanoGPT        # compare the losses of both from the same weights and batches
    python -m bench generate --peer=../nanoGPT      # tokens/s of generation, with random weights
    python -m bench start                           # time from the command to the first step, without `import torch`
    python -m bench counts                          # the loss of a die, of counted characters and of counted pairs
    python -m bench ladder                          # train config/ladder, 3 seeds each, and draw docs/ladder.svg
    python -m bench growth                          # time against size of text, model, context …; docs/growth.svg
    python -m bench compare config/a.py config/b.py --seeds=5 --max_iters=500
    python -m bench faults                          # break quill on purpose: hours; kill, damage … for some of it
    python -m bench faults kill:adamw-3             # repeat one case

The peer is a checkout of nanoGPT, which is not part of quill. Runs of quill and of the peer alternate, each in a new
process. A ratio compares a run with the one next to it: absolute times drift from hour to hour, ratios of such runs
drift less. A bench prints medians and ranges, and writes all figures to out/bench as JSON.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import sys
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

from bench import peers
from bench.experiments import compare, counts, ladder
from bench.growth import growth
from bench.measure import ROOT, Line, hardware
from quill.cli import read_args, run
from quill.errors import UserError, check
from quill.files import replacing
from quill.machine import pick_machine
from quill.options import BenchConfig, TrainConfig

SPEED = {"train": peers.train, "loss": peers.recipe, "generate": peers.generate, "start": peers.start}
SPEED |= {"counts": counts, "growth": growth}
EXPERIMENTS = {"ladder": ladder, "compare": compare}  # these take train.py's options too
CHECKS = ["replay", "faults"]  # tests, which lie in tests/
NAMES = [*SPEED, *EXPERIMENTS, *CHECKS]
FIXED = {"seed", "init_from", "overwrite", "dry_run", "eval_only"}  # options that an experiment sets for its runs


def main(argv: list[str]) -> int:
    """Run one bench, print its results and write them to `--out_dir`. → exit code, 1 if faults were found"""
    own, rest = split_flags(argv)
    positional, given = read_args(own, BenchConfig, __doc__)
    name, paths = read_command(positional)
    config = with_full_paths(BenchConfig(**given))
    machine = pick_machine(config)  # so that a missing device or dtype is reported before the first run
    if name != "generate" and machine.device.type == "cpu" and config.dtype in ("float16", "int8"):
        raise UserError(f"--dtype={config.dtype}: on a CPU, is for python -m bench generate")
    if name in EXPERIMENTS:
        options = read_args(rest, TrainConfig, __doc__)[1]
        if taken := options.keys() & FIXED:
            raise UserError(f"--{min(taken)}: not with python -m bench {name}, which decides this for its runs")
        lines = EXPERIMENTS[name](paths, options, config)
    elif rest:
        raise UserError(f"{rest[0]}: not an option of python -m bench {name} (see --help)")
    elif name in CHECKS:
        sys.path.insert(0, str(ROOT / "tests"))
        lines = getattr(import_module(name), name)(paths, config)
    else:
        lines = SPEED[name](config)
    write_report(name, argv, lines, config)
    return int(any(line.get("problems") for line in lines))


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate the bench's own flags from the others, which are train.py's. → own, rest"""
    own_keys = {f"--{f.name}" for f in fields(BenchConfig)} | {"--help"}
    own = [arg for arg in argv if arg.partition("=")[0] in own_keys or not arg.startswith("--")]
    return own, [arg for arg in argv if arg not in own]


def read_command(positional: list[str]) -> tuple[str, list[str]]:
    """Read the bench's name and its config files, whose paths become absolute as in `with_full_paths`. → both"""
    name, *paths = positional or [""]
    check(name in NAMES, f"give one of {', '.join(NAMES)} (see --help)")
    if name in SPEED and paths:
        raise UserError(f"{paths[0]}: python -m bench {name} takes options only (see --help)")
    if name == "compare" and len(paths) != 2:
        raise UserError("compare takes two config files, as in python -m bench compare config/a.py config/b.py")
    return name, [str(Path(path).resolve()) if Path(path).is_file() else path for path in paths]


def with_full_paths(config: BenchConfig) -> BenchConfig:
    """Make the folders absolute, because the runs start in quill's folder, wherever the bench was started.

    Raise a UserError unless `--peer` is empty or the folder of a nanoGPT checkout.
    """
    folders = {key: str(Path(getattr(config, key)).resolve()) for key in ("data_dir", "out_dir")}
    config = replace(config, **folders, peer=config.peer and str(Path(config.peer).resolve()))
    for file in ("model.py", "train.py") if config.peer else ():
        if not (Path(config.peer) / file).is_file():
            raise UserError(f"--peer={config.peer}: there is no {file}; give the folder of a nanoGPT checkout")
    return config


def write_report(name: str, argv: list[str], lines: list[Line], config: BenchConfig) -> None:
    """Write the results with the command and the hardware to `--out_dir`/`name`.json."""
    report = {"command": f"python -m bench {' '.join(argv)}", "hardware": hardware(config), "results": lines}
    path = Path(config.out_dir) / f"{name}.json"
    with replacing(path) as (file,):
        file.write((json.dumps(report, indent=2, default=str) + "\n").encode())
    print(f"{report['hardware']}; written to {path}")


if __name__ == "__main__":
    run(main)
