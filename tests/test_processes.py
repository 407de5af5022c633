"""The commands as users run them: exit codes, signals, kill -9, pipes. Several ranks are in test_torchrun.py."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from quill import checkpoint
from quill.cli import config_files

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*argv, check=None, **options):
    """Run a script of ours. → CompletedProcess with text output"""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120, **options
    )
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def losses(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [(float(row["train_loss"]), float(row["val_loss"])) for row in csv.DictReader(file)]


@pytest.mark.slow  # 14 s; the quick campaign in tests/test_faults.py kills runs too
def test_a_run_killed_4_times_ends_as_the_undisturbed_one(flags, tmp_path):
    options = {"max_iters": 400, "lr_decay_iters": 400, "eval_interval": 4, "dropout": 0.1, "optimizer": "muon"}
    command("train.py", *flags(**options, out_dir=tmp_path / "whole"), check=0)  # the same number of threads
    killed = flags(**options, out_dir=tmp_path / "killed", init_from="auto")
    done = command("tests/killed_run.py", 4, 1, *killed, check=0)
    assert "killed 4 times" in done.stdout and done.stderr == ""
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert parts["step"] == 400
    assert all(torch.equal(weight, whole["model"][name]) for name, weight in parts["model"].items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed")) == [".run", "best.pt", "last.pt", "metrics.csv"]


@pytest.mark.parametrize(
    "number, code", [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_exit_code_of_a_signal(flags, tmp_path, number, code):
    argv = [sys.executable, "train.py", *flags(max_iters=100_000)]
    process = subprocess.Popen(argv, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 50/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err == "" and "continue with --init_from=resume" in out
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] >= 50


def test_a_bare_command_lists_the_configs(capsys):
    assert train.main([]) == 2
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    for path in config_files():
        assert listed.count(path.relative_to(ROOT).as_posix()) == 1


def test_mistakes_are_one_line_and_exit_code_2(flags, tmp_path):
    read_only = tmp_path / "file"
    read_only.write_text("")
    cases = [
        (["config/shakespear_char.py"], "did you mean config/shakespeare_char.py?"),
        (["config/names.py", "config/names.py"], "one config file"),
        ([*flags(), "--block_sise=3"], "did you mean block_size?"),
        ([*flags(), "--block_size=100000"], "too few for --block_size=100000"),
        ([*flags(), "--dataset=prosa"], "prosa"),
        ([*flags(), "--init_from=resume"], "nothing to resume"),
        ([*flags(), f"--out_dir={read_only}/x"], "can't be written to"),
        ([*flags(), "--device=tpu"], "--device=tpu"),
        ([*flags(), "--dtype=float16"], "--dtype=float16"),
    ]
    # One process for all of them. `run` is what the command line calls too.
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n"
        "import train\nfrom quill.cli import run\n"
        "for argv in eval(sys.stdin.read()):\n"
        "    sys.argv[1:] = argv\n"
        "    try: run(train.main)\n"
        "    except SystemExit as exit: print('exit code', exit.code, file=sys.stderr)\n"
    )
    done = command("-c", code, input=repr([argv for argv, _ in cases]), check=0)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(cases) and done.stdout == ""
    for (argv, words), line, exit_code in zip(cases, lines[::2], lines[1::2], strict=True):
        assert line.startswith("train.py: ") and words in line, argv
        assert exit_code == "exit code 2"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [9000, 60])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(flags, tmp_path, limit):
    """A limit of the file size is used as a full disk: the second save fails halfway, or the second row before it."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n"
        "import resource, signal, train\nfrom quill.cli import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "step = train.train_step\n"
        "def tight(state, *args):\n"
        f"    if state.progress.step == 30: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "    return step(state, *args)\n"
        "train.train_step = tight\nrun(train.main)\n"
    )
    done = command("-c", code, *flags(), check=2)
    assert done.stderr.startswith("train.py: can't write") and "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 20
    assert sorted(os.listdir(tmp_path / "run")) == [".run", "best.pt", "last.pt", "metrics.csv"]


@pytest.mark.slow
def test_a_closed_pipe_is_silent(flags, tmp_path):
    assert train.main(flags(max_iters=2)) == 0
    shell = f"{sys.executable} sample.py --out_dir={tmp_path / 'run'} --device=cpu --max_new_tokens=20000 | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], cwd=ROOT, env=ENV, capture_output=True, timeout=60)
    assert len(done.stdout) == 5 and done.stderr == b""


def test_importing_does_nothing(tmp_path):
    """Every module of ours, one after the other: no thread, seed, signal, environment or file is touched."""
    code = (
        f"import importlib, sys, os, random, signal; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\n"
        "def state():\n"
        "    settings = (torch.get_num_threads(), torch.get_default_dtype(), signal.getsignal(signal.SIGINT))\n"
        "    return torch.get_rng_state().tolist(), random.getstate(), settings, dict(os.environ)\n"
        "before = state()\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert state() == before, name\n"
    )
    files = [*ROOT.glob("*.py"), *ROOT.glob("quill/**/*.py"), *ROOT.glob("bench/**/*.py")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("transformers")]
    names = sorted(set(names) - {"quill.start"})  # which scripts import when they are run, and not when imported
    assert {"train", "model", "quill.data.batches", "bench.__main__"} <= set(names)
    argv = [sys.executable, "-c", code, *names]
    done = subprocess.run(argv, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    assert os.listdir(tmp_path) == []
