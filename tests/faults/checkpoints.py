"""Campaigns about checkpoints: flipped bits, truncations, edits with valid checksums, pickles that would run code."""

import ast
import contextlib
import json
import os
import pickle
import pkgutil
import random
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from faults.campaign import Cases, Result, Workplace, differences, why_no_end, why_no_refusal
from quill import checkpoint
from quill.errors import UserError

ODD = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "auto",
    "\0\n",
    [],
    {},
)
ODD += ([1], ["a", None], {"a": 1}, {0: 0}, (), torch.tensor(1.0), torch.zeros(0), torch.ones(2, 2, dtype=torch.int64))


def damage(place: Workplace) -> Cases:
    """Checkpoints with a flipped bit in each region, cut off at each percent, and 500 edited, with valid checksums."""
    for kind in ("adamw", "muon_ema"):
        path = place.finished_run(kind) / "last.pt"
        data, expected = path.read_bytes(), checkpoint.load(path)
        for number, (start, end) in list(enumerate(regions(data)))[:: place.size(1, 60)]:
            for seed in range(place.size(2, 1)):
                yield f"{kind}-flip-{number}-{seed}", partial(try_flip, place, data, expected, start, end, seed)
        for percent in range(0, 100, place.size(1, 50)):
            cut = data[: len(data) * percent // 100]
            yield f"{kind}-cut-{percent}", partial(try_bytes, place, cut, expected, f"cut at {percent} %")
        for seed in range(place.size(250, 3)):
            yield f"{kind}-edit-{seed}", partial(try_edit, place, path, random.Random(f"{kind}-{seed}"))


def regions(data: bytes) -> list[tuple[int, int]]:
    """The parts of a zip file: each member's header, name and data; the entries of the directory; the end."""
    starts = [match.start() for match in re.finditer(rb"PK[\x01\x03\x05-\x07][\x02\x04\x06-\x08]", data)]
    headers = [at for at in starts if data[at + 2] == 3]
    contents = [at + 30 + sum(struct.unpack_from("<HH", data, at + 26)) for at in headers]
    cuts = sorted({0, len(data), *starts, *(at + 30 for at in headers), *contents})
    return list(zip(cuts, cuts[1:], strict=False))


def try_flip(place: Workplace, data: bytes, expected: Any, start: int, end: int, seed: int, folder: Path) -> Result:
    """Flip a random bit between two bytes."""
    rng, flipped = random.Random(f"{start}-{seed}"), bytearray(data)
    at, bit = rng.randrange(start, end), rng.randrange(8)
    flipped[at] ^= 1 << bit
    return try_bytes(place, bytes(flipped), expected, f"bit {bit} of byte {at}", folder)


def try_bytes(place: Workplace, data: bytes, expected: Any, what: str, folder: Path) -> Result:
    """Load, sample from and resume a file. Each is refused in one line, or has the `expected` values."""
    path, compare = folder / "last.pt", [folder / "last.pt", folder / "expected"]
    path.write_bytes(data)
    torch.save(expected, folder / "expected")
    load = place.ask("faults.checkpoints:load_and_compare", compare)
    sample = place.ask("sample.py", [f"--ckpt={path}", "--max_new_tokens=2", "--num_samples=1", "--device=cpu"])
    resume = place.train(folder, {"init_from": "resume", "max_iters": 10})
    found = json.loads(load["out"]) if load["codes"] == [0] else [f"load: {why_no_end(load)}"]
    problems = found if isinstance(found, list) else []
    problems += [f"{name}: {why}" for name, end in (("sample", sample), ("resume", resume)) if (why := why_no_end(end))]
    result = {
        "loaded": int(found == []),
        "sampled": int(not sample["codes"][0]),
        "resumed": int(not resume["codes"][0]),
    }
    result["refused by all"] = int(not any(result.values()))
    return {**result, "problems": [f"{problem} ({what})" for problem in problems]}


def load_and_compare(path: str, expected: str) -> list[str] | str:
    """Called in a child. → where a loaded checkpoint differs from the file `expected`, or "refused" """
    try:
        state = checkpoint.load(path)
    except UserError:
        return "refused"
    return [f"loads another {place}" for place in differences(state, torch.load(expected, weights_only=False))]


# ---------------------------------------------------------------- edits


def try_edit(place: Workplace, path: Path, rng: random.Random, folder: Path) -> Result:
    """An edited file is refused in one line; or its new value is plausible, and it is loaded and used.

    An optimizer's own settings (param_groups) are not: a resume takes them from the options.
    """
    state = checkpoint.load(path)
    what, old, new = edit(state, rng)
    torch.save(state, folder / "edited")
    result = try_bytes(place, (folder / "edited").read_bytes(), state, what, folder)
    if result["loaded"] and result["resumed"] and not is_plausible(old, new) and "param_groups" not in what:
        result["problems"].append(f"taken in silence: {what}")
    return result


def edit(state: Any, rng: random.Random) -> tuple[str, Any, Any]:
    """Change one value of a checkpoint, its type, range or shape, or a key. → what, the old value, the new one"""
    holder, key, path = state, rng.choice(list(state)), ""
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
        path, holder = f"{path}/{key}", holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    old, change = holder[key], rng.choice(("odd", "odd", "near", "near", "drop", "rename"))
    if change in ("drop", "rename"):
        del holder[key]
        if change == "rename" and isinstance(holder, dict):
            holder[rng.choice(["x", 0, f"{key}_", None])] = old
        return f"{change} {path}/{key}", old, None
    holder[key] = rng.choice(list(near(old)) or ODD) if change == "near" else rng.choice(ODD)
    return f"{path}/{key}: {repr(old)[:40]} → {repr(holder[key])[:40]}", old, holder[key]


def near(value: Any) -> Iterator[Any]:
    """Values that resemble `value`: of another type, sign, size, shape or layout."""
    if isinstance(value, torch.Tensor):
        kinds = ("meta", torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.cfloat)
        yield from (value.to(kind) for kind in kinds)
        yield from (value[..., None], value.flatten()[:-1], value * 2, value.tolist(), torch.nn.Parameter(value))
        yield from (torch.full_like(value, number) for number in (float("nan"), float("inf"), -1, 1e38))
        yield value.to_sparse()
    elif isinstance(value, (int, float)):
        yield from (value + 1, -value, -value - 1, value * 10**9, value + 0.5, float(value), str(value), bool(value))
    elif isinstance(value, str):
        yield from (value + "x", value[:-1], value.upper(), value.encode(), list(value), value * 10**6)
    elif isinstance(value, dict):
        yield from ({**value, "x": 0}, list(value.items()), dict(list(value.items())[:-1]), [value])
    elif isinstance(value, list):
        yield from (value[:-1], value + value, tuple(value), dict(enumerate(value)), [[value]])


def is_plausible(old: Any, new: Any) -> bool:
    """Whether a resume may use `new` in the place of `old`: it has its type or is None, and is a number."""
    if isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and new.shape == old.shape and bool(new.isfinite().all())
    if isinstance(new, (int, float)) and isinstance(old, (int, float)):
        return new == new and isinstance(new, bool) == isinstance(old, bool)
    return new is None or old is None or type(old) is type(new)


# ---------------------------------------------------------------- pickles

# Functions, and arguments with which each of them makes the file or folder PATH.
HOSTILE = """os.mkdir os.makedirs os.mkfifo logging.FileHandler sqlite3.connect: ('PATH',)
os.system subprocess.getoutput torch.utils.collect_env.run: ('touch PATH',)
subprocess.call subprocess.run subprocess.check_output pty.spawn: (['touch', 'PATH'],)
builtins.open io.FileIO codecs.open zipfile.ZipFile tarfile.open: ('PATH', 'w')
gzip.open bz2.open lzma.open gzip.GzipFile bz2.BZ2File lzma.LZMAFile wave.open: ('PATH', 'wb')
builtins.eval builtins.exec cProfile.run profile.run timeit.timeit: ('open("PATH", "w").close()',)
runpy._run_code: ('open("PATH", "w").close()', {})
os.symlink: ('nowhere', 'PATH')
os.open: ('PATH', 64)
os.spawnvp: (0, 'touch', ['touch', 'PATH'])
shutil.copyfile shutil.copy: ('/proc/self/status', 'PATH')
numpy.savetxt: ('PATH', [0])
numpy.memmap: ('PATH', 'uint8', 'w+', 0, (1,))
torch.save: (0, 'PATH')
torch.from_file: ('PATH', True, 1)"""
WRITERS: dict[str, Callable[[Any, Any], None]] = {  # places for a hostile call in a file
    "model": lambda call, file: torch.save({"format": 2, "model": call}, file),
    "key": lambda call, file: torch.save({call: 1}, file),
    "list": lambda call, file: torch.save({"optimizers": [{"state": {0: call}}]}, file),
    "nested": lambda call, file: torch.save(Call("pickle.loads", (pickle.dumps(call),)), file),
    "map": lambda call, file: torch.save(Call("builtins.list", (Call("builtins.map", (os.mkdir, call.args)),)), file),
    "old format": lambda call, file: torch.save(call, file, _use_new_zipfile_serialization=False),
    **{f"protocol {n}": lambda call, file, n=n: pickle.dump({"format": 2, "a": call}, file, n) for n in range(6)},
}


class Call:
    """Pickles as a call of the function `name` with `args`."""

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.function, self.args = pkgutil.resolve_name(name), args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def pickles(place: Workplace) -> Cases:
    """Files whose unpickling would run code, 50 kinds, by the function or by the place of the call."""
    lines = [line.split(": ", 1) for line in HOSTILE.splitlines()]
    kinds = [("model", name, args) for names, args in lines for name in names.split()]
    kinds += [(where, "os.mkdir", "('PATH',)") for where in WRITERS if where != "model"]
    for where, name, args in kinds[:: place.size(1, 12)]:
        yield f"{where}-{name}", partial(try_pickle, place, where, name, args)


def try_pickle(place: Workplace, where: str, name: str, args: str, folder: Path) -> Result:
    """Sampling, resuming and fine-tuning refuse the file and run nothing; a plain unpickling runs it."""
    made, path = str(folder / "made"), folder / "last.pt"
    with open(path, "wb") as file:
        WRITERS[where](Call(name, ast.literal_eval(args.replace("PATH", made))), file)
    ends = [place.ask("sample.py", [f"--ckpt={path}"]), place.train(folder, {"init_from": "resume"})]
    ends += [place.train(folder / "new", {"init_from": path})]
    problems, executed = [why for end in ends if (why := why_no_refusal(end))], os.path.lexists(made)
    place.ask("faults.checkpoints:unpickle", [path])
    problems += ["executed"] * executed + ["the campaign is wrong: this does nothing"] * (not os.path.lexists(made))
    return {"kinds": 1, "executed": int(executed), "problems": problems}


def unpickle(path: str) -> None:
    """Called in a child: what quill must not do."""
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
