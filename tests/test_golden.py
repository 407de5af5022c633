"""Files that earlier versions wrote still open and give the same numbers; printed text is the text in tests/golden/.

If you change a text on purpose, write the new texts and look at the difference:

    QUILL_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py
    git diff tests/golden

format_1.pt and data/question are never written again. They are a checkpoint and a dataset of format 1, made by commit
aee3ddb from the sentence QUESTION, 40 times: conftest's TINY with n_embd=8, ema_decay=0.9, dropout=0.01,
learning_rate=0.03, lr_decay_iters=220 and 200 steps, on one thread.
"""

import csv
import os
import shutil
from pathlib import Path

import pytest

import export
import play
import prepare
import sample
import train
from quill.data import token_files

GOLDEN = Path(__file__).parent / "golden"
QUESTION = "To be, or not to be: that is the question.\n"
CPU = ["--device=cpu", "--dtype=float32"]


def assert_golden(name, text):
    """`text` is what tests/golden/`name` holds; or, with QUILL_UPDATE_GOLDEN set, what it holds from now on."""
    path = GOLDEN / name
    if os.environ.get("QUILL_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8", newline="\n")
    assert text == path.read_text(encoding="utf-8")


def printed(capsys, main, *argv):
    """What `main` prints for `argv` without an error."""
    capsys.readouterr()
    assert main([*map(str, argv)]) in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("script", [prepare, train, sample, export, play], ids=lambda script: script.__name__)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--help"])
    assert exit.value.code == 0
    assert_golden(f"{script.__name__}_help.txt", capsys.readouterr().out)


def test_dry_run(data_dir, capsys):
    flags = ["config/shakespeare_char.py", "--dataset=prose", f"--data_dir={data_dir}", *CPU, "--dry_run"]
    assert_golden("dry_run.txt", printed(capsys, train.main, *flags))


def test_score_table(capsys):
    flags = [f"--ckpt={GOLDEN / 'format_1.pt'}", "--score=to be: not the question", *CPU]
    assert_golden("score.txt", printed(capsys, sample.main, *flags))


def test_a_dataset_of_format_1_opens_and_is_written_the_same(tmp_path):
    dataset = token_files.open_dataset(GOLDEN / "data", "question")
    assert dataset.tokenizer.decode([*dataset.train, *dataset.val]) == QUESTION * 40
    (tmp_path / "question.txt").write_bytes((QUESTION * 40).encode())
    token_files.prepare(tmp_path / "question.txt", tmp_path / "again", "char", "none", "question")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "again" / name).read_bytes() == (GOLDEN / "data" / "question" / name).read_bytes(), name


def test_a_checkpoint_of_format_1_samples_and_resumes(tmp_path, capsys):
    """Two steps more, and the greedy text: the numbers to 1e-5, because processors round differently."""
    greedy = ["--temperature=0", "--num_samples=1", "--max_new_tokens=60", *CPU]
    before = printed(capsys, sample.main, f"--ckpt={GOLDEN / 'format_1.pt'}", *greedy)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(GOLDEN / "format_1.pt", run / "last.pt")
    flags = [f"--out_dir={run}", f"--data_dir={GOLDEN / 'data'}", "--init_from=resume", "--max_iters=202"]
    printed(capsys, train.main, *flags)
    after = printed(capsys, sample.main, f"--ckpt={run / 'last.pt'}", *greedy)
    assert_golden("format_1_greedy.txt", before + after)
    got = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    expected = (GOLDEN / "format_1_metrics.csv").read_text(encoding="utf-8").splitlines()
    names, row = (list(csv.reader(lines)) for lines in (got, expected))
    assert names[0] == row[0]
    assert len(names) == len(row) == 2
    numbers = zip(names[1][:5] + names[1][7:], row[1][:5] + row[1][7:], strict=True)  # without the two that are times
    assert all(float(one) == pytest.approx(float(other), abs=1e-5) for one, other in numbers)
