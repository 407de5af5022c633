"""observers/: each event reaches every observer once, with the numbers of the run; metrics.csv; the console."""

import csv
import math
from dataclasses import replace

import pytest

import train
from quill import observers
from quill.errors import UserError
from quill.machine import pick_machine
from quill.observers import metrics_csv
from quill.observers.console import Console
from quill.observers.metrics_csv import COLUMNS, MetricsFile
from quill.observers.observer import Evaluation, Observer
from quill.options import TrainConfig

TIMES = {"tokens_per_s": 1234.5, "seconds": 3.00049}
EVALUATION = Evaluation(step=20, lr=0.1, train_loss=2.0, val_loss=1.5, bits_per_byte=1.25, **TIMES)


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self):
        self.events = []

    def stepped(self):
        self.events.append("stepped")

    def logged(self, entry):
        self.events.append(entry)

    def evaluated(self, evaluation):
        self.events.append(evaluation)

    def sampled(self, step, texts):
        self.events.append(texts)

    def finished(self, best_val_loss, texts):
        self.events.append(("finished", best_val_loss, texts))

    def close(self):
        self.events.append("closed")


def test_a_run_tells_every_event_once_and_in_order(flags, monkeypatch, tmp_path):
    recorder, opened = Recorder(), observers.Observers.__init__

    def open_with_recorder(self, *args):
        opened(self, *args)
        self.observers.append(recorder)

    monkeypatch.setattr(observers.Observers, "__init__", open_with_recorder)
    assert train.main(flags(max_iters=6, eval_interval=4, log_interval=3, eval_samples=1, final_samples=2)) == 0
    names = [event if isinstance(event, str) else type(event).__name__ for event in recorder.events]
    assert names == [
        *["stepped"] * 3, "LogEntry", "stepped", "LogEntry", "Evaluation", "list",
        *["stepped"] * 2, "LogEntry", "Evaluation", "list", "tuple", "closed",
    ]  # fmt: skip
    entries = [event for event in recorder.events if isinstance(event, observers.LogEntry)]
    evaluations = [event for event in recorder.events if isinstance(event, Evaluation)]
    assert [entry.step for entry in entries] == [3, 4, 6]
    assert [evaluation.step for evaluation in evaluations] == [4, 6]
    assert evaluations[0].train_loss == pytest.approx((3 * entries[0].loss + entries[1].loss) / 4)
    assert evaluations[1].train_loss == pytest.approx(entries[2].loss)
    assert [len(event) for event in recorder.events if isinstance(event, list)] == [1, 1]
    assert len(recorder.events[-2][2]) == 2
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, evaluation in zip(rows, evaluations, strict=True):
        assert float(row["val_loss"]) == evaluation.val_loss and float(row["lr"]) == evaluation.lr
        assert float(row["perplexity"]) == math.exp(evaluation.val_loss)
        assert (
            float(row["bits_per_byte"]) == evaluation.bits_per_byte == pytest.approx(evaluation.val_loss / math.log(2))
        )


def test_a_sampling_that_fails_costs_no_row(flags, monkeypatch, tmp_path, capsys):
    def broken(*args):
        raise UserError("out of memory")

    monkeypatch.setattr(observers, "draw_samples", broken)
    with pytest.raises(UserError, match="out of memory"):
        train.main(flags(max_iters=2, eval_interval=2, eval_samples=1))
    assert "step 2: train loss" in capsys.readouterr().out
    assert len((tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 2


def test_observers_are_closed_after_an_error(flags, monkeypatch):
    recorder, opened = Recorder(), observers.Observers.__init__

    def open_with_recorder(self, *args):
        opened(self, *args)
        self.observers.append(recorder)

    def broken(*args):
        raise UserError("no")

    monkeypatch.setattr(observers.Observers, "__init__", open_with_recorder)
    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(UserError):
        train.main(flags())
    assert recorder.events == ["closed"]


def test_metrics_rows_by_hand(tmp_path):
    metrics = MetricsFile(str(tmp_path), 0)
    metrics.evaluated(EVALUATION)
    lines = (tmp_path / "metrics.csv").read_bytes().decode().split("\n")
    assert lines == [",".join(COLUMNS), f"20,0.1,2.0,1.5,{math.exp(1.5)},1234.5,3.0,1.25", ""]


def test_an_older_file_keeps_its_columns_and_its_rows(tmp_path):
    """quill 0.1 wrote the first seven columns. A run of it that is resumed goes on with these."""
    path, older = tmp_path / "metrics.csv", "step,lr,train_loss,val_loss,perplexity,tokens_per_s,seconds"
    path.write_text(
        f"{older}\n10,0.1,3.0,2.5,12.18,1000.0,1.5\n30,0.1,3.0,2.5,12.18,1000.0,1.5\n15,0.1\n", encoding="utf-8"
    )
    MetricsFile(str(tmp_path), 10).evaluated(EVALUATION)
    rows = [older, "10,0.1,3.0,2.5,12.18,1000.0,1.5", f"20,0.1,2.0,1.5,{math.exp(1.5)},1234.5,3.0"]
    assert path.read_text(encoding="utf-8").splitlines() == rows
    assert older == ",".join(COLUMNS[:7])


@pytest.mark.parametrize("damaged", [b"", b"\n", b"\0\xff\n20,1\n", b"lr,step\n0.1,1\n", b"x" * 5000])
def test_a_file_without_a_header_begins_anew(tmp_path, damaged):
    (tmp_path / "metrics.csv").write_bytes(damaged)
    MetricsFile(str(tmp_path), 20).evaluated(EVALUATION)
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        assert [(row["step"], row["bits_per_byte"]) for row in csv.DictReader(file)] == [("20", "1.25")]


@pytest.mark.parametrize(
    "bits, shown", [(1.25, "val loss 1.5000 (1.2500 bits per byte), "), (math.nan, "(– bits per byte)")]
)
def test_the_log_line_of_an_evaluation(flags, bits, shown, capsys):
    config = TrainConfig(**train.read_args(flags(), TrainConfig, "")[1])
    Console(config, 0, pick_machine(config), 1.0).evaluated(replace(EVALUATION, bits_per_byte=bits))
    line = capsys.readouterr().out
    assert line.startswith("step 20: train loss 2.0000, val loss 1.5000") and shown in line


def test_a_column_that_no_evaluation_has_is_an_error(tmp_path, monkeypatch):
    """A column whose field in Evaluation was forgotten must not become empty cells."""
    monkeypatch.setattr(metrics_csv, "COLUMNS", [*COLUMNS, "forgotten"])
    with pytest.raises(KeyError, match="forgotten"):
        MetricsFile(str(tmp_path), 0).evaluated(EVALUATION)


def test_rows_after_the_checkpoint_and_damaged_rows_are_dropped(tmp_path):
    metrics = MetricsFile(str(tmp_path), 0)
    for step in (10, 20, 30):
        metrics.evaluated(replace(EVALUATION, step=step))
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"\n\0\0\n15,0.1\nx,0.1,2.0,1.5,1.0,1.0,1.0,1.0\n25")
    MetricsFile(str(tmp_path), 20)
    assert [line.split(",")[0] for line in path.read_text(encoding="utf-8").splitlines()] == ["step", "10", "20"]


def test_a_row_that_cant_be_written_is_one_line(tmp_path):
    metrics = MetricsFile(str(tmp_path), 0)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match="can't write .*metrics.csv: Is a directory"):
        metrics.evaluated(EVALUATION)
