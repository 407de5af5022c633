"""The speed figures, ours beside a peer's, in one run on one machine; and which of two configs is better.

    python -m bench train --peer=../nanoGPT         # training tokens/s at two shapes
    python -m bench loss --peer=../nanoGPT          # the laptop recipe, whole process, and its best loss
    python -m bench replay --peer=../nanoGPT        # whether a step's loss is nanoGPT's, from the same weights
    python -m bench generate --peer=../nanoGPT      # tokens/s of generation, with random weights
    python -m bench start                           # from the command to the first step, less `import torch`
    python -m bench prepare --peer=../nanoGPT       # 100 MB of text into tokens
    python -m bench ladder                          # config/ladder/, three seeds of each, and docs/ladder.svg
    python -m bench compare config/a.py config/b.py --seeds=5 --max_iters=500

Whole processes, ours and the peer's in turn, median and range; the peer is a checkout of nanoGPT, which stays outside.
Absolute times drift from hour to hour, ratios of neighbours in time do not. Each run is written to out/bench as JSON.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

from bench import peers
from bench.compare import compare
from bench.generation import generate
from bench.ladder import ladder
from bench.measure import hardware
from bench.replay import replay
from quill.cli import read_args, run
from quill.errors import UserError
from quill.files import replacing
from quill.machine import pick_machine
from quill.options import BenchConfig, TrainConfig

SPEED = {
    "train": peers.train,
    "loss": peers.loss,
    "replay": replay,
    "generate": generate,
    "start": peers.start,
    "prepare": peers.prepare,
}
EXPERIMENTS = {"ladder": ladder, "compare": compare}  # these take train.py's options too
ALIASES = {"curve": "replay"}  # names from before


def main(argv):
    names = ", ".join([*SPEED, *EXPERIMENTS])
    own_keys = {f"--{f.name}" for f in fields(BenchConfig)}
    own = [arg for arg in argv if arg.partition("=")[0] in own_keys | {"--help"} or not arg.startswith("--")]
    rest = [arg for arg in argv if arg not in own]
    positional, given = read_args(own, BenchConfig, __doc__)
    if not positional or positional[0] not in SPEED | EXPERIMENTS | ALIASES:
        raise UserError(f"give one of {names} (see --help)")
    name, *paths = positional
    name = ALIASES.get(name, name)
    config = BenchConfig(**given)
    # The commands run in quill's own folder, wherever this one was started.
    folders = {key: str(Path(getattr(config, key)).resolve()) for key in ("data_dir", "out_dir")}
    config = replace(config, **folders, peer=config.peer and str(Path(config.peer).resolve()))
    paths = [str(Path(path).resolve()) if Path(path).is_file() else path for path in paths]
    needed = (Path(config.peer) / "model.py", Path(config.peer) / "train.py")
    if config.peer and (missing := [path.name for path in needed if not path.is_file()]):
        raise UserError(f"--peer={config.peer}: there is no {missing[0]}; give the folder of a nanoGPT checkout")
    if name == "replay" and (given.keys() & {"pairs", "dtype"}):
        raise UserError("replay is one run of each, in float32: it takes no --pairs and no --dtype")
    pick_machine(config)  # a device or dtype that is not there shows before the first run
    if name == "compare" and len(paths) != 2:
        raise UserError("compare takes two config files, as in python -m bench compare config/a.py config/b.py")
    if name in SPEED and paths:
        raise UserError(f"{paths[0]}: python -m bench {name} takes options only (see --help)")
    if name in EXPERIMENTS:
        training = read_args(rest, TrainConfig, __doc__)[1]
        if taken := training.keys() & {"seed", "init_from", "overwrite", "dry_run", "eval_only"}:
            raise UserError(
                f"--{min(taken)}: not with python -m bench {name}, which sets its runs' seeds and starts itself"
            )
        lines = EXPERIMENTS[name](paths, training, config)
    elif rest:
        raise UserError(f"{rest[0]}: not an option of python -m bench {name} (see --help)")
    else:
        lines = SPEED[name](config)
    report = {"command": f"python -m bench {' '.join(argv)}", "hardware": hardware(config), "results": lines}
    path = Path(config.out_dir) / f"{name}.json"
    with replacing(path) as (file,):
        file.write((json.dumps(report, indent=2, default=str) + "\n").encode())
    print(f"{report['hardware']}; written to {path}")


if __name__ == "__main__":
    run(main)
