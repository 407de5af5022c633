"""What the campaigns share: forked children, the journal from which a campaign continues, and how an end is judged."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measure import ROOT, Line, as_flags, read_metrics
from quill import checkpoint
from quill.data import token_files
from quill.errors import UserError
from quill.options import BenchConfig

Result = dict[str, Any]  # what a case has counted; its "problems" are faults of quill
Cases = Iterator[tuple[str, Callable[[Path], Result]]]  # a case's name, and what runs it in an empty folder

CODE = ("*.py", "quill/**/*.py", "tests/faults/*.py")  # what results depend on
TINY: dict[str, Any] = {"dataset": "prose", "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4}
TINY |= {"gradient_accumulation_steps": 1, "max_iters": 8, "lr_decay_iters": 200, "warmup_iters": 4, "min_lr": 1e-3}
TINY |= {"learning_rate": 1e-2, "eval_interval": 4, "log_interval": 4, "device": "cpu", "dtype": "float32"}
KINDS: dict[str, dict[str, Any]] = {  # of runs
    "adamw": {"dropout": 0.1},
    "muon_ema": {"dropout": 0.1, "optimizer": "muon", "ema_decay": 0.9},
    "names": {"dropout": 0.1, "dataset": "words"},
    "tensorboard": {"dropout": 0.1, "tensorboard": True},
}
STATE = ("model", "ema", "optimizers", "scaler", "step")  # what no evaluation changes
ALL = (*STATE, "best_val_loss", "evals_since_best", "losses", "data_order", "threads", "tokenizer")


class Workplace:
    """A folder with two small datasets, and the server of forked children, tests/faults/forks.py."""

    def __init__(self, config: BenchConfig):
        self.config, self.folder = config, Path(config.out_dir).resolve() / "faults"
        self.server: subprocess.Popen[str] | None = None
        sources = b"".join(path.read_bytes() for pattern in CODE for path in sorted(ROOT.glob(pattern)))
        self.code = hashlib.sha256(sources).hexdigest()[:12]
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(600)]
        for name, separator in (("prose", " "), ("words", "\n")):
            source = self.folder / "data" / f"{name}.txt"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(separator.join(words), encoding="utf-8")
            token_files.prepare(source, source.with_suffix(""), "char", "lines" if name == "words" else "none", name)

    def size(self, full: int, quick: int) -> int:
        """How many: `full`, or with --quick `quick`."""
        return quick if self.config.quick else full

    def ask(self, run: str, argv: list[Any], **how: Any) -> dict[str, Any]:
        """Run a script in a forked child: see `serve` in tests/faults/forks.py. → how it ended"""
        if self.server is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
            pipes["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
            self.server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("forks.py"))], **pipes)
        assert self.server.stdin and self.server.stdout
        print(json.dumps({"run": run, "argv": list(map(str, argv)), **how}), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def train(self, out_dir: Path, options: dict[str, Any], **how: Any) -> dict[str, Any]:
        """Run train.py with TINY and `options`. → how it ended"""
        return self.ask(
            "train.py", as_flags(TINY | {"data_dir": self.folder / "data", "out_dir": out_dir} | options), **how
        )

    def finished_run(self, kind: str) -> Path:
        """The folder of a run of eight steps, which is trained if it does not exist."""
        folder = self.folder / "runs" / f"{kind}-{self.code}"
        if not (folder / "last.pt").is_file():
            self.train(folder, KINDS[kind])
        return folder

    def close(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.communicate()


# ---------------------------------------------------------------- judging


def why_no_refusal(answer: dict[str, Any]) -> str:
    """Why the end of a script is no refusal, which is exit code 2 and one line; "" if it is one."""
    lines = [line for line in answer["err"].splitlines() if not line.startswith("note: ")]
    if answer["codes"] == [2] and len(lines) == 1 and ".py: " in lines[0]:
        return ""
    return "hung" if answer["is_hung"] else f"exit code {answer['codes']}, {len(lines)} lines: {answer['err'][-300:]}"


def why_no_end(answer: dict[str, Any]) -> str:
    """Why a script has neither succeeded nor refused; "" if it has done one of them."""
    return "" if answer["codes"] == [0] and "Traceback" not in answer["err"] else why_no_refusal(answer)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested values differ in a type, a shape or a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.layout == b.layout == torch.strided:
        x, y = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
        return [] if a.shape == b.shape and a.dtype == b.dtype and torch.equal(x, y) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if type(a) is type(b) and isinstance(a, (list, tuple)) and len(a) == len(b):
        return [line for i in range(len(a)) for line in differences(a[i], b[i], f"{path}/{i}")]
    return [] if type(a) is type(b) and repr(a) == repr(b) else [path]


def runs_differ(one: Path, two: Path, keys: tuple[str, ...] = ALL) -> list[str]:
    """Where the checkpoints of two runs, and the losses in metrics.csv, differ in a bit. Without ALL, last.pt alone."""
    found = []
    for name in ("last.pt", "best.pt") if keys is ALL else ("last.pt",):
        states = [checkpoint.load(folder / name) for folder in (one, two)]
        found += differences(*[{key: state[key] for key in keys} for state in states], path=name)
    rows = [[(row["step"], row["train_loss"], row["val_loss"]) for row in read_metrics(run)] for run in (one, two)]
    return found + (["metrics.csv"] if keys is ALL and rows[0] != rows[1] else [])


# ---------------------------------------------------------------- the journal


def run_campaign(name: str, cases: Cases, place: Workplace, only: set[str]) -> Line:
    """Run the cases that the journal does not have, or `only` these, and add up what all of them have counted."""
    journal, line = place.folder / f"{name}.jsonl", {"what": name, "cases": 0, "problems": [], "seconds": 0.0}
    done = read_journal(journal, place.code)
    for key, case in cases:
        if only and key not in only:
            continue
        if key not in done or only:
            done[key] = run_case(name, key, case, place)
            with open(journal, "a", encoding="utf-8") as file:
                file.write(json.dumps({"case": key, "code": place.code, **done[key]}) + "\n")
        for count, value in ({"cases": 1} | done[key]).items():
            before = line.get(count, type(value)())
            line[count] = max(before, value) if count.startswith("largest") else before + value
    return line


def read_journal(path: Path, code: str) -> dict[str, Result]:
    """The results that the same code has had → {case: result}. The last line may be cut off."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [json.loads(text) for text in texts if text.endswith("}")]
    return {line.pop("case"): line for line in lines if line.pop("code") == code}


def run_case(name: str, key: str, case: Callable[[Path], Result], place: Workplace) -> Result:
    """Run a case in an empty folder, which is kept if there are problems."""
    folder, began = place.folder / "failed" / f"{name}-{key}", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        result = case(folder)
    except (UserError, OSError) as error:
        result = {"problems": [str(error)]}
    for problem in result["problems"]:
        print(f"FAULT {problem}\n  repeat: python -m bench faults {name}:{key}\n  input: {folder}", flush=True)
    if not result["problems"]:
        shutil.rmtree(folder)
    problems = [f"{name}:{key}: {problem}" for problem in result["problems"]]
    return {**result, "problems": problems, "seconds": time.perf_counter() - began}
