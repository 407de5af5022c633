"""observers/page.py: the files of the page, the run that waits, and a training that is the same with and without it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from quill import checkpoint
from quill.errors import UserError
from quill.files import replacing
from quill.observers import page
from quill.observers.page import list_snapshots, read_state

ROOT = Path(__file__).parent.parent


def state_of(folder):
    return read_state(Path(folder) / "page" / "state.json")


def steps_of(folder):
    return [row[0] for row in state_of(folder)["curve"]]


def snapshots_of(folder):
    return list_snapshots(Path(folder) / "page")


def wait_for(folder, status, step, seconds=20):
    """Wait until state.json has this status and step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = state_of(folder)
        if state and (state["status"], state["step"]) == (status, step):
            return state
        time.sleep(0.005)
    raise AssertionError(f"no {status} at step {step}: {state_of(folder)}")


def stop_when_waiting(folder, step, number):
    """Send this process a signal as soon as its run waits at `step`."""
    wait_for(folder, "waiting", step)
    os.kill(os.getpid(), number)


def beside(work):
    """Run `work` in a thread; → a function that ends the thread and raises its error."""
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)
            os.kill(os.getpid(), signal.SIGTERM)  # so that a waiting run ends

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join(30)
        assert not errors, errors

    return join


def assert_same(one, other, but=("config", "flags", "seconds", "threads")):
    """All tensors and values of two checkpoints are equal, bit for bit."""

    def compare(a, b, name):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), name
            for key in a.keys() - set(but):
                compare(a[key], b[key], f"{name}.{key}")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), name
            for i, pair in enumerate(zip(a, b, strict=True)):
                compare(*pair, f"{name}[{i}]")
        else:
            assert a == b, name

    compare(checkpoint.load(one), checkpoint.load(other), "state")


def control(folder, step):
    with replacing(Path(folder) / "page" / "control") as (file,):
        file.write(str(step).encode())


# ---------------------------------------------------------------- the same training


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"ema_decay": 0.9, "dropout": 0.1, "log_interval": 7, "optimizer": "muon"},
    ],
)
def test_weights_are_bitwise_the_same_with_the_page_and_after_a_stop(flags, tmp_path, options):
    assert train.main(flags(out_dir=tmp_path / "without", **options)) == 0
    assert train.main(flags(out_dir=tmp_path / "with", page=True, **options)) == 0
    assert_same(tmp_path / "without" / "last.pt", tmp_path / "with" / "last.pt")

    stopped = tmp_path / "stopped"
    control(stopped, 13)

    join = beside(lambda: stop_when_waiting(stopped, 13, signal.SIGTERM))
    assert train.main(flags(out_dir=stopped, page=True, **options)) == 128 + signal.SIGTERM
    join()
    assert checkpoint.load(stopped / "last.pt")["step"] == 13
    assert state_of(stopped)["status"] == "stopped"
    assert train.main(flags(out_dir=stopped, page=True, init_from="resume", **options)) == 0
    assert_same(tmp_path / "without" / "last.pt", stopped / "last.pt")
    assert state_of(stopped)["curve"] == state_of(tmp_path / "with")["curve"]
    assert snapshots_of(stopped) == snapshots_of(tmp_path / "with") == [*range(41)]


# ---------------------------------------------------------------- waiting


def test_a_run_waits_at_step_0_takes_single_steps_and_ends_where_it_waits(flags, tmp_path, monkeypatch, capsys):
    folder, latencies, waited, wait = tmp_path / "run", [], [], page.Page._wait
    control(folder, 0)

    def timed(self, stop):
        began = time.perf_counter()
        wait(self, stop)
        waited.append(time.perf_counter() - began)

    monkeypatch.setattr(page.Page, "_wait", timed)

    def click():
        wait_for(folder, "waiting", 0)
        assert checkpoint.load(folder / "page" / "live.pt")["step"] == 0
        for step in range(1, 21):
            began = time.monotonic()
            control(folder, step)
            wait_for(folder, "waiting", step)
            latencies.append(time.monotonic() - began)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    join = beside(click)
    began = time.perf_counter()
    assert train.main(flags(page=True, eval_interval=1000)) == 128 + signal.SIGTERM
    seconds = time.perf_counter() - began
    join()
    assert sorted(latencies)[10] < 0.5  # the median; the start of a process takes seconds
    saved = checkpoint.load(folder / "last.pt")
    assert saved["step"] == 20 and len(saved["losses"]) == 20
    assert sum(waited) > 0.3 and saved["seconds"] + sum(waited) < seconds  # waiting is not training
    assert "stopped by SIGTERM at step 20" in capsys.readouterr().out


def test_a_run_that_is_stopped_before_its_first_step_resumes(flags, tmp_path):
    folder = tmp_path / "run"
    control(folder, 0)

    join = beside(lambda: stop_when_waiting(folder, 0, signal.SIGINT))
    assert train.main(flags(page=True)) == 128 + signal.SIGINT
    join()
    assert checkpoint.load(folder / "last.pt")["step"] == 0
    assert train.main(flags(page=True, init_from="auto")) == 0
    assert train.main(flags(out_dir=tmp_path / "other")) == 0
    assert_same(folder / "last.pt", tmp_path / "other" / "last.pt")


def test_a_run_that_waits_too_long_stops_itself(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PATIENCE", 0.05)
    control(tmp_path / "run", 3)
    assert train.main(flags(page=True)) == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 3


@pytest.mark.parametrize("content", [b"", b"x", b"\xff", b"9" * 5000, b"99999999999", b"1.5"])
def test_a_wrong_control_file_stops_nothing(flags, tmp_path, content):
    (tmp_path / "run" / "page").mkdir(parents=True)
    (tmp_path / "run" / "page" / "control").write_bytes(content)
    assert train.main(flags(page=True, max_iters=4)) == 0


# ---------------------------------------------------------------- what is in the files


def test_state_json_has_the_numbers_of_the_run(flags, tmp_path):
    assert train.main(flags(page=True, log_interval=9)) == 0
    state = state_of(tmp_path / "run")
    assert (state["status"], state["step"], state["pid"]) == ("finished", 40, os.getpid())
    steps, losses, norms, rates = zip(*state["curve"], strict=True)
    assert steps == (*range(1, 41),)
    rows = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert sum(losses[:20]) / 20 == pytest.approx(float(rows[1].split(",")[2]), rel=1e-5)
    assert rates[39] == pytest.approx(1e-3, rel=0.1) and max(rates) == pytest.approx(0.01)
    assert all(0 < norm < 100 for norm in norms)
    assert train.main(flags(page=True, log_interval=1, out_dir=tmp_path / "other")) == 0
    assert state_of(tmp_path / "other")["curve"] == state["curve"]  # however often the losses were read


def test_live_weights_gradients_and_snapshots(flags, tmp_path, capsys, device):
    where = {"device": device.type, "compile": False}
    assert train.main(flags(page=True, ema_decay=0.5, grad_clip=0.1, max_iters=12, **where)) == 0
    folder = tmp_path / "run" / "page"
    live, last = checkpoint.load(folder / "live.pt"), checkpoint.load(tmp_path / "run" / "last.pt")
    assert live["step"] == last["step"] == 12
    assert all(torch.equal(live["model"][name], last["model"][name]) for name in last["model"])
    model = checkpoint.load_model(live)
    assert live["gradients"].keys() == dict(model.named_parameters()).keys()
    norm = torch.nn.utils.get_total_norm(list(live["gradients"].values()))
    assert norm.item() == pytest.approx(0.1, rel=1e-3)  # they are clipped
    last_snapshot = checkpoint.load(folder / "step-000012.pt")
    assert all(torch.equal(last_snapshot["model"][name], last["ema"][name]) for name in last["ema"])
    assert not torch.equal(last["ema"]["lm_head.weight"], last["model"]["lm_head.weight"])
    assert live["model"]["lm_head.weight"].data_ptr() == live["model"]["transformer.wte.weight"].data_ptr()
    capsys.readouterr()
    assert sample.main([f"--ckpt={folder / 'step-000010.pt'}", "--num_samples=2", "--device=cpu"]) in (0, None)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_snapshots_are_few_and_at_equal_distances(flags, tmp_path):
    assert train.main(flags(page=True, max_iters=150, eval_interval=1000)) == 0
    snapshots = snapshots_of(tmp_path / "run")
    assert snapshots == [*range(0, 151, 4)]
    files = sorted((tmp_path / "run" / "page").glob("step-*.pt"))
    assert [checkpoint.load(path)["step"] for path in files] == snapshots
    assert not list((tmp_path / "run" / "page").glob(".*"))


def test_snapshots_keep_their_limit_of_bytes(flags, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "page"
    monkeypatch.setattr(page, "SNAPSHOT_BYTES", 5 * 100_000)
    assert train.main(flags(page=True, max_iters=60)) == 0
    assert snapshots_of(tmp_path / "run") == [0, 16, 32, 48]
    assert sum(path.stat().st_size for path in folder.glob("step-*.pt")) <= page.SNAPSHOT_BYTES
    monkeypatch.setattr(page, "SNAPSHOT_BYTES", 50_000)
    assert train.main(flags(page=True, overwrite=True)) == 0
    assert "at most" in state_of(tmp_path / "run")["note"]
    assert sorted(path.name for path in folder.iterdir()) == ["state.json"]


@pytest.mark.slow
def test_files_are_written_at_most_twice_a_second(flags, monkeypatch):
    times, write = [], page.Page._write_state

    def recorded(self):
        times.append(time.perf_counter())
        write(self)

    monkeypatch.setattr(page.Page, "_write_state", recorded)
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: (time.sleep(0.02), step(*args))[1])
    assert train.main(flags(page=True, max_iters=70, eval_interval=1000)) == 0
    assert len(times) >= 3
    assert all(b - a >= 0.5 for a, b in zip(times[:-2], times[1:-1], strict=True))  # the last is the end of the run


def test_a_resumed_run_drops_what_is_later_and_a_new_run_drops_all(flags, tmp_path):
    folder = tmp_path / "run"
    assert train.main(flags(page=True)) == 0
    saved = checkpoint.load(folder / "best.pt")
    assert saved["step"] in (20, 40)
    old = state_of(folder)
    assert train.main(flags(page=True, max_iters=20, overwrite=True)) == 0
    assert snapshots_of(folder) == [*range(21)] and steps_of(folder) == [*range(1, 21)]
    # The files of 40 steps beside the checkpoint of step 20, as after SIGKILL.
    (folder / "page" / "state.json").write_text(json.dumps(old), encoding="utf-8")
    for step in range(21, 41):
        (folder / "page" / f"step-{step:06}.pt").write_bytes(b"old")
    (folder / "page" / ".step-000003.pt.12345678.tmp").write_bytes(b"old")
    assert train.main(flags(page=True, init_from="resume", max_iters=30)) == 0
    assert steps_of(folder) == [*range(1, 31)] and snapshots_of(folder) == [*range(31)]
    assert [checkpoint.load(folder / "page" / f"step-{step:06}.pt")["step"] for step in (20, 21, 30)] == [20, 21, 30]
    assert len([*(folder / "page").iterdir()]) == 31 + 2
    with pytest.raises(UserError, match="another run's"):
        train.main(flags(page=True))
    assert train.main(flags(overwrite=True, max_iters=1)) == 0
    assert [*(folder / "page").iterdir()] == []


def test_long_runs_have_few_points_and_snapshots_also_after_a_resume(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "POINTS", 20)
    monkeypatch.setattr(page, "SNAPSHOTS", 10)
    options = {"page": True, "max_iters": 110, "eval_interval": 50, "n_layer": 1}
    assert train.main(flags(**options)) == 0
    state = state_of(tmp_path / "run")
    assert steps_of(tmp_path / "run") == [*range(8, 111, 8)] and snapshots_of(tmp_path / "run") == [*range(0, 111, 16)]
    control(tmp_path / "stopped", 30)
    monkeypatch.setattr(page, "PATIENCE", 0.0)
    assert train.main(flags(**options, out_dir=tmp_path / "stopped")) == 128 + signal.SIGTERM
    assert steps_of(tmp_path / "stopped") == [*range(2, 31, 2)]
    assert train.main(flags(**options, out_dir=tmp_path / "stopped", init_from="resume")) == 0
    assert state_of(tmp_path / "stopped")["curve"] == state["curve"]
    assert snapshots_of(tmp_path / "stopped") == snapshots_of(tmp_path / "run")


# ---------------------------------------------------------------- faults


def test_files_that_cannot_be_written_cost_one_line(flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "page").write_text("a file", encoding="utf-8")
    assert train.main(flags(page=True)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "page" in line]
    assert len(lines) == 1 and "training continues" in lines[0]
    assert train.main(flags(out_dir=tmp_path / "other")) == 0
    assert_same(tmp_path / "run" / "last.pt", tmp_path / "other" / "last.pt")


def test_a_full_disk_costs_one_line_and_is_tried_again(flags, tmp_path, monkeypatch, capsys):
    fails = [True]

    def failing(*paths, **options):
        if fails[0]:
            raise UserError(f"can't write {paths[-1]}: No space left on device")
        return replacing(*paths, **options)

    monkeypatch.setattr(page, "replacing", failing)
    monkeypatch.setattr(page, "INTERVAL", 0.001)
    evaluated = page.Page.evaluated
    monkeypatch.setattr(
        page.Page, "evaluated", lambda self, row: (fails.clear(), fails.append(False), evaluated(self, row))
    )
    assert train.main(flags(page=True)) == 0
    assert capsys.readouterr().err.count("No space left") == 1
    assert state_of(tmp_path / "run")["status"] == "finished" and len(snapshots_of(tmp_path / "run")) == 41


def test_state_json_is_written_although_the_weights_do_not_fit(flags, tmp_path, monkeypatch):
    def small(*paths, **options):
        if len(paths) > 1:
            raise UserError(f"can't write {paths[-1]}: No space left on device")
        return replacing(*paths, **options)

    monkeypatch.setattr(page, "replacing", small)
    assert train.main(flags(page=True, max_iters=3)) == 0
    assert (state_of(tmp_path / "run")["status"], state_of(tmp_path / "run")["step"]) == ("finished", 3)


@pytest.mark.slow
def test_a_removed_folder_is_made_again(flags, tmp_path, monkeypatch):
    evaluated = page.Page.evaluated
    folder = tmp_path / "run" / "page"
    monkeypatch.setattr(
        page.Page, "evaluated", lambda self, row: (shutil.rmtree(folder, row.step > 20), evaluated(self, row))
    )
    assert train.main(flags(page=True)) == 0
    assert state_of(tmp_path / "run")["status"] == "finished" and checkpoint.load(folder / "live.pt")["step"] == 40


def test_a_run_that_diverges_keeps_readable_files(flags, tmp_path):
    with pytest.raises(UserError, match="loss"):
        train.main(flags(page=True, learning_rate=1e30, min_lr=1.0, warmup_iters=0, grad_clip=0, log_interval=1))
    state = state_of(tmp_path / "run")
    assert state["status"] == "stopped"
    assert checkpoint.load(tmp_path / "run" / "page" / "live.pt")["step"] <= state["step"]


GOOD = {
    "format": 1,
    "pid": 1,
    "step": 2,
    "max_iters": 3,
    "status": "running",
    "note": "",
    "curve": [[1, 2.0, None, 0.1]],
}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "1" * 5000, "[" * 100_000, json.dumps(GOOD | {"format": 2}), json.dumps(GOOD)[:-9],
        json.dumps(GOOD | {"pid": "1"}), json.dumps(GOOD | {"step": True}), json.dumps(GOOD | {"curve": [1]}),
        json.dumps(GOOD | {"curve": [[1, 2.0, 3.0]]}), json.dumps(GOOD | {"curve": [[1, "<b>", 3.0, 4.0]]}),
        json.dumps(GOOD | {"curve": [[1.5, 2.0, 3.0, 4.0]]}), json.dumps(GOOD | {"curve": {"step": [1]}}),
        json.dumps(GOOD | {"note": None}), json.dumps([GOOD]), json.dumps(GOOD | {"pid": -1}),
        json.dumps(GOOD | {"pid": 0}), json.dumps(GOOD | {"step": -1}), json.dumps(GOOD | {"step": 10**4000}),
    ],
)  # fmt: skip
def test_a_damaged_state_is_none(write, flags, tmp_path, text):
    assert read_state(write(json.dumps(GOOD), "good.json")) == GOOD
    assert read_state(write(text, "state.json")) is None
    assert read_state(write(json.dumps(GOOD).replace("2.0", "NaN"), "nan.json"))["curve"] == [[1, None, None, 0.1]]


def test_a_state_that_is_no_file_is_none(write, tmp_path):
    (tmp_path / "link.json").symlink_to(write(json.dumps(GOOD), "good.json"))
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_bytes(b"")
    os.truncate(tmp_path / "large.json", 2**40)
    for name in ("link", "folder", "pipe", "large", "missing"):
        assert read_state(tmp_path / f"{name}.json") is None


@pytest.mark.slow
def test_a_run_resumes_beside_a_damaged_state(flags, tmp_path):
    assert train.main(flags(page=True)) == 0
    (tmp_path / "run" / "page" / "state.json").write_text("{", encoding="utf-8")
    (tmp_path / "run" / "page" / "step-x.pt").write_text("", encoding="utf-8")
    assert train.main(flags(page=True, init_from="resume", max_iters=45)) == 0
    assert steps_of(tmp_path / "run") == [41, 42, 43, 44, 45]


@pytest.mark.slow
def test_sigkill_and_going_on_end_bitwise_right(flags, tmp_path):
    assert train.main(flags(max_iters=600, out_dir=tmp_path / "other")) == 0
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *flags(max_iters=600, page=True, init_from="auto")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (state := state_of(folder)) or state["step"] < 50:
        time.sleep(0.01)
    process.kill()
    process.wait()
    saved = checkpoint.load(folder / "last.pt")["step"]
    assert 0 < saved < 600
    assert train.main(flags(max_iters=600, page=True, init_from="auto")) == 0
    assert_same(tmp_path / "other" / "last.pt", folder / "last.pt")
    assert steps_of(folder)[-1] == 600
