"""run_folder.py: one run, one folder. What a start finds there, what it refuses, and what it may delete."""

import os
import signal
import subprocess
import sys
import time

import pytest

import train
from quill import checkpoint
from quill.errors import UserError
from quill.files import folder_lock
from quill.run_folder import what_is_kept

ROOT = os.path.dirname(train.__file__)


def run(flags):
    assert train.main(flags) == 0


def start(flags, **options):
    """A run of train.py in a process of its own, up to its first log line."""
    argv = [sys.executable, "train.py", *flags]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    for line in process.stdout:
        if line.startswith("step "):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("file", ["metrics.csv", "ckpt.pt", "tensorboard/events.out.tfevents.1", "last.pt"])
def test_a_fresh_run_replaces_nothing_of_another(flags, tmp_path, file):
    """Whatever the file holds, it stays, and the line names it."""
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text("precious", encoding="utf-8")
    for init_from in ("scratch", "auto") if file != "last.pt" else ("scratch",):
        with pytest.raises(UserError, match=f"{file} is another run's.*--overwrite=True"):
            train.main(flags(init_from=init_from))
    assert path.read_text(encoding="utf-8") == "precious"
    if file != "last.pt":
        run(flags(max_iters=2, overwrite=True))
        assert path.exists() == (file in ("ckpt.pt", "metrics.csv"))
        assert file != "ckpt.pt" or path.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("init_from", ["auto", pytest.param("scratch", marks=pytest.mark.slow)])
def test_a_run_killed_before_its_first_save_starts_again(flags, tmp_path, init_from):
    options = {"max_iters": 100_000, "eval_interval": 100_000, "init_from": init_from, "tensorboard": True}
    process = start(flags(**options))
    process.kill()
    process.communicate()
    held = {path.name for path in (tmp_path / "run").iterdir()}
    assert {".run", "metrics.csv", "tensorboard"} <= held
    assert not [name for name in held if name.endswith(".pt")]
    with pytest.raises(UserError, match="metrics.csv is another run's"):
        train.main(flags(**options, learning_rate=0.02))  # other options: another run
    process = start(flags(**options))
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1] == ""
    assert process.returncode == 143
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] > 0


def test_a_run_that_starts_while_another_ends_deletes_nothing(flags, tmp_path):
    """Start A, start B with the same command, and let A save: B is refused, or finds what A has saved."""
    options = {"max_iters": 100_000, "eval_interval": 100_000}
    a = start(flags(**options))
    with pytest.raises(UserError, match="another process is writing there"):
        train.main(flags(**options))
    a.send_signal(signal.SIGTERM)
    a.communicate()
    saved = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match="last.pt is another run's"):
        train.main(flags(**options))
    assert (tmp_path / "run" / "last.pt").read_bytes() == saved


def test_the_folder_is_looked_at_under_its_lock(flags, tmp_path, monkeypatch):
    """A checkpoint that appears right before the lock is seen, because nothing was looked at before it."""
    lock = train.folder_lock

    def late(path):
        path.mkdir()
        (path / "last.pt").write_bytes(b"another run's")
        return lock(path)

    monkeypatch.setattr(train, "folder_lock", late)
    with pytest.raises(UserError, match="last.pt is another run's"):
        train.main(flags())
    assert (tmp_path / "run" / "last.pt").read_bytes() == b"another run's"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gradient_accumulation_steps": 2**63 - 1}, "--gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": 10**15}, "too many|out of memory"),
        ({"batch_size": 10**12}, "too many|out of memory"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"n_embd": 2**40, "n_head": 1, "mlp_ratio": 0}, "out of memory"),
        ({"learning_rate": "1" * 400}, "--learning_rate"),
    ],
)
def test_a_start_that_fails_keeps_the_run_that_it_would_have_replaced(flags, tmp_path, options, words):
    run(flags(max_iters=2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=words):
        train.main(flags(overwrite=True, **options))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    with pytest.raises(UserError, match=words):
        train.main(flags(out_dir=tmp_path / "fresh", **options))
    assert not (tmp_path / "fresh").exists()  # nothing was begun there


def test_links_are_never_written_through(flags, tmp_path):
    """Links in the place of every file that a run writes; a linked out_dir works."""
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    for name in ("last.pt", "best.pt", "metrics.csv", ".run", ".last.pt.tmp", ".last.pt.0.tmp"):
        (tmp_path / "real" / name).symlink_to(victim)
    with pytest.raises(UserError, match="another run's"):
        train.main(flags(max_iters=2))
    run(flags(max_iters=2, overwrite=True))
    assert victim.read_text(encoding="utf-8") == "precious"
    assert sorted(os.listdir(tmp_path / "real")) == [".run", "best.pt", "last.pt", "metrics.csv"]
    assert not (tmp_path / "real" / "last.pt").is_symlink()
    (tmp_path / "real" / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=".lock: can't be written to: is a symbolic link"):
        train.main(flags(max_iters=3, init_from="resume"))


def test_leftovers_of_a_kill_are_removed_under_the_lock(flags, tmp_path):
    run(flags(max_iters=2))
    left = tmp_path / "run" / ".last.pt.0123abcd.tmp"
    left.write_bytes(b"half a checkpoint")
    with folder_lock(tmp_path / "elsewhere"):
        assert left.exists()
    run(flags(max_iters=3, init_from="resume"))
    assert not left.exists()


def test_a_lock_waits_if_asked_and_is_released(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from quill.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('locked', flush=True); time.sleep(0.5)\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "folder")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        began = time.monotonic()
        with folder_lock(tmp_path / "folder", wait=True):
            assert time.monotonic() - began > 0.2
    with folder_lock(tmp_path / "folder"):
        pass


def test_messages_say_what_is_kept(flags, tmp_path):
    assert what_is_kept(tmp_path / "run") == "no checkpoint had been saved"
    run(flags(max_iters=2))
    assert what_is_kept(tmp_path / "run") == f"{tmp_path / 'run' / 'last.pt'} is kept"
