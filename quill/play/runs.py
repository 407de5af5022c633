"""The runs that the page lists, and the processes of train.py that it starts, pauses and steps.

A run is a folder below out_dir, and its path there is its name. Its files are read without trust: a folder may come
from anywhere. quill/observers/page.py writes those in its folder `page`, except control, command.json and log.txt.
A process is found by the lock of its run's folder, so that a server that starts later finds it too.
"""

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quill.cli import CONFIG_DIR, coerce, config_files, option_types, read_config_file
from quill.data.corpora import CORPORA
from quill.data.token_files import open_dataset, prepare
from quill.errors import UserError
from quill.files import open_without_links, read_end, replacing
from quill.observers.page import list_snapshots, read_state
from quill.options import TrainConfig
from quill.scoring import count_losses

ROOT = CONFIG_DIR.parent
TRAIN = ROOT / "train.py"
BUNDLED = Path(__file__).parent / "microgpt.pt"
OWN = {"out_dir", "data_dir", "init_from", "overwrite", "page", "eval_only", "dry_run", "vocab_size"}  # not the page's
MOST_FOLDERS, MOST_RUNS, MOST_IDS = 5000, 500, 2**16  # looked into, listed, in a vocabulary
LOG_LINES, STOPPING = 100, 5.0  # lines; seconds
CURVE = ("step", "loss", "gradient_norm", "lr")
# The run object of a folder without any file. /api/runs has the keys of LISTED.
LISTED = {"name": "", "title": "", "status": "paused", "step": 0, "max_iters": None, "val_loss": None}
EMPTY = LISTED | {"options": {}, "parameters": None, "vocab_size": None, "evaluations": [], "note": "", "log": ""}
EMPTY |= {"curve": dict.fromkeys(CURVE, ()), "snapshots": [], "weights_step": None, "error": None, "baselines": None}
EMPTY |= {"documents": None, "tokens_are_lines": None, "train_tokens": None}


class UnknownRun(UserError):
    """There is no run of this name."""


class Runs:
    """The runs below `out_dir`, and those that the page starts, which are in its folder `play`."""

    def __init__(self, out_dir: str | Path, data_dir: str | Path):
        self.out_dir, self.data_dir = Path(out_dir), Path(data_dir)
        self.known: set[str] = set()  # the names of the runs that were found last
        self.processes: dict[Path, subprocess.Popen[Any]] = {}  # those that this object has started
        self.cache: dict[tuple[Callable, Path], tuple[Any, Any]] = {}

    def names(self) -> list[str]:
        """Return the names of the runs, the newest first, after `bundled`, the model that ships with quill.

        They are at most three levels below out_dir. Links are not followed.
        """
        found = {}
        for path, inner, _ in itertools.islice(os.walk(self.out_dir), MOST_FOLDERS):
            name = Path(path).relative_to(self.out_dir)
            inner[:] = [part for part in inner if len(name.parts) < 3 and _is_name(part)]
            with suppress(OSError):  # deleted meanwhile
                if _is_run(Path(path)):
                    found[name.as_posix()] = os.stat(path).st_mtime
        self.known = found.keys() - {"bundled"}
        return ["bundled", *sorted(self.known, key=found.__getitem__, reverse=True)[:MOST_RUNS]]

    def _folder(self, name: str) -> Path:
        """Return the folder of a run. Raise UnknownRun if the run is not listed."""
        if (name not in self.known and name not in self.names()) or not _is_run(self.out_dir / name):
            raise UnknownRun(f"there is no run {name[:80]!r}")
        return self.out_dir / name

    def weights(self, name: str, step: int | None = None) -> Path:
        """Return the checkpoint of a saved step, or with None the newest weights of a run. Raise UnknownRun if none."""
        if name == "bundled" and step is None:
            return BUNDLED
        folder = BUNDLED if name == "bundled" else self._folder(name)
        files = ("page/live.pt", "last.pt", "best.pt") if step is None else (f"page/step-{step:06}.pt",)
        stamps = {folder / file: stamp for file in files if (stamp := _stamp(folder / file))}
        if folder / "page/live.pt" in stamps and self._state(folder).get("pid") == self._pid(folder):
            return folder / "page/live.pt"  # in training: last.pt may be newer, but has no gradients
        if not stamps:
            raise UnknownRun(f"{name} has no weights" + (f" of step {step}" if step is not None else " yet"))
        return max(stamps, key=stamps.__getitem__)

    def datasets(self) -> list[str]:
        """Return the names of the known corpora, and of the folders in data_dir that are prepared."""
        prepared = {path.parent.name for path in self.data_dir.glob("*/meta.json") if _is_name(path.parent.name)}
        return [*CORPORA, *sorted(prepared - {*CORPORA})]

    def summaries(self) -> list[dict[str, Any]]:
        """Return a short run object of each run."""
        runs = []
        for name in self.names():
            with suppress(UnknownRun):  # deleted meanwhile
                run = self._outline(name)
                runs.append({key: run[key] for key in LISTED})
        return runs

    def run(self, name: str) -> dict[str, Any]:
        """Return the run object. A file that is missing, damaged or a link counts as absent."""
        run = self._outline(name)
        if name != "bundled":
            page = self._folder(name) / "page"
            log = read_end(page / "log.txt", 2**16).decode(errors="replace").strip()
            *_, last = lines = re.split(r"[\r\n]+", log)[-LOG_LINES:]
            run |= {"snapshots": list_snapshots(page), "log": "\n".join(lines)}
            if run["status"] in ("paused", "finished") and re.match(r"train\.py: |\w+Error\b", last):
                run["error"] = last  # a UserError's line, or the end of a traceback
        if (dataset := run["options"].get("dataset")) in self.datasets():
            run |= self._cached(_read_dataset, self.data_dir / dataset / "meta.json") or {}
        return run

    def _outline(self, name: str) -> dict[str, Any]:
        """Merge what the small files of a run say, the later ones over the earlier ones."""
        if name == "bundled":
            saved = self._cached(_read_checkpoint, BUNDLED) or {}
            own = {"name": name, "title": "microgpt, trained", "status": "bundled", "max_iters": saved.get("step")}
            return EMPTY | saved | own
        folder = self._folder(name)
        run = EMPTY | {"name": name, "title": name, "options": self._options(folder)}
        with suppress(UnknownRun):
            run |= self._cached(_read_checkpoint, self.weights(name)) or {}
        run["max_iters"] = run["options"].get("max_iters")
        run["evaluations"] = self._cached(_read_metrics, folder / "metrics.csv") or []
        if state := self._state(folder):
            run |= {key: state[key] for key in ("status", "step", "note")}
            run["curve"] = dict(zip(CURVE, zip(*state["curve"], strict=True), strict=False)) or run["curve"]
            run["weights_step"] = state["step"] if _stamp(folder / "page" / "live.pt") else None
        if pid := self._pid(folder):
            waits = run["status"] == "waiting" and state["pid"] == pid
            return run | {"status": "waiting" if waits else "running"}
        is_over = run["status"] == "finished" or run["step"] >= (run["max_iters"] or math.inf)
        return run | {"status": "finished" if is_over else "paused"}

    def signature(self, name: str) -> tuple[Any, ...]:
        """Return a value that changes when the run object does: see /api/events."""
        if name == "bundled":
            return ()
        folder = self._folder(name)
        files = ("page/state.json", "page/log.txt", "metrics.csv")
        return (*(_stamp(folder / file) for file in files), self._pid(folder))

    def _state(self, folder: Path) -> dict[str, Any]:
        return self._cached(read_state, folder / "page" / "state.json") or {}

    def _cached(self, read: Callable[[Path], Any], path: Path) -> Any:
        """Return `read(path)`, which is called again when the file has changed. None if there is no file."""
        stamp = _stamp(path)
        if stamp and self.cache.get((read, path), (None,))[0] != stamp:
            self.cache[read, path] = stamp, read(path)
        return self.cache[read, path][1] if stamp else None

    # ------------------------------------------------------------ processes

    def start(
        self,
        config: str | None = None,
        run: str | None = None,
        options: dict[str, Any] | None = None,
        text: str | None = None,
        documents: str = "none",
        paused: bool = False,
    ) -> str:
        """Start a run with the options of a config or of another run, changed by `options`. → its name

        text: a text that becomes the dataset; documents: as in prepare.py. paused: it waits before its first step.
        Raise a UserError if an option is wrong, or the text can't be prepared.
        """
        if config is None and run is not None:
            base = self._outline(run)["options"]
        elif config is not None and ROOT / config in config_files():
            base = read_config_file(ROOT / config, TrainConfig)
        else:
            raise UserError(f"there is no config {config!r:.80}")
        given = {key: value for key, value in base.items() if key not in OWN} | (options or {})
        block_size = self._check(given)["block_size"]
        if text is not None:
            given["dataset"] = self._prepare(text, documents, block_size)
        folder = _new_folder(self.out_dir / "play", re.sub(r"-\d+$", "", Path(str(config or run)).stem) or "run")
        with replacing(folder / "page" / "control", folder / "page" / "command.json") as (control, command):
            control.write(b"0" if paused else b"")
            command.write(json.dumps(given).encode())
        self._launch(folder)
        return folder.relative_to(self.out_dir).as_posix()

    def control(self, name: str, action: str) -> None:
        """Let a run "train", let it take one "step" and wait, or "pause" it: its process ends."""
        if name == "bundled":
            raise UserError("the bundled model is trained; start a run of config/microgpt.py")
        folder = self._folder(name)
        pid, state, path = self._pid(folder), self._state(folder), folder / "page" / "control"
        if action == "step":
            last = state if state.get("pid") == pid else self._cached(_read_checkpoint, folder / "last.pt") or EMPTY
            with replacing(path) as (file,):
                file.write(b"%d" % (last["step"] + 1))
        elif action == "train":
            with suppress(OSError):
                path.unlink()
        elif pid:
            own, end = self.processes.get(folder), time.monotonic() + STOPPING
            if pid not in (state.get("pid"), own and own.pid):
                raise UserError(f"{folder}: another process, which the page did not start, works there")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            while self._pid(folder) and time.monotonic() < end:
                time.sleep(0.02)
        if action != "pause" and not pid:
            self._launch(folder)

    def _pid(self, folder: Path) -> int:
        """Return the process that trains in `folder`, or that was started here and will; 0 if there is none."""
        process = self.processes.get(folder)
        return process.pid if process and process.returncode is None else lock_holder(folder)

    def _launch(self, folder: Path) -> None:
        """Start train.py in `folder`, or go on with its run. It outlives this process; a thread takes its exit code."""
        options, path = self._options(folder), folder / "page" / "log.txt"
        changed = {key: value for key, value in options.items() if value != getattr(TrainConfig, key)}
        arguments = [f"--{key}={'' if value is None else value}" for key, value in changed.items()]
        arguments += ["--init_from=auto" if options else "--init_from=resume"]
        arguments += [f"--out_dir={folder}", f"--data_dir={self.data_dir}", "--page=True"]
        try:
            path.parent.mkdir(exist_ok=True)
            with open(open_without_links(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as log:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                process = subprocess.Popen([sys.executable, str(TRAIN), *arguments], start_new_session=True, **streams)
        except OSError as error:
            raise UserError(f"can't start train.py with the log {path}: {error.strerror}") from None
        self.processes[folder] = process
        threading.Thread(target=process.wait, daemon=True).start()

    def _options(self, folder: Path) -> dict[str, Any]:
        """Return all options of a run that the page has started; {} for others, or if command.json is damaged."""
        with suppress(ValueError, TypeError, AttributeError, RecursionError, UserError):
            return self._check(json.loads(read_end(folder / "page" / "command.json")))
        return {}

    def _check(self, options: dict[str, Any]) -> dict[str, Any]:
        """Check the options of a start. → all of TrainConfig's. Raise a UserError if one is wrong or not the page's."""
        kinds = option_types(TrainConfig)
        for key in options:
            if key not in kinds or key in OWN:
                raise UserError(f"{key!r:.80} is not an option that the page can set")
        if "dataset" in options and options["dataset"] not in self.datasets():
            raise UserError(f"there is no dataset {options['dataset']!r:.80}")
        config = TrainConfig(**{key: coerce(value, kinds[key], "", key) for key, value in options.items()})
        width, tokens = int((4 + 3 * config.mlp_ratio) * config.n_embd), config.batch_size * config.block_size
        # Upper bounds: the weights, the numbers that a micro-batch keeps, the tokens of a step, those of the samples.
        weights = config.n_embd * (config.n_layer * width + config.block_size + MOST_IDS)
        kept = tokens * ((config.n_layer + 1) * (width + config.n_head * config.block_size) + MOST_IDS)
        of_step = tokens * config.gradient_accumulation_steps
        drawn = max(config.eval_samples, config.final_samples) * config.sample_tokens
        if weights > 2**28 or kept > 2**33 or max(of_step, drawn) > 2**22 or config.n_layer > 1000:
            raise UserError("too large for the page: use a smaller model or batch, or train.py in a terminal")
        return asdict(config)

    def _prepare(self, text: str, documents: str, block_size: int) -> str:
        """Make a dataset of a text, one id for each character. → its name. Raise a UserError if that fails."""
        if not text.strip() or len({*text}) > MOST_IDS:
            raise UserError(f"the text is blank, or has more than {MOST_IDS:,} different characters")
        if documents == "none" and len(text) < 10 * (block_size + 1):  # a tenth is the validation split
            raise UserError(f"the text has {len(text)} characters, too few for --block_size={block_size}")
        folder = _new_folder(self.data_dir, "play")
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / "text.txt"
            source.write_bytes(text.encode(errors="replace"))
            try:
                prepare(source, folder, "char", documents, folder.name)
            except UserError as error:
                with suppress(OSError):
                    folder.rmdir()
                raise UserError(str(error).replace(str(source), "the text")) from None
        return folder.name


def lock_holder(folder: Path) -> int:
    """Return the process that has locked `folder`, without locking it; 0 if none has, -1 if it is not known."""
    try:
        import fcntl

        with open(open_without_links(folder / ".lock", os.O_RDONLY)) as file:
            # struct flock: where its type and its process are
            kind, pid, layout = (3, 2, "qqihh") if sys.platform == "darwin" else (0, 4, "hhqqi")
            asked = [fcntl.F_WRLCK if i == kind else 0 for i in range(5)]
            found = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *asked)))
            return 0 if found[kind] == fcntl.F_UNLCK else found[pid] or -1
    except (ImportError, OSError):  # Windows; no lock; a file system without locks
        return 0


def _is_name(part: str) -> bool:
    """Whether the name of a run or a dataset may have this part."""
    return part.isprintable() and not part.startswith(".") and part != "page"


def _is_run(folder: Path) -> bool:
    files = ("last.pt", "best.pt", "metrics.csv", "page/state.json", "page/command.json")
    return any(map(_stamp, (folder / file for file in files))) and not (folder / "page").is_symlink()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced or grows; None if it is not a regular file."""
    try:
        info = path.lstat()
    except (OSError, ValueError):
        return None
    return (info.st_mtime_ns, info.st_size) if stat.S_ISREG(info.st_mode) else None


def _new_folder(parent: Path, stem: str) -> Path:
    """Make the first of the folders `stem`-1, `stem`-2, … in `parent` that does not exist. Two servers get two."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(1)
        while True:
            with suppress(FileExistsError):
                (path := parent / f"{stem[:80]}-{next(numbers)}").mkdir()
                return path
    except OSError as error:
        raise UserError(f"can't make a folder in {parent}: {error.strerror}") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the evaluations in metrics.csv. Rows that are damaged are left out."""
    rows, kinds = [], {"step": int, "val_loss": float, "tokens_per_s": float}
    names, *lines = [line.split(",") for line in (read_end(path) or b"-").decode(errors="replace").splitlines()]
    for line in lines:
        with suppress(ValueError, KeyError):
            row = dict(zip(names, line, strict=True))
            rows.append({key: kind(row[key]) for key, kind in kinds.items()})
    return rows


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the options, the step and the sizes of a checkpoint, without its weights. None if it is damaged."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kinds, loss = option_types(TrainConfig), float(saved["best_val_loss"])
        config = {key: coerce(value, kinds[key], "", key) for key, value in saved["config"].items() if key in kinds}
        sizes = {weight.data_ptr(): weight.numel() for weight in saved["model"].values()}  # tied weights once
        read = {"options": asdict(TrainConfig(**config)), "parameters": sum(sizes.values())}
        read |= {"step": int(saved["step"]), "vocab_size": int(saved["vocab_size"])}
        return read | {"val_loss": loss if math.isfinite(loss) else None}
    except Exception:  # a damaged pickle can fail in any way
        return None


def _read_dataset(path: Path) -> dict[str, Any] | None:
    """Return what the run object says of the dataset with this meta.json. None if it is damaged."""
    try:
        data = open_dataset(path.parent.parent, path.parent.name)
    except UserError:
        return None
    bos, V = data.tokenizer.bos, data.tokenizer.vocab_size
    return {
        "documents": None if bos is None else int((data.train == bos).sum() + (data.val == bos).sum()),
        "tokens_are_lines": data.tokenizer.bos_is_newline,
        "train_tokens": len(data.train),
        "baselines": count_losses(data.train, data.val, V) if V <= 4096 else None,
    }
