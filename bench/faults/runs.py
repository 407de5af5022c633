"""Campaigns about whole runs: killed, resumed again and again, and continued by other numbers of processes."""

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from bench.faults.campaign import KINDS, STATE, TINY, Cases, Result, Workplace, runs_differ
from quill import checkpoint

CALLS = ("open", "write", "fsync", "replace")


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
    whole = place.train(folder / "whole", options, ranks=ranks, calls=CALLS)
    counts, problems, reached = {"kills": 0, "runs": 0, "steps redone": 0, "lost": 0}, [], 0
    has_ended = False
    while not counts["lost"] and (counts["kills"] < kills or not has_ended):
        who = rng.choice([[0], [1], [0, 1]]) if ranks == 2 else [0]
        by_time = {"kill_after": rng.uniform(0.02, 0.8 * whole["seconds"]), "kill_ranks": who}
        by_call = {"calls": CALLS, "nth": rng.randint(1, max(1, whole["calls"] // 2))}
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
    """A walk over 1, 2, 1, 2 processes beside one process; where each takes whole micro-batches, bits are equal."""
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
    whole, walk = (checkpoint.load(folder / name / "last.pt")["model"] for name in ("whole", "walk"))
    largest = max((whole[name] - walk[name]).abs().max().item() for name in whole)
    problems = runs_differ(folder / "whole", folder / "walk", STATE if share == "micro-batches" else ("step",))
    problems += [f"weights differ by {largest}"] if largest > 1e-4 else []
    return {f"largest difference, {share} shared out": largest, "problems": problems}
