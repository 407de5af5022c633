"""The commands of README and of the tour, as they stand there, and every shipped config, two steps each."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import prepare
import sample
import train
from quill.cli import config_files, read_config_file
from quill.options import TrainConfig

ROOT = Path(__file__).parent.parent
SHORT = ["--max_iters=2", "--eval_iters=1", "--log_interval=1"]  # later flags win


def commands_of(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "page, leaves",
    [
        ("README.md", {"names", "shakespeare_char_cpu", "mine"}),
        ("docs/tour.md", {"ladder"}),
    ],
)
def test_commands_run(page, leaves, tmp_path, monkeypatch, capsys):
    """A page's commands, in their order, in a folder of their own, with two steps for each training."""
    if not os.environ.get("QUILL_CORPORA"):
        pytest.skip("QUILL_CORPORA is not set: no Tiny Shakespeare without a network")
    for name in ("config", "train.py", "sample.py", "prepare.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.txt").write_text("To be, or not to be: that is the question.\n" * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands_of(page):
        for command in line.split(" && "):
            words = shlex.split(command)
            if words[:2] == ["pip", "install"]:
                assert all((ROOT / word).is_file() for word in words[3:])
            elif words == ["python", "-m", "pytest"]:
                pass  # this is it
            elif "--tensorboard=True" in words and not find_spec("tensorboard"):
                continue
            elif words[0] == "tensorboard":  # serves until it is stopped: tests/test_board.py
                assert words[1] == "--logdir=out" and (not find_spec("tensorboard") or [*Path("out").rglob("events.*")])
            elif words[0] == "torchrun":
                argv = [sys.executable, "-m", "torch.distributed.run", *words[1:], *SHORT]
                subprocess.run(argv, check=True, capture_output=True, timeout=120)
            else:
                script = {"train.py": train, "sample.py": sample, "prepare.py": prepare}[words[1]]
                if script is train and "--init_from=resume" in words:
                    words = [*words, *SHORT, "--max_iters=3"]
                elif script is train:
                    words = [*words, *SHORT]
                elif script is sample and not any(word.startswith("--score=") for word in words):
                    words = [*words, "--max_new_tokens=20"]
                assert words[0] == "python" and script.main(words[2:]) in (0, None), command
            ran.append(command)
    assert len(ran) >= 12
    assert {path.name for path in (tmp_path / "out").iterdir()} >= leaves
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.stem)
def test_every_shipped_config_takes_two_steps(path, data_dir, tmp_path):
    """On the tiny datasets, all else as shipped but the batch, cut to two rows, and GPT-2's depth."""
    text = path.read_text(encoding="utf-8")
    dataset = "words" if "names" in read_config_file(path, TrainConfig).get("dataset", "") else "prose"
    argv = [f"--dataset={dataset}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", *SHORT]
    argv += ["--batch_size=2", "--gradient_accumulation_steps=1", "--device=cpu", "--final_samples=1"]
    if "block_size = 1024" in text:
        argv += ["--block_size=128", "--n_layer=2"]  # the tiny split is shorter than a block, and 124M parameters slow
    assert train.main([str(path), *argv]) == 0
    assert (tmp_path / "run" / "best.pt").is_file()
