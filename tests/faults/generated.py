"""Generated command lines, config files and texts: whatever is given, a script succeeds or says in one line why not."""

import json
import os
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench.measure import as_flags
from faults.campaign import TINY, Cases, Result, Workplace, why_no_end
from quill.cli import option_types
from quill.errors import UserError
from quill.options import NANOGPT_NOTICES, PrepareConfig, SampleConfig, TrainConfig

BATCH = 100  # cases that hypothesis generates together
# Small enough to be done, or too large for any machine: in between, a command may rightly take an hour.
NUMBERS = f"0 1 2 4 1 2 4 1e0 0.5 0.1 1e-46 -1 1e12 1e15 9223372036854775807 1e309 {'9' * 309}".split()
WORDS = "nan -inf True False True False none auto x cpu cuda lines byte muon wsd rope swiglu rmsnorm float32 bfloat16"
WORDS = [*f"{WORDS} float16 １ prose words resume 1e-3 0x10 1_000".split(), "", "é\n", "\udcff", " 1"]
FOLDERS = f"box/a|box/ü|box/a b|box/a\nb|./box/../box/b|box/{'n' * 300}|box/file/x|/dev/null/x|".split("|")
LINES = r"""raise SystemExit(3)|1/0|import nowhere|x = (|def f(): pass|_a = 1|import os|\t1||'\0'|seed += 1|del seed
raise type('E', (BaseException,), {})|n_layer: int = 1|seed = seed = 1; n_layer = 1
(seed, n_head) = 1, 2|class A:\n  def __repr__(self): raise A\nseed = A()"""
FORMS = ("--{}={}", "--{}={}", "--{}={}", "--{}={}", "--{}", "-{}={}", "{}={}")
# Options that can make a command long, or let it touch other folders, are given last or not at all.
LAST = {"train": "max_iters=2 sample_tokens=4 compile=False", "sample": "max_new_tokens=4", "prepare": "data_dir=box"}
FIXED = "max_iters sample_tokens max_new_tokens compile input init_from ckpt data_dir out_dir"


def inputs(place: Workplace) -> Cases:
    """2,000 generated command lines, config files and texts."""
    for number in range(place.size(2000, 16)):
        yield str(number), partial(try_input, place, number)


@cache
def generate(batch: int) -> list[tuple[str, list[str], bytes]]:
    """The cases of a batch, whose number is their seed → script, arguments, content of the file that it reads"""
    try:
        from hypothesis import HealthCheck, Phase, given, seed, settings
        from hypothesis import strategies as st
    except ImportError:
        raise UserError("the campaign `inputs` needs a package: pip install hypothesis") from None

    def arguments(schema: Any, *more: Any) -> Any:
        keys = [
            key
            for key in (*option_types(schema), *NANOGPT_NOTICES.get(schema, {}), "sead", "")
            if key not in FIXED.split()
        ]
        flag = st.builds(str.format, st.sampled_from(FORMS), st.sampled_from(keys), value)
        return st.lists(st.one_of(flag, flag, *more), max_size=2)

    def config(head: bytes, lines: list[str], encoding: str) -> bytes:
        return head + "\n".join(["max_iters = 2", *lines]).encode(encoding, "replace")

    def unescape(line: str) -> str:
        return line.replace("\\n", "\n").replace("\\0", "\0").replace("\\t", "\t")

    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
    value = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.sampled_from(WORDS), text)
    literal = st.one_of(value.map(repr), st.sampled_from((*NUMBERS, "None", "[1]", "lambda: 1", "10**400", "True")))
    line = st.builds("{} = {}".format, st.sampled_from(list(option_types(TrainConfig))), literal)
    heads, encodings = (
        (b"", b"", b"", b"# coding: latin-1\n", b"\xff\n"),
        ("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"),
    )
    lines = st.lists(st.one_of(line, line, st.sampled_from(re.split(r"\||\n", LINES)).map(unescape)), max_size=3)
    code = st.builds(config, st.sampled_from(heads), lines, st.sampled_from(encodings))
    content = st.one_of(st.binary(max_size=200), text.map(lambda t: (t * 40).encode()), st.just(b"ab\r\ncd\n" * 99))
    folder, reading = (
        st.sampled_from(FOLDERS).map("--out_dir={}".format),
        st.sampled_from(("--start=FILE:f", "--score=FILE:f")),
    )
    train = st.tuples(st.just("train"), arguments(TrainConfig, folder), st.just(b"") | code)
    sample = st.tuples(st.just("sample"), arguments(SampleConfig, reading), content)
    prepare = st.tuples(st.just("prepare"), arguments(PrepareConfig), content)
    found: list[tuple[str, list[str], bytes]] = []
    quiet = {"database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    test = given(st.one_of(train, train, train, sample, prepare))(lambda case: found.append(case))
    seed(batch)(settings(max_examples=BATCH, **quiet)(test))()
    return found


def try_input(place: Workplace, number: int, folder: Path) -> Result:
    """Run a generated case in a folder of its own, and look at all that it has changed."""
    cases, data = generate(number // BATCH), place.folder / "data"
    script, argv, content = cases[number % BATCH % len(cases)]
    before = {
        "train": [*as_flags(TINY | {"data_dir": data, "out_dir": "box/run"}), *["f"] * bool(content)],
        "sample": [f"--ckpt={place.finished_run('adamw') / 'last.pt'}"],
        "prepare": ["--input=f", "--dataset=mine"],
    }
    argv = [*before[script], *argv, *(f"--{word}" for word in LAST[script].split())]
    (folder / "f").write_bytes(content)
    (folder / "box").mkdir()
    (folder / "box" / "file").touch()
    (folder / "argv.json").write_text(json.dumps(argv), encoding="utf-8")
    end = place.ask(f"{script}.py", argv, cwd=str(folder))
    own = (str(folder / "box"), str(folder / "out"), str(data), os.devnull)
    problems = [f"touched {path}" for path in end["changed"] if not os.path.realpath(path).startswith(own)]
    problems += [f"left {name}" for name in os.listdir(folder) if name not in ("f", "box", "argv.json", "out")]
    problems += [why] if (why := why_no_end(end)) else []
    problems += ["changed its input"] if (folder / "f").read_bytes() != content else []
    return {"accepted": int(end["codes"] == [0]), "refused": int(end["codes"] == [2]), "problems": problems}
