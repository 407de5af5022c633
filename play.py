"""Watch a GPT learn, look inside and sample it, on a page in your browser. It prints the address of the page.

    python play.py                               # opens with a model that is trained already
    python play.py config/microgpt.py            # opens with a config, to train
    python play.py --out_dir=out/names           # opens with a run

The page lists all runs below the folder out. It needs two packages: pip install starlette uvicorn
"""

from __future__ import annotations

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

from importlib.util import find_spec
from pathlib import Path

from quill.cli import CONFIG_DIR, config_files, did_you_mean, read_args, run
from quill.errors import UserError
from quill.options import PlayConfig


def find_config(path: str) -> str:
    """Return the name of a config that ships with quill, such as config/names.py. Raise a UserError for another."""
    known = {(CONFIG_DIR.parent / name).resolve(): name for name in map(name_of, config_files())}
    for folder in (Path(), CONFIG_DIR.parent):
        if (folder / path).resolve() in known:
            return known[(folder / path).resolve()]
    raise UserError(f"{path}: not a config in config/, which the page lists{did_you_mean(path, known.values())}")


def name_of(path: Path) -> str:
    """Return the path of a file of quill's in its folder, such as config/names.py."""
    return path.relative_to(CONFIG_DIR.parent).as_posix()


def main(argv: list[str]) -> None:
    """Read the options, and serve the page until a signal arrives."""
    positional, flags = read_args(argv, PlayConfig, __doc__)
    config = PlayConfig(**flags)
    if len(positional) > 1 or (positional and config.out_dir):
        raise UserError(f"give one config file or --out_dir, not both: {' '.join(argv)}")
    selected_config = find_config(positional[0]) if positional else None
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"the page needs the package {package}: pip install starlette uvicorn")
    from quill.play.runs import Runs
    from quill.play.server import serve

    out_dir, root = Path(config.out_dir).absolute(), Path("out").absolute()
    if config.out_dir and root not in out_dir.parents:
        root = out_dir.parent
    runs, selected = Runs(root, config.data_dir), "bundled"
    if config.out_dir:
        selected = out_dir.relative_to(root).as_posix()
        runs.signature(selected)  # raises a UserError if there is no such run
    serve(config.port, runs, selected, selected_config)


if __name__ == "__main__":
    run(main)
