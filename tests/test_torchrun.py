"""Several ranks, as torchrun starts them: one result, restarts, nodes that join late, errors and signals."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from test_processes import ENV, ROOT, command, losses

import train
from quill import checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ONE_NODE = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
FAULTY = "tests/faulty_run.py"
LOST = "rank {} lost its connection to another process, which has failed or can't be reached"


def start(stack, *argv, **environment):
    """Start a command. It is ended with the test. → Popen with text output, stdout and stderr together"""
    process = subprocess.Popen(
        [*map(str, argv)],
        cwd=ROOT,
        env=ENV | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stack.callback(process.communicate)
    stack.callback(process.kill)
    return process


def assert_trained_like(folder, other, atol=0.0):
    ours, others = (checkpoint.load(path / "last.pt") for path in (folder, other))
    assert ours["step"] == others["step"]
    for name, weight in others["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, atol=atol, rtol=0)


def own_lines(output, script="faulty_run.py"):
    """The lines on stderr that are quill's, and not torchrun's."""
    return [line for line in output.splitlines() if line.startswith(f"{script}: ")]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["words", "prose"])
def test_two_ranks_train_as_one(flags, tmp_path, dataset):
    """torchrun with gloo: the same losses and weights as one process, at half the rows for each."""
    options = {"dataset": dataset, "gradient_accumulation_steps": 3, "eval_interval": 10}
    assert train.main(flags(**options, out_dir=tmp_path / "one")) == 0
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = command(*argv, *flags(**options, out_dir=tmp_path / "two"), check=0)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    assert_trained_like(tmp_path / "two", tmp_path / "one", atol=1e-4)
    assert not any(name.startswith("module.") for name in checkpoint.load(tmp_path / "two" / "last.pt")["model"])
    assert done.stdout.count("step 40: train loss") == 1  # rank 0 alone prints


@pytest.mark.slow
@pytest.mark.parametrize("killed", [[1], [1, 0, 0]])
def test_a_run_goes_on_after_its_ranks_are_killed(flags, tmp_path, killed):
    options = {"eval_interval": 5, "dataset": "words"}
    assert train.main(flags(**options, out_dir=tmp_path / "whole")) == 0
    faults = ",".join(f"kill:{rank}:{12 + 5 * i}" for i, rank in enumerate(killed))
    restarts = [f"--max-restarts={len(killed)}", FAULTY, tmp_path, faults]
    done = command(*ONE_NODE[1:], *restarts, *flags(**options, init_from="auto", out_dir=tmp_path / "run"), check=0)
    assert own_lines(done.stderr) == [f"faulty_run.py: {LOST.format(1 - rank)}" for rank in killed]
    assert "connectFullMesh" not in done.stderr
    assert_trained_like(tmp_path / "run", tmp_path / "whole", atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [None, 0, 1])
def test_a_node_joins_late(flags, tmp_path, killed):
    """One node trains alone until another one joins, which restarts it. Then a rank is killed, which restarts both."""
    options = {"eval_interval": 5, "dataset": "words"}
    assert train.main(flags(**options, out_dir=tmp_path / "whole")) == 0
    argv = [*TORCHRUN, "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d"]
    argv += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=late", "--rdzv_conf=last_call_timeout=1"]
    faults = "wait:0:18" if killed is None else f"wait:0:18,kill:{killed}:30"
    argv += [FAULTY, tmp_path, faults, *flags(**options, init_from="auto")]
    with ExitStack() as stack:
        # torchrun's default shares one store among all starts, but does not tell a new node where it is (torch 2.13).
        nodes = [start(stack, *argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")]
        wait_for(tmp_path / "wait:0:18:0")
        nodes.append(start(stack, *argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "stopped by SIGTERM at step 19" in outputs[0]  # not a failure: the restart counts stay 0
    assert_trained_like(tmp_path / "run", tmp_path / "whole", atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_node(flags, tmp_path, lost):
    """torchrun and its process are killed on a node. The other node goes on alone, until the lost one is back."""
    # At a lower rate, Adam does not amplify how other numbers of ranks round their sums.
    options = {"eval_interval": 5, "log_interval": 1, "dataset": "words", "learning_rate": 1e-3, "min_lr": 1e-4}
    assert train.main(flags(**options, out_dir=tmp_path / "whole")) == 0
    port, conf = free_port(), "last_call_timeout=3"
    with ExitStack() as stack:
        if lost == 0:  # the first node may be lost if it does not host the rendezvous
            serve = f"store = TCPStore('127.0.0.1', {port}, is_master=True, wait_for_workers=False); time.sleep(600)"
            start(stack, sys.executable, "-c", f"import time; from torch.distributed import TCPStore; {serve}")
            conf += ",is_host=0"
        argv = [*TORCHRUN, "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d"]
        argv += [f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=lost", f"--rdzv_conf={conf}"]
        argv += [FAULTY, tmp_path, "rest:all:12,wait:0:25", *flags(**options, init_from="auto")]
        nodes = [start(stack, *argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")]
        time.sleep(1)  # so that this one hosts the rendezvous
        nodes.append(start(stack, *argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        wait_for(tmp_path / "rest:all:12:1")
        for pid in (nodes[lost].pid, *children(nodes[lost].pid)):
            os.kill(pid, signal.SIGKILL)
        wait_for(tmp_path / "wait:0:25:0")
        nodes.pop(lost)
        nodes.append(start(stack, *argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
    assert own_lines(outputs[0])[0] in [f"faulty_run.py: {LOST.format(rank)}" for rank in range(2)]
    assert "stopped by SIGTERM at step 26" in outputs[0]
    assert len(losses(tmp_path / "run")) == 8
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=0, atol=1e-5)
    assert_trained_like(tmp_path / "run", tmp_path / "whole", atol=1e-4)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


SAME = "start all nodes with the same code, options and data"
ERRORS = {  # fault: exit codes, quill's line
    "kill:1:3": ([1, -9], LOST.format(0)),
    "disk:1:3": ([2, 2], "rank 1: metrics.csv: No space left on device"),
    "disk-together:0:3": ([2, 2], "metrics.csv: No space left on device"),
    "bug-together:1:3": ([1, 1], "rank 1: TypeError: not a number"),
    "--seed=2:1": ([2, 2], f"rank 1 has seed=2, but rank 0 has seed at its default; {SAME}"),
}
MORE_ERRORS = {
    "kill:0:3": ([-9, 1], LOST.format(1)),
    "disk:0:3": ([2, 2], "rank 0: metrics.csv: No space left on device"),
    "user:1:3": ([2, 2], r"rank 1: there is no\nmemory"),
    "user-together:all:3": ([2, 2], r"there is no\nmemory"),
    "user-together:1:3": ([2, 2], r"rank 1: there is no\nmemory"),
    "bug:0:3": ([1, 1], "rank 0: TypeError: not a number"),
    "bug:1:3": ([1, 1], "rank 1: TypeError: not a number"),
    "--eval_only=True:1": ([2, 2], f"rank 1 has eval_only=True, but rank 0 has eval_only at its default; {SAME}"),
    "--dataset=none:0": ([2, 2], f"rank 1 has dataset=prose, but rank 0 has dataset=none; {SAME}"),
    "--n_layer=1:1": ([2, 2], f"rank 1 has n_layer=1, but rank 0 has n_layer=2; {SAME}"),
    "interrupt:1:3": ([130, 130], "stopped by SIGINT"),
}


@pytest.mark.parametrize("errors", [ERRORS, pytest.param(MORE_ERRORS, marks=pytest.mark.slow)])
def test_an_error_on_a_rank_ends_all_with_one_line(flags, tmp_path, errors):
    """At once, and without a traceback, except for the one of a bug. Each in two forked processes, without torchrun."""
    done = command(FAULTY, tmp_path, ",".join(errors), *flags(overwrite=True, max_iters=5), check=0)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["fault"] for run in runs] == list(errors)
    for run in runs:
        codes, line = errors[run["fault"]]
        assert run["codes"] == codes and run["seconds"] < 10, run
        *before, last, end = run["stderr"].split("\n")
        assert (last, end) == (f"faulty_run.py: {line}", ""), run
        assert own_lines("\n".join(before)) == []
        assert ("Traceback" in run["stderr"]) == ("bug" in run["fault"]) == bool(before), run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves(flags, tmp_path, number):
    with ExitStack() as stack:
        process = start(stack, *ONE_NODE, "train.py", *flags(max_iters=100_000))
        for line in process.stdout:
            if line.startswith("step 50/"):
                break
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    assert f"stopped by {number.name} at step" in output and own_lines(output, "train.py") == []
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] >= 50


# ---------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*ERRORS, *MORE_ERRORS])
def test_an_error_under_torchrun(flags, tmp_path, fault):
    """quill's line is there once, and torchrun ends with exit code 1, within a minute."""
    began = time.monotonic()
    done = command(*ONE_NODE[1:], FAULTY, tmp_path, fault, *flags(), check=1)
    assert own_lines(done.stderr) == [f"faulty_run.py: {(ERRORS | MORE_ERRORS)[fault][1]}"]
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_mistake_under_torchrun(flags, tmp_path):
    done = command(*ONE_NODE[1:], "train.py", *flags(n_head=3), check=1)
    assert len(own_lines(done.stderr, "train.py")) == 1 and "--n_head" in done.stderr


@pytest.mark.slow
def test_two_nodes_with_different_seeds(flags, tmp_path):
    argv = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=seeds"]
    argv += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "train.py"]
    with ExitStack() as stack:
        nodes = [start(stack, *argv, *flags(seed=seed)) for seed in (1, 2)]
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
    first, second = (f"train.py: rank 1 has seed={3 - seed}, but rank 0 has seed={seed}; {SAME}" for seed in (1, 2))
    assert own_lines("\n".join(outputs), "train.py") in ([first], [second])  # any node may have rank 0
    assert [node.returncode for node in nodes] == [1, 1] and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_a_rank_without_memory(flags, tmp_path):
    size = {"n_layer": 4, "n_embd": 256, "batch_size": 32, "block_size": 64}
    done = command(*ONE_NODE[1:], FAULTY, tmp_path, "memory=64:1", *flags(**size), check=1)
    advice = "use --activation_checkpointing=True, a smaller --batch_size or model"
    assert own_lines(done.stderr) == [f"faulty_run.py: rank 1: cpu, 1 thread is out of memory; {advice}"]


def children(pid):
    """The processes that torchrun has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_one(torchruns, rng, before):
    """Kill a random rank at a random moment of the attempt that follows `before`. → the ranks of that attempt"""
    deadline = time.monotonic() + 60
    while True:
        ranks = [[pid for pid in children(torchrun.pid)] for torchrun in torchruns]
        if all(ranks) and not before & {pid for node in ranks for pid in node}:
            break
        assert time.monotonic() < deadline and all(torchrun.poll() is None for torchrun in torchruns)
        time.sleep(0.1)
    time.sleep(rng.uniform(0.0, 10.0))
    victim = rng.choice([pid for node in ranks for pid in node])
    os.kill(victim, signal.SIGKILL)
    return {pid for node in ranks for pid in node}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_restarts_after_two_random_kills(flags, tmp_path, nodes, seed):
    """Before, while and after the ranks connect, and in training: the weights of the undisturbed run, bit for bit."""
    rng = random.Random(seed)
    options = {"dataset": "words", "max_iters": 2000, "eval_interval": 50}
    command(*ONE_NODE[1:], "train.py", *flags(**options, out_dir=tmp_path / "whole"), check=0)
    argv = ONE_NODE
    if nodes == 2:
        argv = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=two"]
        argv += [f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    argv = [*argv, "--max-restarts=6", "train.py", *flags(**options, init_from="auto")]
    with ExitStack() as stack:
        torchruns = [start(stack, *argv) for _ in range(nodes)]
        ranks = set()
        for _ in range(2):
            ranks = kill_one(torchruns, rng, ranks)
        outputs = [torchrun.communicate(timeout=100)[0] for torchrun in torchruns]
        assert [torchrun.returncode for torchrun in torchruns] == [0] * nodes, outputs
    assert_trained_like(tmp_path / "run", tmp_path / "whole")
