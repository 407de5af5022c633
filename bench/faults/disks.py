"""The campaign about a disk that is full or fails."""

from functools import partial
from pathlib import Path
from typing import Any

from bench.faults.campaign import KINDS, Cases, Result, Workplace, runs_differ, why_no_end, why_no_refusal
from quill import checkpoint
from quill.data.token_files import open_dataset
from quill.errors import UserError

FAILURES = {"full": (("open", "write"), "ENOSPC"), "fsync": (("fsync",), "EIO"), "rename": (("replace",), "EIO")}
STRERROR = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}


def disk(place: Workplace) -> Cases:
    """The disk is full from the nth write on, or the nth fsync or rename fails, for every n of a run and of prepare."""
    for failure, (calls, error) in FAILURES.items():
        for kind in ("adamw", "prepare", "tensorboard")[: place.size(3, 2)]:
            how: dict[str, Any] = {"calls": calls, "error": error}
            case = fail_prepare if kind == "prepare" else partial(fail_run, kind)
            every = place.size(10 if kind == "tensorboard" else 1, 8)
            for nth in range(1, count_calls(place, kind, how) + 1, every):
                yield f"{kind}-{failure}-{nth}", partial(case, place, how | {"nth": nth})


def count_calls(place: Workplace, kind: str, how: dict[str, Any]) -> int:
    """How often an undisturbed run, or prepare, makes the `calls` in `how`."""
    folder = place.folder / "runs" / "counted"
    if kind == "prepare":
        return prepare(place, folder, "words", how)["calls"]
    return place.train(folder, KINDS[kind] | {"overwrite": True}, **how)["calls"]


def prepare(place: Workplace, folder: Path, name: str, how: dict[str, Any]) -> dict[str, Any]:
    """Run prepare.py on one of the two texts. → how it ended"""
    text = place.folder / "data" / f"{name}.txt"
    return place.ask("prepare.py", [f"--data_dir={folder}", "--dataset=mine", f"--input={text}"], **how)


def fail_run(kind: str, place: Workplace, how: dict[str, Any], folder: Path) -> Result:
    """The line is true, the checkpoints that exist are whole, and the run goes on to the undisturbed run's bits."""
    end = place.train(folder, KINDS[kind], **how)
    said, saved = end["err"], {str(path): checkpoint.load(path)["step"] for path in sorted(folder.glob("*.pt"))}
    problems = [why] if (why := why_no_refusal(end)) else []
    if STRERROR[how["error"]] not in said or (
        " is kept" in said and not any(f"{path} is kept" in said for path in saved)
    ):
        problems.append(f"not true, with {saved}: {said}")
    if ("no checkpoint" in said and saved) or max(saved.values(), default=0) < end["last"] - 4:
        problems.append(f"after step {end['last']} there is {saved}: {said}")
    again = place.train(folder, KINDS[kind] | {"init_from": "auto"})
    problems += [why] if (why := why_no_end(again)) else runs_differ(place.finished_run(kind), folder)
    return {"failures": 1, "with a checkpoint kept": int(bool(saved)), "problems": problems}


def fail_prepare(place: Workplace, how: dict[str, Any], folder: Path) -> Result:
    """The dataset is the old or the new one, whole; only where a rename fails may it be refused until it is redone."""
    prepare(place, folder, "prose", {})
    end = prepare(place, folder, "words", how)
    problems = [why] if (why := why_no_refusal(end)) else []
    problems += [] if STRERROR[how["error"]] in end["err"] else [f"not true: {end['err']}"]
    try:
        held = open_dataset(folder, "mine").meta["source"]["name"]
    except UserError as error:
        held = "refused"
        problems += [] if how["calls"] == ("replace",) else [f"the old dataset is gone: {error}"]
    again = prepare(place, folder, "words", {})
    if again["codes"] != [0] or open_dataset(folder, "mine").meta["source"]["name"] != "words.txt":
        problems.append(f"prepared again: {again['err']}")
    problems += [f"left {path.name}" for path in (folder / "mine").glob(".*.tmp")]
    return {"failures": 1, f"dataset then {held}": 1, "problems": problems}
