"""The commands and names of README, the tour and CONTRIBUTING are right, and every config trains two steps."""

import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import export
import prepare
import sample
import train
from bench import __main__ as bench
from bench import measure
from quill.cli import config_files, option_types, read_config_file
from quill.options import BenchConfig, ExportConfig, PlayConfig, PrepareConfig, SampleConfig, TrainConfig

ROOT = Path(__file__).parent.parent
SHORT = ["--max_iters=2", "--eval_iters=1", "--log_interval=1", "--sample_tokens=8"]  # for the end: later flags win
SCRIPTS = {"train.py": train, "sample.py": sample, "prepare.py": prepare, "export.py": export}
SCHEMAS = {
    "train.py": TrainConfig,
    "sample.py": SampleConfig,
    "prepare.py": PrepareConfig,
    "export.py": ExportConfig,
    "play.py": PlayConfig,
}
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
NANOGPT = "python data/shakespeare_char/prepare.py"  # nanoGPT's command, which README names beside ours


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(page):
    """The commands in a page's ```sh blocks, in order. `a && b` is two commands."""
    blocks = re.findall(r"```sh\n(.*?)```", read(page), flags=re.DOTALL)
    return [command for block in blocks for line in block.splitlines() for command in line.split(" && ") if command]


def inline_commands_of(page):
    """The commands between backquotes in a page's text and tables."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    return re.findall(r"`((?:python|bash|torchrun|pip|tensorboard) [^`]+)`", text)


def requirements():
    """The packages in requirements.txt, without torch."""
    return {re.match(r"[\w-]+", line)[0] for line in read("requirements.txt").splitlines() if line} - {"torch"}


def run_command(command, monkeypatch):
    """Run one command of a page, shortened."""
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        files = [name for flag, name in zip(words[2:], words[3:], strict=False) if flag == "-r"]
        assert all((ROOT / name).is_file() for name in files)
        assert files or words[2:] == ["tensorboard"] or set(words[2:]) == requirements()
    elif words[0] == "ruff":
        assert command in read(".ci/run")
    elif words[0] == "tensorboard":  # it serves until it is stopped; tests/test_tensorboard.py starts it
        assert words[1] == "--logdir=out" and (not find_spec("tensorboard") or [*Path("out").rglob("events.*")])
    elif words[0] == "torchrun":
        argv = [sys.executable, "-m", "torch.distributed.run", *words[1:], *SHORT]
        subprocess.run(argv, check=True, capture_output=True, timeout=120)
    elif words == ["python", "-m", "pytest"]:
        pass  # this test is part of it
    elif words == ["python", "-m", "pytest", "-m", "slow"]:
        pass
    elif words[:4] == ["python", "-m", "bench", "compare"]:
        assert bench.main([*words[3:], *SHORT, "--seeds=2"]) in (0, None), command
    elif words[1].startswith("docs/"):
        short = ["--steps=2"] if words[1] == "docs/scalar_gpt.py" else []
        subprocess.run(
            [sys.executable, ROOT / words[1], *words[2:], *short], check=True, capture_output=True, timeout=120
        )
    elif words[:3] == ["python", "-m", "bench"] and words[3] == "counts":
        assert bench.main(words[3:]) in (0, None), command
    elif "--tensorboard=True" in words and not find_spec("tensorboard"):
        pass
    else:
        assert words[0] == "python" and words[1] in SCRIPTS, f"{command}: this test does not know how to run it"
        argv = words[2:]
        if words[1] == "train.py":
            argv += [*SHORT, "--max_iters=3"] if "--init_from=resume" in argv else SHORT
        elif words[1] == "sample.py" and not any(word.startswith(("--score=", "--trace=")) for word in argv):
            argv.append("--max_new_tokens=20")
        assert SCRIPTS[words[1]].main(argv) in (0, None), command


@pytest.mark.skipif(not os.environ.get("QUILL_CORPORA"), reason="QUILL_CORPORA is not set: no Tiny Shakespeare")
@pytest.mark.parametrize(
    "page, count, leaves",
    [
        ("README.md", 23, {"names_muon", "names_ranks", "shakespeare_char_cpu", "mine", "tuned", "bench"}),
        ("docs/tour.md", 29, {"ladder", "question", "bench"}),
        ("docs/interop.md", 13, {"mine", "articles", "names", "names_last", "names_again", "names_tuned"}),
        ("CONTRIBUTING.md", 6, {"try", "bench"}),
    ],
)
def test_commands_run(page, count, leaves, tmp_path, monkeypatch, capsys):
    """A page's commands, in order, in an empty folder with links to the scripts. `leaves`: what out/ then has."""
    if page == "docs/interop.md":
        pytest.importorskip("tokenizers")

    def process(argv, cwd=None):  # what a bench starts runs in this process: importing torch again takes seconds
        assert argv[0] in SCRIPTS and SCRIPTS[argv[0]].main([str(word) for word in argv[1:]]) in (0, None)
        return 1.0, ""

    if page == "docs/interop.md":
        pytest.importorskip("safetensors")
    monkeypatch.setattr(measure, "process", process)
    for name in ("config", "docs", *SCRIPTS):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.txt").write_text("To be, or not to be: that is the question.\n" * 100, encoding="utf-8")
    (tmp_path / "more.txt").write_text("That is another question.\n" * 200, encoding="utf-8")
    (tmp_path / "texts").mkdir()
    articles = [json.dumps({"text": f"To be.\nOr not to be {n}."}) for n in range(100)]
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(articles), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = commands_of(page)
    assert len(commands) == count, "commands were added or removed: count them here too"
    for command in commands:
        run_command(command, monkeypatch)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= leaves
    if page == "docs/tour.md":
        rungs = {path.stem for path in (ROOT / "config" / "ladder").glob("*.py")}
        assert {path.name for path in (tmp_path / "out" / "ladder").iterdir()} == {"die", *rungs}


@pytest.mark.skipif(not os.environ.get("QUILL_CORPORA"), reason="QUILL_CORPORA is not set: no Tiny Shakespeare")
def test_commands_of_the_short_pages(tmp_path, monkeypatch, capsys):
    """They look into rung 7, which the tour trains."""
    pages = ["docs/why_log.md", "docs/why_sqrt_d.md", "docs/three_kinds.md"]
    commands = ["python train.py config/ladder/7_layernorm.py", *(c for page in pages for c in commands_of(page))]
    assert len(commands) == 1 + len(pages)
    for name in ("config", "docs", *SCRIPTS):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        run_command(command, monkeypatch)


def test_numbers_of_the_short_pages():
    """Softmaxes and slopes of why_sqrt_d.md, FLOPs of scale.md, perplexity and bits of why_log.md."""
    rows = re.findall(r"^\| ([\d, −]+) \| ([\d., ]+) \| (0\.\d+) \|$", read("docs/why_sqrt_d.md"), flags=re.MULTILINE)
    assert len(rows) == 2
    for scores, softmax, slope in rows:
        e = [math.exp(float(score.replace("−", "-"))) for score in scores.split(", ")]
        got = [float(p) for p in softmax.split(", ")]
        assert got == pytest.approx([x / sum(e) for x in e], abs=5e-4) and got[0] > 0.6
        assert float(slope) == pytest.approx(e[0] / sum(e) * (1 - e[0] / sum(e)), abs=5e-4)
    rung = 6 * 209_600 * 2000 * 32 * 64
    assert rung == pytest.approx(5.2e12, rel=0.01) and 6 * 175e9 * 300e9 / rung == pytest.approx(61e9, rel=0.01)
    assert pytest.approx(25, abs=0.5) == 6 * 175e9 * 300e9 / 4e14 / 3600 / 24 / 365
    assert math.exp(1.64) == pytest.approx(5.2, abs=0.05) and 1.64 / math.log(2) == pytest.approx(2.37, abs=5e-3)


def test_inline_commands_name_what_exists():
    """Scripts, files, benches and options of the commands inside a sentence or a table."""
    checked = 0
    for page in PAGES:
        for command in inline_commands_of(page):
            if command == NANOGPT:
                continue
            words = shlex.split(command)
            flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")} - {"help"}
            known = set()
            if words[:3] == ["python", "-m", "bench"]:
                names = [name for word in words[3:4] if word[0] not in "-…" for name in word.split("|")]
                assert all(f"python -m bench {name} " in bench.__doc__ for name in names), f"{page}: {command}"
                known = {*option_types(BenchConfig), *option_types(TrainConfig)}
            elif words[0] == "python" and words[1] in SCHEMAS:
                known = set(option_types(SCHEMAS[words[1]]))
            paths = [word for word in words if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|sh|md)|\w+\.py", word)]
            missing = [path for path in paths if not (ROOT / path).is_file()]
            assert not missing or "your_run" in command, f"{page}: {command}"
            assert flags <= known or words[0] == "pip", f"{page}: {command}"
            checked += 1
    assert checked >= 20


NOT_NAMES = {"u", "q", "e", "i", "l"}  # characters of a text, which the tour quotes
EXAMPLES = {"config.your_option", "config/your_run.py"}  # what a contributor would add


class Names:
    """What the Python files of the repository define, but for this one, which has names that do not exist."""

    def __init__(self):
        folders = ("quill", "bench", "config", "docs", "tests")
        self.files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
        self.files.remove(Path(__file__))
        self.text, self.names, self.strings, self.members = "", set(), set(), {}
        for path in self.files:
            text = path.read_text(encoding="utf-8")
            self.text += text
            for node in ast.walk(ast.parse(text)):
                self.names |= defined_by(node)
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    self.strings.add(node.value)
                if isinstance(node, ast.ClassDef):
                    members = set().union(*map(defined_by, ast.walk(node)))
                    self.members.setdefault(node.name, set()).update(members - {node.name})

    def has(self, name):
        """Whether `name` is a file, a name, a member of a class, or a string of the source."""
        if "/" in name or name.endswith((".py", ".md", ".txt", ".csv")):
            found = (ROOT / name).exists() or any(path.as_posix().endswith(f"/{name}") for path in self.files)
            return found or name in self.strings
        owner, dot, member = name.rpartition(".")
        if owner in self.members:
            return member in self.members[owner]
        if dot:  # such as F.cross_entropy
            return re.search(rf"\b{re.escape(name)}\b", self.text) is not None
        return name in self.names | self.strings


def defined_by(node):
    """The names that a node of a syntax tree defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        return {node.id if isinstance(node, ast.Name) else node.attr}
    return set()


def names_in(page):
    """The texts between backquotes that look like a path or a name. `n_layer = 0` is n_layer."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    quoted = {re.split(r" ?= ?", quoted)[0] for quoted in re.findall(r"`([^`]+)`", text)}
    return {name for name in quoted if re.fullmatch(r"[\w./]*\w/?", name)} - NOT_NAMES - EXAMPLES


@pytest.mark.parametrize("page, count", [("docs/tour.md", 30), ("CONTRIBUTING.md", 50)])
def test_names_in_a_page_exist(page, count):
    known, names = Names(), names_in(page)
    assert len(names) >= count
    assert sorted(name for name in names if not known.has(name)) == []


def test_a_name_that_does_not_exist_is_found():
    known = Names()
    wrong = ["GPT.forwards", "F.cross_entropies", "quill/nothing.py", "nothing.py", "no_such_name", "ModelConfig.seed"]
    assert not any(map(known.has, wrong))
    assert all(map(known.has, ["GPT.forward", "F.cross_entropy", "observer.py", "wte", "ModelConfig.norm", "bench/"]))


def test_links_between_pages():
    """Every relative link in a page leads to a file."""
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)[^)]*\)", read(page))]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) >= 20
    assert [(page, link) for page, link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.stem)
def test_every_shipped_config_takes_two_steps(path, data_dir, tmp_path):
    """On the tiny datasets, all else as shipped but the batch, cut to two rows, and GPT-2's depth."""
    dataset = "words" if "names" in read_config_file(path, TrainConfig).get("dataset", "") else "prose"
    argv = [f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", *SHORT]
    argv += ["--batch_size=2", "--gradient_accumulation_steps=1", "--device=cpu", "--final_samples=1"]
    if "gpt" in path.stem or path.parent.name == "gpt3":  # longer than the tiny split, and 124M parameters are slow
        argv += ["--block_size=128", "--n_layer=2", "--n_head=2", "--n_embd=64"]
    assert train.main([str(path), *argv]) == 0
    assert (tmp_path / "run" / "best.pt").is_file()
