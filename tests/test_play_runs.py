"""play/runs.py: which runs the page lists, what it shows of them, and the processes that it starts and stops."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train
from quill import checkpoint
from quill.cli import config_files, read_config_file
from quill.errors import UserError
from quill.files import folder_lock
from quill.observers.page import read_state
from quill.options import TrainConfig
from quill.play import runs
from quill.play.runs import Runs, UnknownRun, lock_holder
from tests.test_page_observer import GOOD, assert_same

ROOT = Path(__file__).parent.parent
HOLD = "import sys, pathlib; from quill.files import folder_lock\nwith folder_lock(pathlib.Path(sys.argv[1])): input()"
REPORT = """
import json, os, sys
links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
fds = {os.readlink(link) for link in links if os.path.lexists(link)}
print(json.dumps([sys.argv[1:], sorted(fds), os.getsid(0) == os.getpid()]))
"""


@pytest.fixture
def made(tmp_path, data_dir):
    """Runs in an empty folder, beside two small datasets."""
    return Runs(tmp_path / "out", data_dir)


def write_state(folder, **values):
    (folder / "page").mkdir(parents=True, exist_ok=True)
    (folder / "page" / "state.json").write_text(json.dumps(GOOD | values), encoding="utf-8")


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which holds the lock of a folder. → the process"""
    processes = []

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, cwd=ROOT)
        processes.append(process)
        wait_until(lambda: lock_holder(folder))
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------- listing and describing


def test_a_run_with_its_files_and_one_without(made, flags, tmp_path):
    assert made.names() == ["bundled"]
    assert train.main(flags(out_dir=tmp_path / "out" / "a" / "b", page=True)) == 0
    assert train.main(flags(out_dir=tmp_path / "out" / "c", n_layer=1)) == 0
    assert made.names() == ["bundled", "c", "a/b"]
    with_page, without = made.run("a/b"), made.run("c")
    for run in (with_page, without):
        assert (run["status"], run["step"], run["max_iters"]) == ("finished", 40, 40)
        assert [row["step"] for row in run["evaluations"]] == [20, 40]
        assert run["val_loss"] == pytest.approx(min(row["val_loss"] for row in run["evaluations"]), rel=1e-5)
        assert run["options"]["batch_size"] == 4 and run["documents"] is None and run["train_tokens"] > 1000
        assert run["baselines"]["die"] == pytest.approx(math.log(run["vocab_size"]))
        assert run["baselines"].keys() == {"die", "unigram", "bigram"}
        json.dumps(run, allow_nan=False)
    assert with_page.keys() == without.keys()
    assert len(with_page["curve"]["step"]) == 40 and not without["curve"]["step"]
    assert (with_page["weights_step"], without["weights_step"]) == (40, None)
    assert with_page["snapshots"] == [*range(41)] and without["snapshots"] == []
    saved = checkpoint.load(made.weights("c"))
    assert without["parameters"] == checkpoint.load_model(saved).num_params()
    assert without["vocab_size"] == saved["vocab_size"]
    assert made.weights("a/b", 7).name == "step-000007.pt"
    with pytest.raises(UnknownRun, match="step 99"):
        made.weights("a/b", 99)
    row = {"name": "c", "title": "c", "status": "finished", "step": 40, "max_iters": 40}
    bundled, listed, _ = made.summaries()
    assert listed == row | {"val_loss": without["val_loss"]}
    assert bundled["val_loss"] == pytest.approx(checkpoint.load(runs.BUNDLED)["best_val_loss"])
    before = made.signature("a/b")
    assert made.signature("a/b") == before
    write_state(tmp_path / "out" / "a" / "b")
    assert made.signature("a/b") != before


def test_documents_are_counted(made, flags, tmp_path):
    assert train.main(flags(out_dir=tmp_path / "out" / "c", dataset="words", max_iters=1)) == 0
    run = made.run("c")
    assert (run["documents"], run["tokens_are_lines"]) == (600, True)


@pytest.mark.parametrize("damage", ["text", "folder", "link", "format", "checkpoint"])
def test_damaged_files_count_as_absent(made, flags, tmp_path, damage):
    folder = tmp_path / "out" / "c"
    assert train.main(flags(out_dir=folder, page=True, max_iters=2)) == 0
    path = folder / "page" / "state.json"
    if damage == "text":
        path.write_text('{"format": 1', encoding="utf-8")
    elif damage == "format":
        write_state(folder, format=2)
    elif damage == "checkpoint":
        for file in ("last.pt", "best.pt", "page/live.pt"):
            (folder / file).write_bytes(b"PK\3\4")
        (folder / "metrics.csv").write_bytes(b"\xff,step\n,1\n\0,2,3")
        path.unlink()
    else:
        path.unlink()
        path.mkdir() if damage == "folder" else path.symlink_to("/etc/passwd")
    run = made.run("c")
    assert not run["curve"]["step"] and run["status"] in ("finished", "paused")
    assert run["step"] == (0 if damage == "checkpoint" else 2)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../out",
        "/etc",
        "a/../c",
        "c/",
        "c//",
        "./c",
        "c\0",
        "a" * 5000,
        "link",
        "a/b/c/d",
        "C:c",
        "bundled/x",
    ],
)
def test_names_that_are_not_listed_are_unknown(made, tmp_path, name):
    write_state(tmp_path / "out" / "c")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "out" / "c")
    write_state(tmp_path / "out" / "a" / "b" / "c" / "d")
    for call in (made.run, made.weights, made.signature, lambda name: made.control(name, "train")):
        with pytest.raises(UnknownRun):
            call(name)
    assert made.names() == ["bundled", "c"]


@pytest.mark.slow
def test_a_hostile_folder_is_listed_in_bounded_time(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "loop").symlink_to(out)
    for i in range(70):
        for j in range(100):
            os.makedirs(out / str(i) / str(j))
        (out / str(i) / "loop").symlink_to(out)
    (out / ("x" * 200 + "\n")).mkdir()
    os.mkfifo(out / "last.pt")
    write_state(out / "0" / "0", note="x" * 1000)
    began = time.process_time()  # without the time of others
    assert len(made.names()) <= 2
    assert time.process_time() - began < 3


# ---------------------------------------------------------------- processes


def test_a_stale_pid_is_never_signalled(made, tmp_path, holder):
    folder, sleeper = tmp_path / "out" / "c", subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_state(folder, pid=sleeper.pid, status="waiting")
    assert made.run("c")["status"] == "paused"  # nothing has the lock
    made.control("c", "pause")
    process = holder(folder)
    assert lock_holder(folder) == process.pid
    assert made.run("c")["status"] == "running"
    with pytest.raises(UserError, match="another process"):
        made.control("c", "pause")
    assert sleeper.poll() is None and process.poll() is None
    write_state(folder, pid=process.pid, status="waiting")
    assert made.run("c")["status"] == "waiting"
    made.control("c", "pause")
    assert process.wait(5) == -signal.SIGTERM and sleeper.poll() is None
    assert made.run("c")["status"] == "paused"
    sleeper.communicate(b"\n")


def test_looking_at_a_lock_does_not_take_it(tmp_path):
    assert lock_holder(tmp_path) == 0 and not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("", encoding="utf-8")
    assert lock_holder(tmp_path) == 0
    with folder_lock(tmp_path):
        pass


def test_a_started_process_inherits_nothing_and_is_reaped(made, tmp_path, monkeypatch, write):
    import socket

    monkeypatch.setattr(runs, "TRAIN", write(REPORT, "report.py"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(server.fileno(), True)
        name = made.start("config/microgpt.py", options={"dataset": "words", "max_iters": 7, "attention_dropout": None})
        (process,) = made.processes.values()
        wait_until(lambda: process.returncode is not None)  # a thread has waited for it: no zombie
    arguments, files, leads_session = json.loads((made.out_dir / name / "page" / "log.txt").read_text(encoding="utf-8"))
    log = str((made.out_dir / name / "page" / "log.txt").resolve())
    assert [file for file in files if not file.startswith("/proc/")] == sorted(["/dev/null", log])
    assert leads_session
    assert arguments[-4:] == [
        "--init_from=auto", f"--out_dir={made.out_dir / name}", f"--data_dir={made.data_dir}", "--page=True"
    ]  # fmt: skip
    assert {"--dataset=words", "--max_iters=7", "--n_embd=16"} < {*arguments}
    assert name == "play/microgpt-1"
    assert made.run(name)["options"]["max_iters"] == 7 and made.run(name)["status"] == "paused"
    assert made.start(run=name, options={"seed": 3}) == "play/microgpt-2"
    assert made.run("play/microgpt-2")["options"]["max_iters"] == 7


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({}, "there is no config None"),
        ({"config": "/etc/passwd"}, "there is no config '/etc/passwd'"),
        ({"config": "config/../train.py"}, "there is no config"),
        ({"run": "nothing"}, "there is no run"),
        ({"config": "config/names.py", "options": {"n_head": 3}}, "--n_embd=64 is not divisible by --n_head=3"),
        ({"config": "config/names.py", "options": {"n_head": "x"}}, "n_head takes a whole number"),
        ({"config": "config/names.py", "options": {"n_head": [1]}}, "n_head takes a number"),
        ({"config": "config/names.py", "options": {"n_heads": 1}}, "'n_heads' is not an option"),
        ({"config": "config/names.py", "options": {"out_dir": "/tmp"}}, "'out_dir' is not an option"),
        ({"config": "config/names.py", "options": {"init_from": "/tmp/x.pt"}}, "'init_from' is not an option"),
        ({"config": "config/names.py", "options": {"dataset": "../../etc"}}, "there is no dataset"),
        ({"config": "config/names.py", "options": {"dataset": ["x"]}}, "there is no dataset"),
        (
            {"config": "config/names.py", "text": "a" * 169, "options": {"block_size": 16}},
            "the text has 169 characters, too few for --block_size=16",
        ),
        ({"config": "config/names.py", "text": "a", "documents": "lines"}, "the text: has one distinct document"),
        ({"config": "config/names.py", "text": ""}, "the text is blank"),
        ({"config": "config/names.py", "text": "\n \n\n", "documents": "lines"}, "the text is blank"),
        (
            {
                "config": "config/names.py",
                "text": "".join(map(chr, range(0x100, 0xD000))) + "".join(map(chr, range(0x10000, 0x14000))),
            },
            "more than 65,536 different characters",
        ),
    ],
)
def test_a_wrong_start_is_one_line_and_starts_nothing(made, tmp_path, arguments, problem):
    made.data_dir = tmp_path / "data"
    with pytest.raises(UserError, match=problem) as error:
        made.start(**arguments)
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    assert made.processes == {} and made.names() == ["bundled"]
    assert not (tmp_path / "data").exists() or not [*(tmp_path / "data").iterdir()]


@pytest.mark.parametrize(
    "options",
    [
        {"n_layer": 10**9}, {"n_layer": 1001, "n_embd": 4}, {"block_size": 10**8}, {"n_embd": 10**6, "n_head": 1},
        {"mlp_ratio": 1e5}, {"batch_size": 10**6}, {"gradient_accumulation_steps": 10**4}, {"block_size": 2**14},
        {"eval_samples": 10**7}, {"final_samples": 10**7}, {"sample_tokens": 10**9},
    ],
)  # fmt: skip
def test_a_run_that_would_eat_the_memory_is_refused(made, options):
    with pytest.raises(UserError, match=r"too large for the page: .* train\.py in a terminal"):
        made.start("config/names.py", options={"dataset": "words"} | options)
    assert made.names() == ["bundled"]


def test_the_page_trains_the_configs_but_those_of_gpt3(made):
    for path in config_files():
        options = {key: value for key, value in read_config_file(path, TrainConfig).items() if key not in runs.OWN}
        if path.parent.name != "gpt3":
            assert made._check(options).items() >= options.items()
    with pytest.raises(UserError, match="too large"):
        made._check(options | {"n_layer": 96, "n_head": 96, "n_embd": 12288})


def test_two_servers_that_start_at_once_get_a_folder_each(made, monkeypatch, write):
    monkeypatch.setattr(runs, "TRAIN", write(REPORT, "report.py"))
    others = [Runs(made.out_dir, made.data_dir) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        names = [
            *pool.map(lambda k: others[k].start("config/names.py", options={"seed": k, "dataset": "words"}), range(8))
        ]
    assert {*names} == {f"play/names-{n}" for n in range(1, 9)}
    assert [made.run(name)["options"]["seed"] for name in names] == [*range(8)]
    wait_until(lambda: all(process.returncode is not None for one in others for process in one.processes.values()))


def test_a_folder_that_cannot_be_made_is_one_line(made, tmp_path):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match="can't make a folder in .*out/play"):
        made.start("config/names.py", options={"dataset": "words"})


def test_in_training_the_weights_have_gradients(made, flags, tmp_path, holder):
    """Also just after an evaluation, when last.pt is the newest file."""
    folder = tmp_path / "out" / "c"
    assert train.main(flags(out_dir=folder, page=True, max_iters=2)) == 0
    os.utime(folder / "last.pt", (2e9, 2e9))
    assert made.weights("c").name == "last.pt"
    process = holder(folder)
    assert made.weights("c").name == "last.pt"  # another process wrote state.json
    state = read_state(folder / "page" / "state.json")
    assert state is not None
    write_state(folder, **state | {"pid": process.pid})
    assert made.weights("c").name == "live.pt" and checkpoint.load(made.weights("c"))["gradients"]


def test_a_pid_that_is_not_known_is_never_signalled(made, tmp_path, monkeypatch):
    """os.kill(-1) would end every process of the user."""
    killed = []
    monkeypatch.setattr(runs, "lock_holder", lambda folder: -1)  # as on a file system of another machine
    monkeypatch.setattr(runs.os, "kill", lambda *args: killed.append(args))
    write_state(tmp_path / "out" / "c", pid=-1)
    with pytest.raises(UserError, match="another process"):
        made.control("c", "pause")
    assert not killed


def test_a_pipe_in_place_of_the_log_is_one_line(made, tmp_path):
    folder = tmp_path / "out" / "c"
    write_state(folder)
    os.mkfifo(folder / "page" / "log.txt")
    with pytest.raises(UserError, match=r"can't start train\.py with the log"):
        made.control("c", "train")


@pytest.mark.parametrize("config", [{"norm": torch.zeros(2)}, {"lr_decay_iters": "x"}, {"dataset": [1]}])
def test_a_checkpoint_with_options_of_wrong_types_counts_as_damaged(made, tmp_path, config):
    values = {"config": config, "model": {"w": torch.zeros(3)}, "step": 3, "vocab_size": 5, "best_val_loss": 1.0}
    (tmp_path / "out" / "c").mkdir(parents=True)
    torch.save(values, tmp_path / "out" / "c" / "last.pt")
    assert json.dumps(made.run("c")) and made.run("c")["options"] == {}


def test_a_folder_that_is_deleted_while_the_runs_are_listed(made, tmp_path, monkeypatch):
    write_state(tmp_path / "out" / "c")
    write_state(tmp_path / "out" / "d")
    is_run = runs._is_run
    monkeypatch.setattr(runs, "_is_run", lambda path: (is_run(path), path.name == "d" and shutil.rmtree(path))[0])
    assert made.names() == ["bundled", "c"]


@pytest.mark.parametrize("documents, kind", [("lines", True), ("none", False)])
def test_a_pasted_text_becomes_a_dataset(made, tmp_path, monkeypatch, write, documents, kind):
    monkeypatch.setattr(runs, "TRAIN", write(REPORT, "report.py"))
    made.data_dir = tmp_path / "data"
    name = made.start("config/names.py", text="anna\nbéla\n" * 50 + "\ud800", documents=documents)
    meta = json.loads((tmp_path / "data" / "play-1" / "meta.json").read_text(encoding="utf-8"))
    assert meta["documents"] is kind and "play-1" in made.datasets()
    assert made.run(name)["options"]["dataset"] == "play-1"
    assert (made.run(name)["documents"] is None) is not kind


@pytest.mark.parametrize(
    "command",
    [
        "", "[]", "{", "null", "[" * 100_000, '{"config": "/tmp/evil.py"}', '{"init_from": "x"}', '{"data_dir": "/"}',
        '{"n_head": 3, "n_embd": 64}', '{"n_head": [1]}', '{"dataset": "../x"}', '{"dataset": {}}',
    ],
)  # fmt: skip
def test_a_command_that_the_page_did_not_write_is_not_run(made, tmp_path, monkeypatch, write, command):
    """Going on resumes the run by its checkpoint then, with train.py and nothing of the file."""
    monkeypatch.setattr(runs, "TRAIN", write(REPORT, "report.py"))
    folder = tmp_path / "out" / "c"
    write_state(folder)
    (folder / "page" / "command.json").write_text(command, encoding="utf-8")
    made.control("c", "train")
    wait_until(lambda: made.run("c")["status"] != "running")
    arguments, _, _ = json.loads((folder / "page" / "log.txt").read_text(encoding="utf-8"))
    assert arguments == ["--init_from=resume", f"--out_dir={folder}", f"--data_dir={made.data_dir}", "--page=True"]


@pytest.mark.slow
def test_a_run_is_started_stepped_paused_killed_and_found_again(made, tmp_path, monkeypatch):
    """The weights are those of one run of train.py, although the server and the run are killed by SIGKILL."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"dataset": "words", "max_iters": 400, "eval_interval": 100, "device": "cpu", "dtype": "float32"}
    given = {"options": options, "paused": True}
    script = (
        "import sys, json, time; from quill.play.runs import Runs\n"
        "made = Runs(*sys.argv[1:3]); print(made.start('config/microgpt.py', **json.loads(sys.argv[3])), flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(made.out_dir), str(made.data_dir), json.dumps(given)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    name = server.stdout.readline().strip()
    wait_until(lambda: made.run(name)["status"] == "waiting")
    server.kill()
    server.communicate()

    latencies = []
    for step in range(20):  # this object did not start the process
        began = time.monotonic()
        made.control(name, "step")
        wait_until(lambda step=step: (made.run(name)["step"], made.run(name)["status"]) == (step + 1, "waiting"))
        latencies.append(time.monotonic() - began)
    assert sorted(latencies)[10] < 0.5

    made.control(name, "pause")
    run = made.run(name)
    assert (run["status"], run["step"]) == ("paused", 20)
    folder = made.out_dir / name
    assert checkpoint.load(folder / "last.pt")["step"] == 20

    made.control(name, "step")  # which starts a process
    wait_until(lambda: (made.run(name)["step"], made.run(name)["status"]) == (21, "waiting"))
    made.control(name, "train")
    wait_until(lambda: made.run(name)["step"] > 150)
    assert made.run(name)["status"] == "running"
    os.kill(lock_holder(folder), signal.SIGKILL)
    wait_until(lambda: made.run(name)["status"] == "paused")
    with pytest.raises(UserError, match="bundled"):
        made.control("bundled", "train")
    made.control(name, "train")
    wait_until(lambda: made.run(name)["status"] == "finished")
    run = made.run(name)
    assert run["step"] == 400 and [row["step"] for row in run["evaluations"]] == [*range(100, 401, 100)]
    assert run["curve"]["step"] == (*range(1, 401),)
    alone = [f"--{key}={value}" for key, value in options.items()]
    folders = [f"--out_dir={tmp_path / 'alone'}", f"--data_dir={made.data_dir}"]
    assert train.main(["config/microgpt.py", *alone, *folders]) == 0
    assert_same(folder / "last.pt", tmp_path / "alone" / "last.pt")
    assert torch.load(folder / "page" / "live.pt", weights_only=True)["step"] == 400


@pytest.mark.slow
def test_an_error_of_train_py_is_in_the_log_and_in_the_run(made, tmp_path):
    damaged = Path(shutil.copytree(made.data_dir, tmp_path / "data")) / "words" / "train.bin"
    made.data_dir = tmp_path / "data"
    damaged.write_bytes(b"")
    name = made.start("config/names.py", options={"dataset": "words"})
    wait_until(lambda: made.run(name)["status"] == "paused")
    run = made.run(name)
    assert run["error"].startswith(f"train.py: {damaged}")
    assert run["log"].endswith(run["error"])
