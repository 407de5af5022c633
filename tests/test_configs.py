"""What each config's docstring says: its command, and the time and loss of docs/records. The slow tests train."""

import ast
import csv
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from quill import checkpoint
from quill.cli import config_files

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "records"
# The only two forms of a docstring's last line: this one, and "Not measured."
MEASURED = re.compile(
    r"Measured: (?P<seconds>[\d,.]+) s \((?P<cores>\d+) CPU cores?, (?P<dtype>bf16|fp32), n = (?P<runs>\d+)\), "
    r"validation loss (?P<loss>\d\.\d{3}) \(n = (?P<seeds>\d+)\)\."
)
COLUMNS = ("cores", "dtype", "seconds", "runs", "loss", "seeds", "record")


def trains(test):
    """Mark a test that trains a config as shipped: minutes each, and on the real corpora."""
    reason = "QUILL_CORPORA is not set: this test needs the real corpora"
    return pytest.mark.slow(pytest.mark.skipif(not os.environ.get("QUILL_CORPORA"), reason=reason)(test))


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def table_of_records():
    """The table in docs/records/README.md. → {config: {column: cell}, or None if it says "not measured"}"""
    rows = {}
    for line in (RECORDS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `config/"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert name not in rows, f"two rows for {name}"
            rows[name.strip("`")] = None if cells[0] == "not measured" else dict(zip(COLUMNS, cells, strict=True))
    return rows


def is_rounded(short, exact):
    """Whether the number `short` is `exact`, rounded to the digits that `short` has."""
    short, exact = (Decimal(number.replace(",", "")) for number in (short, exact))
    return abs(short - exact) <= Decimal(1).scaleb(short.as_tuple().exponent) / 2


def test_rounding_by_hand():
    assert is_rounded("59", "59.3") and is_rounded("1.449", "1.4486") and is_rounded("1,366", "1,366")
    assert not is_rounded("60", "59.3") and not is_rounded("1.448", "1.4486") and not is_rounded("2.3", "2.379")


def test_the_table_of_records_has_every_config():
    shipped = [f"config/{path.relative_to(ROOT / 'config').as_posix()}" for path in config_files()]
    assert sorted(table_of_records()) == sorted(shipped) and len(shipped) >= 18


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.stem)
def test_a_docstring_has_the_command_and_what_the_records_say(path):
    name, doc = f"config/{path.relative_to(ROOT / 'config').as_posix()}", docstring(path)
    commands = re.findall(r"^    (?:python|torchrun .*) (train\.py \S+)", doc, flags=re.MULTILINE)
    assert commands == [f"train.py {name}"]
    row, last = table_of_records()[name], doc.splitlines()[-1]
    if row is None:
        assert last == "Not measured."
        return
    claim = MEASURED.fullmatch(last)
    assert claim, f"{name}: {last!r} is neither 'Measured: …' nor 'Not measured.'"
    for key in ("cores", "dtype", "runs", "seeds"):
        assert claim[key] == row[key], key
    for key in ("seconds", "loss"):
        assert is_rounded(claim[key], row[key]), key
    record = RECORDS / re.fullmatch(r"\[.+\]\((.+\.md)\)", row["record"])[1]
    numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", record.read_text(encoding="utf-8"))
    assert {row["seconds"], row["loss"]} <= set(numbers), f"{record.name} does not have these figures"


def test_no_other_line_looks_like_a_measurement():
    """A docstring says "measured" in its last line only."""
    for path in config_files():
        assert "measured" not in " ".join(docstring(path).splitlines()[:-1]).lower(), path


# ---------------------------------------------------------------- slow: the real runs


def train(tmp_path, config, *flags):
    """`python train.py CONFIG` as shipped. → the rows of metrics.csv, as floats"""
    argv = [sys.executable, "train.py", config, f"--out_dir={tmp_path / 'run'}", f"--data_dir={tmp_path / 'data'}"]
    subprocess.run([*argv, "--device=cpu", *flags], cwd=ROOT, check=True, capture_output=True)
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@trains
def test_the_laptop_recipe(tmp_path):
    """nanoGPT's own run of this recipe, evaluated in the same way, ends at 1.898."""
    rows = train(tmp_path, "config/shakespeare_char_cpu.py")
    assert rows[-1]["step"] == 2000 and rows[-1]["val_loss"] <= 1.90


@trains
def test_the_first_command(tmp_path):
    rows = train(tmp_path, "config/names.py")
    assert rows[-1]["val_loss"] <= 2.36


@trains
def test_the_fast_recipe(tmp_path):
    """No longer than nanoGPT's laptop recipe. docs/records has the mean of five seeds; this is one seed."""
    rows = train(tmp_path, "config/shakespeare_char_fast.py")
    assert rows[-1]["val_loss"] <= 1.52


@trains
def test_the_speed_run(tmp_path):
    """nanoGPT's laptop recipe ends at 1.898, after 105 s on the same CPU."""
    rows = train(tmp_path, "config/speedrun_cpu.py")
    assert rows[-1]["val_loss"] <= 1.898


@trains
def test_the_laptop_recipe_to_a_gpu_s_loss(tmp_path):
    """nanoGPT's README gives 1.4697 after three minutes of an A100. This test takes five minutes."""
    rows = train(tmp_path, "config/shakespeare_char_laptop.py")
    assert rows[-1]["val_loss"] <= 1.4697


@trains
def test_microgpt_trained_for_longer(tmp_path):
    """The best published figure for these 4,192 parameters is 2.204. This is on held-out names."""
    rows = train(tmp_path, "config/microgpt.py", "--batch_size=32", "--max_iters=10000", "--eval_interval=10000")
    assert rows[-1]["val_loss"] <= 2.16


@trains
def test_the_stronger_model_of_names(tmp_path):
    """1.959 in docs/records, on names that are held out with all their copies, with at most 200,000 parameters."""
    rows = train(tmp_path, "config/names32k.py")
    assert rows[-1]["val_loss"] <= 1.97
    assert checkpoint.load_model(checkpoint.load(tmp_path / "run" / "last.pt")).num_params() <= 200_000
