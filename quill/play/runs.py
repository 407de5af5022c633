"""The runs that the page lists, and the processes of train.py that it starts, pauses and steps.

A run is a folder below out_dir. Its files are read without trust: a folder may come from anywhere. The name of a run is
the folder's path below out_dir. The files in the run's folder `page` are written by quill/observers/page.py, except
control, command.json and log.txt, which are written here.

A process is found by the lock of its run's folder, so that a server that starts later finds it too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from quill.cli import CONFIG_DIR, coerce, config_files, option_types, read_config_file
from quill.data.corpora import CORPORA
from quill.data.token_files import open_dataset
from quill.errors import UserError
from quill.files import open_without_links, read_small, replacing
from quill.observers.page import CURVE, read_state
from quill.options import TrainConfig
from quill.scoring import count_losses

ROOT = CONFIG_DIR.parent
TRAIN, PREPARE = ROOT / "train.py", ROOT / "prepare.py"
BUNDLED = Path(__file__).parent / "microgpt.pt"
OWN = {"out_dir", "data_dir", "init_from", "overwrite", "page", "eval_only", "dry_run", "vocab_size"}  # not the page's
MOST_FOLDERS, MOST_RUNS = 5000, 500  # looked into, listed
LOG_LINES, PREPARING, STOPPING = 100, 60.0, 5.0  # lines; seconds


class UnknownRun(UserError):
    """There is no run of this name."""


class Runs:
    """The runs below `out_dir`, and those that the page starts, which are in its folder `play`."""

    def __init__(self, out_dir: str | Path, data_dir: str | Path):
        self.out_dir, self.data_dir = Path(out_dir), Path(data_dir)
        self.processes: dict[Path, subprocess.Popen[Any]] = {}  # those that this object has started
        self.cache: dict[tuple[Path, Callable], tuple[Any, Any]] = {}

    # ------------------------------------------------------------ finding

    def names(self) -> list[str]:
        """Return the names of the runs, the newest first. `bundled` is the model that ships with quill."""
        found = sorted(self._folders(), key=_changed, reverse=True)[:MOST_RUNS]
        return ["bundled"] * BUNDLED.is_file() + [folder.relative_to(self.out_dir).as_posix() for folder in found]

    def _folders(self) -> Iterator[Path]:
        """Yield the folders of runs, at most three levels below out_dir. Links are not followed."""
        level = [self.out_dir]
        for _ in range(4):
            level, upper = [], level
            for folder in upper:
                if _is_run(folder):
                    yield folder
                with suppress(OSError), os.scandir(folder) as entries:
                    found = itertools.islice(entries, MOST_FOLDERS - len(level))
                    level += [folder / e.name for e in found if _is_name(e.name) and e.is_dir(follow_symlinks=False)]

    def _folder(self, name: str) -> Path:
        """Return the folder of the run `name`. Raise UnknownRun for all that `names` can't return."""
        folder, parts = self.out_dir, [] if name == "." else name.split("/")
        for part in parts:
            folder = folder / part
            if len(parts) > 3 or not _is_name(part) or folder.is_symlink():
                raise UnknownRun(f"there is no run {name[:80]!r}")
        if _is_run(folder):
            return folder
        raise UnknownRun(f"there is no run {name[:80]!r}")

    def weights(self, name: str, step: int | None = None) -> Path:
        """Return the checkpoint of a saved step, or with None the newest weights of a run. Raise UnknownRun if none."""
        if name == "bundled":
            paths = [BUNDLED] if step is None else []
        elif step is None:
            folder = self._folder(name)
            files = [folder / file for file in ("page/live.pt", "last.pt", "best.pt")]
            paths = sorted(files, key=_changed, reverse=True)
        else:
            paths = [self._folder(name) / "page" / f"step-{step:06}.pt"]
        for path in paths:
            if path.is_file():
                return path
        raise UnknownRun(f"{name} has no weights of step {step}" if step is not None else f"{name} has no weights yet")

    # ------------------------------------------------------------ describing

    def list(self) -> list[dict[str, Any]]:
        """Return name, title, status, step, max_iters and val_loss of each run."""
        keys, runs = ("name", "title", "status", "step", "max_iters", "val_loss"), []
        for name in self.names():
            with suppress(UnknownRun):  # deleted meanwhile
                runs.append({key: self._outline(name)[key] for key in keys})
        return runs

    def run(self, name: str) -> dict[str, Any]:
        """Return the run object. A file that is missing, damaged or a link counts as absent."""
        run = self._outline(name)
        log = b"" if name == "bundled" else read_small(self._folder(name) / "page" / "log.txt", tail=2**16) or b""
        lines = re.split(r"[\r\n]+", log.decode(errors="replace"))
        dataset = str(run["options"].get("dataset", ""))
        facts = {"documents": None, "train_tokens": None, "baselines": None}
        if dataset in self.datasets():
            facts = self._cached(self.data_dir / dataset / "meta.json", _count) or facts
        return run | facts | {"log": "\n".join(lines[-LOG_LINES:])}

    def _outline(self, name: str) -> dict[str, Any]:
        """Return the run object without its log and without what its dataset is."""
        if name == "bundled" and BUNDLED.is_file():
            saved = self._cached(BUNDLED, _read_checkpoint) or {}
            return _empty(name, "microgpt, trained") | {"status": "bundled", "max_iters": saved.get("step")} | saved
        folder = self._folder(name)
        run = _empty(name, name) | {"options": (self._command(folder) or {}).get("resolved", {})}
        with suppress(UnknownRun):
            run |= self._cached(self.weights(name), _read_checkpoint) or {}
        run["max_iters"] = run["options"].get("max_iters")
        run["evaluations"] = self._cached(folder / "metrics.csv", _read_metrics) or []
        if run["evaluations"]:
            run["step"] = max(run["step"], run["evaluations"][-1]["step"])
        state = self._cached(folder / "page" / "state.json", read_state)
        run |= {key: value for key, value in (state or {}).items() if key in run}
        run["snapshots"] = [step for step in run["snapshots"] if (folder / "page" / f"step-{step:06}.pt").is_file()]
        if run["evaluations"]:
            run["val_loss"] = run["evaluations"][-1]["val_loss"]
        if pid := self._pid(folder):
            waits = state is not None and state["status"] == "waiting" and state["pid"] == pid
            return run | {"status": "waiting" if waits else "running"}
        is_over = run["status"] == "finished" or (run["max_iters"] or 2**63) <= run["step"]
        return run | {"status": "finished" if is_over else "paused"}

    def signature(self, name: str) -> tuple[Any, ...]:
        """Return a value that changes when the run object does: see /api/events."""
        if name == "bundled":
            return ()
        folder = self._folder(name)
        files = (folder / "page" / "state.json", folder / "page" / "log.txt", folder / "metrics.csv")
        return (*map(_stamp, files), self._pid(folder))

    def datasets(self) -> list[str]:
        """Return the names of the known corpora, and of the folders in data_dir that are prepared."""
        prepared = {path.parent.name for path in self.data_dir.glob("*/meta.json") if _is_name(path.parent.name)}
        return [*CORPORA, *sorted(prepared - set(CORPORA))]

    def _cached(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """`read(path)`, which is called again when the file has changed."""
        stamp = _stamp(path)
        known, value = self.cache.get((path, read), (None, None))
        if stamp is not None and stamp != known:
            if len(self.cache) > 4 * MOST_RUNS:
                self.cache.clear()
            value = read(path)
            self.cache[path, read] = stamp, value
        return value if stamp is not None else None

    # ------------------------------------------------------------ processes

    def start(self, config=None, run=None, options=None, text=None, documents="none", paused=False) -> str:
        """Start a run with the options of a config or of another run, changed by `options`. → its name

        text: a text that becomes the dataset; documents: as in prepare.py. paused: it waits before its first step.
        Raise a UserError if an option is wrong, or the text can't be prepared.
        """
        if (config is None) == (run is None):
            raise UserError("name either a config or a run to start from")
        given = options or {}
        if run is not None:
            theirs = self._outline(run)["options"].items()
            given = {k: value for k, value in theirs if value != getattr(TrainConfig, k) and k not in OWN} | given
        self._resolve(config, given)
        if text is not None:
            given = given | {"dataset": self._prepare(text, documents)}
        stem = Path(config).stem if config else re.sub(r"-\d+$", "", Path(str(run)).name)
        folder = _new_folder(self.out_dir / "play", stem or "run")
        _write(folder / "page" / "command.json", json.dumps({"config": config, "options": given}))
        if paused:
            _write(folder / "page" / "control", "0")
        self._launch(folder)
        return folder.relative_to(self.out_dir).as_posix()

    def control(self, name: str, action: str) -> None:
        """Let a run train, pause it, or let it take one step and wait. The process is started if there is none."""
        if action not in ("train", "pause", "step"):
            raise UserError(f"the action is train, pause or step, not {action!r:.40}")
        if name == "bundled":
            raise UserError("the bundled model is trained; start a run of config/microgpt.py")
        folder = self._folder(name)
        pid, path = self._pid(folder), folder / "page" / "control"
        state = self._cached(folder / "page" / "state.json", read_state)
        if action == "pause":
            self._stop(folder, pid, state)
            return
        if action == "step":
            step = state["step"] if state is not None and state["pid"] == pid else self._saved_step(folder)
            _write(path, str(step + 1))
        else:
            with suppress(OSError):
                path.unlink()
        if not pid:
            self._launch(folder)

    def _pid(self, folder: Path) -> int:
        """Return the process that trains in `folder`, 0 if there is none."""
        process = self.processes.get(folder)
        return process.pid if process and process.returncode is None else lock_holder(folder)

    def _stop(self, folder: Path, pid: int, state: dict[str, Any] | None) -> None:
        """Send SIGTERM to the process, if it was started here or is the one in state.json, and wait for its end."""
        process = self.processes.get(folder)
        if process and process.returncode is None:
            process.terminate()
        elif pid and state is not None and state["pid"] == pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        elif pid:
            raise UserError(f"{folder}: another process, which the page did not start, works there")
        end = time.monotonic() + STOPPING
        while self._pid(folder) and time.monotonic() < end:
            time.sleep(0.02)

    def _saved_step(self, folder: Path) -> int:
        """Return the step that a resumed run goes on from."""
        found = [self._cached(folder / name, _read_checkpoint) for name in ("last.pt", "best.pt")]
        return next((saved["step"] for saved in found if saved), 0)

    def _launch(self, folder: Path) -> None:
        """Start train.py in `folder`, or go on with its run. It outlives this process; a thread takes its exit code."""
        command, arguments = self._command(folder), ["--init_from=resume"]
        if command is not None:
            flags = (f"--{key}={'' if value is None else value}" for key, value in command["options"].items())
            arguments = [*filter(None, [command["config"]]), *flags, "--init_from=auto"]
        arguments += [f"--out_dir={folder}", f"--data_dir={self.data_dir}", "--page=True"]
        path, command = folder / "page" / "log.txt", [sys.executable, str(TRAIN), *arguments]
        try:
            path.parent.mkdir(exist_ok=True)
            with open(open_without_links(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                self.processes[folder] = subprocess.Popen(command, start_new_session=True, **streams)
        except OSError as error:
            raise UserError(f"can't start train.py with the log {path}: {error.strerror}") from None
        threading.Thread(target=self.processes[folder].wait, daemon=True).start()

    def _command(self, folder: Path) -> dict[str, Any] | None:
        """Read command.json. None if there is none, or if the page could not have started it."""
        return self._cached(folder / "page" / "command.json", self._read_command)

    def _read_command(self, path: Path) -> dict[str, Any] | None:
        try:
            command = json.loads(read_small(path) or b"")
            config, options = command["config"], dict(command["options"])
            return {"config": config, "options": options, "resolved": self._resolve(config, options)}
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            return None

    def _resolve(self, config: str | None, options: dict[str, Any]) -> dict[str, Any]:
        """Check the options of a start. → all of TrainConfig's. Raise a UserError if one is wrong or not the page's."""
        if config is not None and ROOT / config not in config_files():
            raise UserError(f"there is no config {config!r:.80}")
        kinds = option_types(TrainConfig)
        for key in options:
            if key not in kinds or key in OWN:
                raise UserError(f"{key!r:.80} is not an option that the page can set")
        if "dataset" in options and options["dataset"] not in self.datasets():
            raise UserError(f"there is no dataset {options['dataset']!r:.80}")
        values = read_config_file(ROOT / config, TrainConfig) if config else {}
        values |= {key: coerce(value, kinds[key], "", key) for key, value in options.items()}
        return asdict(TrainConfig(**{key: value for key, value in values.items() if key not in OWN}))

    def _prepare(self, text: str, documents: str) -> str:
        """Make a dataset of a text with prepare.py. → its name. Raise a UserError with the line that it prints."""
        if documents not in ("none", "lines"):
            raise UserError(f"documents is none or lines, not {documents!r:.40}")
        folder = _new_folder(self.data_dir, "play")
        arguments = [f"--dataset={folder.name}", f"--data_dir={self.data_dir}", f"--documents={documents}"]
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "text.txt"
            source.write_bytes(text.encode(errors="replace"))
            command = [sys.executable, str(PREPARE), f"--input={source}", *arguments]
            try:
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=PREPARING)
                return folder.name
            except subprocess.TimeoutExpired:
                problem = f"it took more than {PREPARING:.0f} s to prepare the text"
            except subprocess.CalledProcessError as error:
                lines = error.stderr.decode(errors="replace").strip().splitlines() or ["prepare.py failed"]
                problem = lines[-1].removeprefix("prepare.py: ").replace(str(source), "the text")
        with suppress(OSError):
            folder.rmdir()
        raise UserError(problem)


# ---------------------------------------------------------------- files


def lock_holder(folder: Path) -> int:
    """Return the process that has locked `folder`, without locking it; 0 if none has, -1 if it is not known."""
    try:
        import fcntl

        descriptor = open_without_links(folder / ".lock", os.O_RDONLY | os.O_NONBLOCK)
    except (ImportError, OSError):  # Windows; no lock
        return 0
    try:  # struct flock
        if sys.platform == "darwin":
            asked = struct.pack("qqihh", 0, 0, 0, fcntl.F_WRLCK, 0)
            _, _, pid, kind, _ = struct.unpack("qqihh", fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        else:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi", fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else pid or -1
    except OSError:  # a file system without locks
        return 0
    finally:
        os.close(descriptor)


def _is_name(part: str) -> bool:
    """Whether `part` may be a folder in the name of a run or a dataset."""
    return (
        part.isprintable()
        and part[0:1] != "."
        and not set(part) & set('/\\:"')
        and 0 < len(part) <= 255
        and part != "page"
    )


def _is_run(folder: Path) -> bool:
    files = ("last.pt", "best.pt", "metrics.csv", "page/state.json", "page/command.json")
    return any((folder / file).is_file() for file in files)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced or grows; None if it is not a regular file."""
    try:
        info = path.lstat()
    except (OSError, ValueError):
        return None
    return (info.st_mtime_ns, info.st_size) if stat.S_ISREG(info.st_mode) else None


def _changed(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0


def _write(path: Path, text: str) -> None:
    with replacing(path) as (file,):
        file.write(text.encode())


def _new_folder(parent: Path, stem: str) -> Path:
    """Make the first folder `stem`-1, `stem`-2, … in `parent` that does not exist."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            with suppress(FileExistsError):
                (parent / f"{stem}-{number}").mkdir()
                return parent / f"{stem}-{number}"
    except OSError as error:
        raise UserError(f"can't make a folder in {parent}: {error.strerror}") from None
    raise AssertionError("there is a next number")


def _empty(name: str, title: str) -> dict[str, Any]:
    """The run object of a run without any file."""
    run: dict[str, Any] = {"name": name, "title": title, "status": "paused", "step": 0, "max_iters": None}
    run |= {"val_loss": None, "options": {}, "parameters": None, "vocab_size": None}
    run |= {"curve": {key: [] for key in CURVE}, "evaluations": [], "samples": [], "snapshots": []}
    return run | {
        "weights_step": None,
        "note": "",
        "log": "",
        "documents": None,
        "train_tokens": None,
        "baselines": None,
    }


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations in metrics.csv. Rows that are damaged are left out."""
    lines = (read_small(path) or b"").decode(errors="replace").splitlines() or [""]
    rows, names = [], lines[0].split(",")
    for line in lines[1:]:
        with suppress(ValueError, KeyError):
            row = dict(zip(names, line.split(","), strict=True))
            values = {key: float(row[key]) for key in ("train_loss", "val_loss", "tokens_per_s", "seconds")}
            if all(map(math.isfinite, values.values())):
                rows.append({"step": int(row["step"])} | values)
    return rows


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The options, the step and the sizes of a checkpoint, without reading its weights. None if it is damaged."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        known = {f.name for f in fields(TrainConfig)}
        options = asdict(TrainConfig(**{key: value for key, value in saved["config"].items() if key in known}))
        sizes = {weight.data_ptr(): weight.numel() for weight in saved["model"].values()}  # tied weights once
        counts = {"parameters": sum(sizes.values()), "vocab_size": int(saved["vocab_size"])}
        return {"options": options, "step": int(saved["step"]), "val_loss": float(saved["best_val_loss"])} | counts
    except Exception:  # a damaged pickle can fail in any way
        return None


def _count(path: Path) -> dict[str, Any] | None:
    """The numbers of documents and of training tokens of the dataset with this meta.json, and its baselines."""
    try:
        data = open_dataset(path.parent.parent, path.parent.name)
    except UserError:
        return None
    bos, V = data.tokenizer.bos, data.tokenizer.vocab_size
    documents = None if bos is None else int((data.train == bos).sum() + (data.val == bos).sum())
    baselines = count_losses(data.train, data.val, V) if V <= 4096 else None
    return {"documents": documents, "train_tokens": len(data.train), "baselines": baselines}
