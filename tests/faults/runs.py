"""Campaigns about whole runs: killed, resumed, continued by other numbers of processes, on a disk that fails."""

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from faults.campaign import KINDS, STATE, TINY, Cases, Result, Workplace, runs_differ, why_no_end, why_no_refusal
from faults.forks import DISK
from quill import checkpoint
from quill.data.token_files import open_dataset
from quill.errors import UserError


def kill(place: Workplace) -> Cases:
    """Runs that are killed 20 times each by SIGKILL, 1,000 kills in all, end as the undisturbed run, bit for bit."""
    for kind in (*KINDS, "two_ranks"):
        for seed in range(place.size(10, 1)):
            yield f"{kind}-{seed}", partial(kill_case, place, kind, seed, place.size(20, 2))


def kill_case(place: Workplace, kind: str, seed: int, kills: int, folder: Path) -> Result:
    """Every second kill is at a random time; the others are at a random change of the disk, in a save or before it."""
    rng, ranks, killed = random.Random(f"{kind}-{seed}"), 2 if kind == "two_ranks" else 1, folder / "killed"
    options: dict[str, Any] = KINDS.get(kind, {"dropout": 0.1}) | {"seed": seed, "init_from": "auto"}
    options["max_iters"] = 24 if kind == "tensorboard" else place.size(80, 20)
    whole = place.train(folder / "whole", options, ranks=ranks, calls=DISK)
    counts, problems, reached = {"kills": 0, "runs": 0, "steps redone": 0, "lost": 0}, [], 0
    has_ended = False
    while not counts["lost"] and (counts["kills"] < kills or not has_ended):
        who = rng.choice([[0], [1], [0, 1]]) if ranks == 2 else [0]
        by_time = {"kill_after": rng.uniform(0.02, 0.8 * whole["seconds"]), "kill_ranks": who}
        by_call = {"calls": DISK, "nth": rng.randint(1, max(1, sum(whole["calls"].values()) // 2))}
        how = {} if counts["kills"] >= kills else by_call if counts["kills"] % 2 else by_time
        end = place.train(killed, options, ranks=ranks, **how)
        counts["steps redone"] += max(0, min(reached, end["last"]) - end["first"])
        if end["last"] > 0 and reached - end["first"] > TINY["eval_interval"]:
            problems.append(f"after {counts['kills']} kills: back from step {reached} to {end['first']}")
        reached = max(reached, end["last"])
        has_ended = not any(end["codes"])
        if -9 in end["codes"] and not end["is_hung"]:
            counts["kills"] += 1
        elif not has_ended:
            counts["lost"] = 1
            problems.append(f"lost after {counts['kills']} kills: exit code {end['codes']}, {end['err'][-300:]}")
        else:
            problems += [f"unequal bits: {path}" for path in runs_differ(folder / "whole", killed)]
            counts["runs"], reached = counts["runs"] + 1, 0
            shutil.rmtree(killed)
    return {**counts, "problems": problems}


def resumes(place: Workplace) -> Cases:
    """A resume of a resume, ten times, with other evaluation intervals: the state is the undisturbed run's."""
    for kind in KINDS:
        for seed in range(place.size(place.config.seeds, 1)):
            yield f"{kind}-{seed}", partial(resume_case, place, KINDS[kind] | {"seed": seed}, place.size(10, 2))


def resume_case(place: Workplace, options: dict[str, Any], resumes: int, folder: Path) -> Result:
    """Train in one piece, and in resumes + 1 pieces."""
    rng = random.Random(str(options))
    place.train(folder / "whole", options | {"max_iters": 5 * (resumes + 1)})
    for i in range(resumes + 1):
        piece = {"max_iters": 5 * (i + 1), "eval_interval": rng.randint(1, 7), "init_from": "auto"}
        place.train(folder / "pieces", options | piece)
    return {"resumes": resumes, "problems": runs_differ(folder / "whole", folder / "pieces", STATE)}


def worlds(place: Workplace) -> Cases:
    """A walk over 1, 2, 1, 2 processes beside one process; where each takes whole micro-batches, bits are equal.

    Otherwise two processes sum up the rows in another order. The difference is compared with what another order does
    to one process: a run whose micro-batches are half as large.
    """
    for kind in ("adamw", "muon_ema", "names"):
        for seed in range(place.size(place.config.seeds, 1)):
            for share in ("micro-batches", "rows"):
                yield f"{kind}-{share}-{seed}", partial(walk_case, place, KINDS[kind] | {"seed": seed}, share)


def walk_case(place: Workplace, options: dict[str, Any], share: str, folder: Path) -> Result:
    """Dropout is off, because each rank has random numbers of its own."""
    options = options | {"dropout": 0.0, "gradient_accumulation_steps": 2 if share == "micro-batches" else 1}
    steps = place.size(10, 4)
    place.train(folder / "whole", options | {"max_iters": 4 * steps})
    for leg, ranks in enumerate((1, 2, 1, 2)):
        place.train(folder / "walk", options | {"max_iters": steps * (leg + 1), "init_from": "auto"}, ranks=ranks)
    halves = {"batch_size": TINY["batch_size"] // 2, "gradient_accumulation_steps": 2}
    place.train(folder / "halves", options | halves | {"max_iters": 4 * steps})
    whole, walk, split = (checkpoint.load(folder / run / "last.pt")["model"] for run in ("whole", "walk", "halves"))
    largest, usual = (max((whole[name] - other[name]).abs().max().item() for name in whole) for other in (walk, split))
    problems = runs_differ(folder / "whole", folder / "walk", STATE if share == "micro-batches" else ("step",))
    problems += [f"weights differ by {largest}, in one process by {usual}"] if largest > 10 * usual else []
    counts = {f"largest difference, {share} shared out": largest}
    return counts | ({"largest difference, one process": usual} if share == "rows" else {}) | {"problems": problems}


# ---------------------------------------------------------------- a disk that is full or fails

FAILURES = {"full": (("open", "write"), "ENOSPC"), "fsync": (("fsync",), "EIO"), "rename": (("replace",), "EIO")}
STRERROR = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}


def disk(place: Workplace) -> Cases:
    """The disk is full from the nth write on, or the nth fsync or rename fails, for every n of a run and of prepare."""
    for kind in ("adamw", "prepare", "tensorboard")[: place.size(3, 2)]:
        folder, how = place.folder / "runs" / "counted", {"calls": DISK}
        options = KINDS.get(kind, {}) | {"overwrite": True}
        whole = prepare(place, folder, "words", how) if kind == "prepare" else place.train(folder, options, **how)
        case = fail_prepare if kind == "prepare" else partial(fail_run, kind)
        for failure, (calls, error) in FAILURES.items():
            count, every = (
                sum(whole["calls"][call] for call in calls),
                10 if kind == "tensorboard" else place.size(1, 8),
            )
            for nth in range(1, count + 1, every):
                yield f"{kind}-{failure}-{nth}", partial(case, place, {"calls": calls, "error": error, "nth": nth})


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
