"""Serve a page that trains a GPT, shows what is inside it and samples from it, and print the page's address.

    python play.py                               # opens with a model that is trained already
    python play.py config/microgpt.py            # opens with a config, to train
    python play.py --out_dir=out/names           # opens with a run

The page lists the runs below the folder out. It needs two packages: pip install starlette uvicorn
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import os
import socket
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from quill.cli import CONFIG_DIR, config_files, did_you_mean, read_args, run
from quill.errors import UserError
from quill.options import PlayConfig


def open_socket(port: int) -> socket.socket:
    """Listen to a port of 127.0.0.1; 0 is any. Raise a UserError that names the next free one if it is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        problem = f"--port={port}: {os.strerror(error.errno or 0)}"
    for number in range(port + 1, 65536):
        with suppress(OSError), socket.create_server(("127.0.0.1", number)):
            raise UserError(f"{problem}; --port={number} is free")
    raise UserError(problem)


def find_run(out_dir: str) -> tuple[Path, str]:
    """Return the folder whose runs are listed, out or else the parent of `out_dir`, and the name of the run in it."""
    root, folder = Path("out").absolute(), Path(os.path.abspath(out_dir))
    root = root if folder.is_relative_to(root) else folder.parent
    return root, folder.relative_to(root).as_posix()


def main(argv: list[str]) -> None:
    """Read the options, and serve the page until a signal arrives."""
    configs, flags = read_args(argv, PlayConfig, __doc__)
    config = PlayConfig(**flags)
    if len(configs) + bool(config.out_dir) > 1:
        raise UserError(f"give one config, or --out_dir, not {' '.join(argv)}")
    selected = Path(configs[0]).as_posix() if configs else None
    names = [path.relative_to(CONFIG_DIR.parent).as_posix() for path in config_files()]
    if selected and selected not in names:
        raise UserError(f"{selected}: not one of the configs in config/{did_you_mean(selected, names)}")
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise UserError("the page needs two packages: pip install starlette uvicorn")
    with open_socket(config.port) as listening:  # before torch is imported, which takes seconds
        from quill.data.token_files import prepare_if_missing
        from quill.play.runs import Runs
        from quill.play.server import make_server

        root, name = find_run(config.out_dir) if config.out_dir else (Path("out"), "bundled")
        runs = Runs(root, config.data_dir)
        runs.run(name)  # raises a UserError if there is no such run
        with suppress(UserError):  # without its dataset, the bundled model's page has fewer lines
            prepare_if_missing("names", config.data_dir)
        server, address = make_server(listening, runs, name, selected)
        print(address, flush=True)
        server.run([listening])


if __name__ == "__main__":
    run(main)
