"""The folder of a run, out_dir: one process at a time, one run, and nothing in it is replaced without --overwrite=True.

The folder is locked before it is looked at, and stays locked until the process ends, so that what a start has seen is
still true when it deletes or writes. The file .run has the identity of the run that took the folder, which lets a run
that was killed before its first checkpoint start again.
"""

import hashlib
import json
from pathlib import Path

from quill.errors import UserError
from quill.files import read_end, replacing
from quill.options import RunConfig, TrainConfig

CHECKPOINTS = ("last.pt", "best.pt")  # the first one that exists is resumed
WRITTEN_BY_OBSERVERS = ("tensorboard/events.out.tfevents.*", "page/state.json", "page/live.pt", "page/step-*.pt")
# Options that may differ between two starts of one run.
VOLATILE = ("init_from", "overwrite", "device", "threads", "shard", "activation_checkpointing")
PER_NODE = ("data_dir", "out_dir", "device", "threads")  # options that may differ between the nodes of one start


class RunFolder:
    """What out_dir holds of a run, and how a new run takes it."""

    def __init__(self, out_dir: str):
        self.path = Path(out_dir)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of a run that exist, the one to resume from first.

        Both have a whole state. If a run is killed during its first save, only best.pt exists.
        """
        return [self.path / name for name in CHECKPOINTS if (self.path / name).is_file()]

    def find_run(self) -> list[Path]:
        """Everything in the folder that belongs to a run, quill's or nanoGPT's."""
        files = [self.path / name for name in (*CHECKPOINTS, "ckpt.pt", "metrics.csv")]
        found = [path for path in files if path.is_symlink() or path.exists()]
        return found + [path for pattern in WRITTEN_BY_OBSERVERS for path in sorted(self.path.glob(pattern))]

    def refuse_another_run(self, config: TrainConfig) -> None:
        """Raise a UserError if the folder has a run that a new run with the options `config` would replace.

        The run's own unfinished start, which has no checkpoint yet, may be replaced.
        """
        found = self.find_run()
        if not found or config.overwrite:
            return
        resume = "resume it with --init_from=resume, " if self.checkpoints() else ""
        own = read_end(self.path / ".run").decode(errors="replace").strip() == identity(config)
        if resume or self.path / "ckpt.pt" in found or not own:
            remedy = f"{resume}choose another --out_dir, or replace it with --overwrite=True"
            raise UserError(f"{found[0]} is another run's: {remedy}")

    def clear(self, but: str = "") -> None:
        """Delete all that belongs to a run of quill's, but the file named `but`."""
        for path in self.find_run():
            if path.name not in (but, "ckpt.pt"):  # nanoGPT's, which quill never writes
                path.unlink()

    def take(self, config: TrainConfig) -> None:
        """Delete the files of another run, and write this run's identity. A resumed run deletes nothing."""
        if config.init_from != "resume":
            self.clear()
        with replacing(self.path / ".run") as (file,):
            file.write(f"{identity(config)}\n".encode())


def identity(config: TrainConfig) -> str:
    """Return a digest of the options that make a run what it is."""
    options = {key: value for key, value in vars(config).items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def what_is_kept(out_dir: str | Path) -> str:
    """Return the end of an error message: which checkpoint of the run in `out_dir` remains, if any."""
    held = RunFolder(str(out_dir)).checkpoints()
    return f"{held[0]} is kept" if held else "no checkpoint had been saved"


def folder_of(given: dict[str, object]) -> RunFolder:
    """Return the folder that the incomplete options `given` name. Raise a UserError if its name is not valid."""
    known = ("out_dir", "data_dir", "dataset")
    return RunFolder(RunConfig(**{key: given[key] for key in known if key in given}).out_dir)  # pyright: ignore
