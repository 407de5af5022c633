"""train.py: exact resumes, the schedule and optimizers against their formulas, evaluation against one big batch."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train
from model import GPT
from quill import checkpoint, cpu
from quill.data.splits import open_splits
from quill.data.token_files import open_dataset
from quill.errors import UserError
from quill.machine import pick_machine
from quill.options import TrainConfig
from quill.state import TrainState


def run(flags):
    assert train.main(flags) == 0


def rows(flags):
    """metrics.csv without the speed and the seconds, which differ from run to run."""
    with open(out_dir(flags) / "metrics.csv", encoding="utf-8") as file:
        return [row[:5] + row[7:] for row in csv.reader(file)]


def out_dir(flags):
    return Path(next(flag for flag in flags if flag.startswith("--out_dir=")).partition("=")[2])


def last(flags):
    return checkpoint.load(out_dir(flags) / "last.pt")


def same(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TRAINED = ("model", "ema", "optimizers", "step", "best_val_loss", "evals_since_best", "losses")


def assert_same_run(one, other):
    one_state, other_state = last(one), last(other)
    for key in TRAINED:
        assert same(one_state[key], other_state[key]), key
    assert rows(one) == rows(other)


RUNS = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "dropout": {"dropout": 0.2},
    "accumulation": {"gradient_accumulation_steps": 3, "dropout": 0.1},
    "ema": {"ema_decay": 0.9, "optimizer": "muon", "dropout": 0.1},
    "documents": {"dataset": "words", "dropout": 0.1},
    "bfloat16": {"dtype": "bfloat16", "dropout": 0.1},
    "muon-bfloat16": {"optimizer": "muon", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_40_steps_are_20_and_20_more(flags, tmp_path, options, device):
    """Bit for bit on a CPU; on a GPU, whose sums have no fixed order, within 1e-3."""
    options = options | {"device": device.type, "compile": False}
    whole = flags(**options, out_dir=tmp_path / "whole")
    parts = flags(**options, out_dir=tmp_path / "parts")
    run(whole)
    run([*parts, "--max_iters=20"])
    assert last(parts)["step"] == 20
    run([*parts, "--init_from=resume"])
    if device.type == "cpu":
        assert_same_run(whole, parts)
    else:
        torch.testing.assert_close(last(whole)["model"], last(parts)["model"], atol=1e-3, rtol=1e-3)
        assert last(whole)["best_val_loss"] == pytest.approx(last(parts)["best_val_loss"], abs=1e-3)
    assert last(whole)["step"] == 40 and [row[0] for row in rows(whole)] == ["step", "20", "40"]


def test_a_run_moves_to_another_device_and_back(flags, device, capsys):
    """Its loss is the same on both, before and after a resume, and it learns on each."""
    losses = []
    for steps, name in ((20, device.type), (40, "cpu"), (60, device.type)):
        where = {"max_iters": steps, "device": name, "compile": False}
        run(flags(optimizer="muon", ema_decay=0.9, init_from="auto", lr_decay_iters=60, **where))
        losses.append(float(rows(flags())[-1][3]))
        for other in (device.type, "cpu"):
            run(flags(init_from="resume", eval_only=True, device=other))
            loss = float(capsys.readouterr().out.split("val loss ")[-1].split(",")[0])
            assert loss == pytest.approx(losses[-1], abs=1e-4 if other == name else 1e-3)
    assert max(losses) < math.log(13)  # the loss of guessing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_a_gpu_40_steps_are_20_and_20_more_bit_for_bit(flags, tmp_path, optimizer, dtype, gpu):
    """With deterministic kernels and uncompiled, as docs/reliability.md says."""
    options = {"optimizer": optimizer, "dtype": dtype, "dropout": 0.1, "device": gpu.type, "compile": False}
    whole = flags(**options, out_dir=tmp_path / "whole")
    parts = flags(**options, out_dir=tmp_path / "parts")
    deterministic(whole, [*parts, "--max_iters=20"], [*parts, "--init_from=resume"])
    assert_same_run(whole, parts)


def deterministic(*runs):
    """Run train.py once for each of the lists of flags, in another process: cuBLAS reads its variable only once."""
    code = "import json, sys, torch, train; torch.use_deterministic_algorithms(True); "
    code += "sys.exit(any(train.main(flags) for flags in json.loads(sys.argv[1])))"
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    argv = [sys.executable, "-c", code, json.dumps(runs)]
    done = subprocess.run(argv, cwd=os.path.dirname(train.__file__), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize("dtype, error", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(flags, tmp_path, dtype, error, capsys, gpu):
    """20 steps on a GPU, at a width where its compiled kernels are those of real runs."""
    losses = []
    for compiled in (False, True):
        options = {
            "n_layer": 3,
            "n_embd": 128,
            "block_size": 64,
            "dtype": dtype,
            "device": gpu.type,
            "compile": compiled,
        }
        run_flags = flags(**options, max_iters=20, log_interval=1, learning_rate=1e-3, out_dir=tmp_path / str(compiled))
        run(run_flags)
        losses.append([float(line.split("loss ")[1].split(",")[0]) for line in printed_steps(capsys)])
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], abs=error)


def printed_steps(capsys):
    """The log lines of a run's steps. There must be no note, such as one that the compiler failed."""
    out, err = capsys.readouterr()
    assert "note:" not in err
    return [line for line in out.splitlines() if re.match(r"step \d+/", line)]


def test_no_step_waits_for_a_gpu(flags):
    """On fake tensors, which know their device, and have no number that could be read: see tests/fake_gpu.py."""
    runs = {
        "stream": flags(n_layer=1, max_iters=20, dtype="bfloat16", dropout=0.1),
        "muon": flags(dataset="words", n_layer=1, max_iters=2, gradient_accumulation_steps=3, **RUNS["ema"]),
        "float16": flags(dataset="words", n_layer=1, max_iters=2, dtype="float16", grad_clip=0),
    }
    argv = [sys.executable, "-W", "error", Path(__file__).parent / "fake_gpu.py"]
    argv += [part for run in runs.values() for part in ("--", *run)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = dict(zip(runs, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, result in results.items():
        assert result["devices"] == ["gpu"] and set(result["steps"]) == {"cpu to gpu"}
        assert len(result["steps"]) == (1 if name == "stream" else 2)  # starts of rows, and lengths of documents
        assert result["batches"] > 1  # all of them, before their losses are read
        assert result["batches"] <= len(result["evaluation"]) <= 2 * result["batches"]


def test_evaluating_more_often_changes_no_step(flags, tmp_path):
    often = flags(out_dir=tmp_path / "often", eval_interval=7, eval_samples=2, dropout=0.2)
    seldom = flags(out_dir=tmp_path / "seldom", eval_interval=40, dropout=0.2)
    run(often), run(seldom)
    for key in ("model", "optimizers"):
        assert same(last(often)[key], last(seldom)[key])
    assert rows(often)[-1][3] == rows(seldom)[-1][3]  # the last val loss
    # The rows' train losses are means over the steps between them, so together they are the mean over all.
    steps = np.diff([0] + [int(row[0]) for row in rows(often)[1:]])
    mean = np.average([float(row[2]) for row in rows(often)[1:]], weights=steps)
    assert mean == pytest.approx(float(rows(seldom)[1][2]), abs=1e-12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_resumes(flags, tmp_path, monkeypatch, number):
    """In the middle of a row of metrics.csv, whose train loss has to remember the steps before the signal."""
    whole, parts = flags(out_dir=tmp_path / "whole", dropout=0.1), flags(out_dir=tmp_path / "parts", dropout=0.1)
    run(whole)
    step = train.train_step

    def signalled(state, *args):
        if state.progress.step == 26:
            os.kill(os.getpid(), number)
        return step(state, *args)

    monkeypatch.setattr(train, "train_step", signalled)
    before = signal.getsignal(number)
    assert train.main(parts) == 128 + number
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert last(parts)["step"] == 27 and len(last(parts)["losses"]) == 7
    run([*parts, "--init_from=resume"])
    assert_same_run(whole, parts)


def test_a_signal_in_a_step_with_an_evaluation_saves_once(flags, monkeypatch):
    saved, step, save = [], train.train_step, train.save

    def signalled(state, *args):
        if state.progress.step == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *args)

    monkeypatch.setattr(train, "train_step", signalled)
    monkeypatch.setattr(train, "save", lambda state, better: saved.append(state.progress.step) or save(state, better))
    assert train.main(flags()) == 128 + signal.SIGTERM
    assert saved == [20] and last(flags())["step"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_final_samples_ends_the_run(flags, number):
    """They come after the last save, so there is nothing to wait for."""
    code = (
        "import os, sys, train\nfrom quill import observers\nfrom quill.cli import run\n"
        f"observers.draw_samples = lambda *args: args[2] and os.kill(os.getpid(), {number:d}) or []\nrun(train.main)\n"
    )
    argv = [sys.executable, "-c", code, *flags(max_iters=2, final_samples=1)]
    done = subprocess.run(argv, cwd=os.path.dirname(train.__file__), capture_output=True, text=True)
    assert done.returncode in (128 + number, -number)
    assert done.stderr == ""
    assert last(flags())["step"] == 2


def test_an_evaluation_needs_no_optimizer(flags, capsys):
    run(flags(max_iters=2))
    path = out_dir(flags()) / "last.pt"
    state = torch.load(path, weights_only=True)
    state["optimizers"] = []
    torch.save(state, path)
    run(flags(init_from="resume", eval_only=True))
    assert "step 2: val loss" in capsys.readouterr().out
    run(flags(init_from="resume", max_iters=2))
    with pytest.raises(UserError, match="0 optimizers, but this run has 1"):
        train.main(flags(init_from="resume", max_iters=3))


def test_a_cpu_run_has_the_faster_layers(flags, monkeypatch):
    seen = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda state, *args: seen.append(state.model) or step(state, *args))
    run(flags(max_iters=1))
    assert type(seen[0].lm_head) is cpu.Linear


def test_accumulation_is_the_large_batch(flags, tmp_path, device):
    for dataset in ("prose", "words"):
        losses = []
        for batch_size, accumulated in ((12, 1), (4, 3)):
            run_flags = flags(
                dataset=dataset,
                out_dir=tmp_path / f"{dataset}{batch_size}",
                batch_size=batch_size,
                gradient_accumulation_steps=accumulated,
                max_iters=20,  # later, AdamW has made rounding of 1e-8 as large as 1e-2 with some seeds
                device=device.type,
                compile=False,
            )
            run(run_flags)
            losses.append([float(row[2]) for row in rows(run_flags)[1:]])
        np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5 if device.type == "cpu" else 1e-3)  # TF32


def test_exactly_max_iters_steps_and_a_checkpoint_for_the_shortest_run(flags, monkeypatch):
    steps = []
    step = train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda state, *args: steps.append(state.progress.step) or step(state, *args)
    )
    run(flags(max_iters=3))
    assert steps == [0, 1, 2] and last(flags())["step"] == 3 and (out_dir(flags()) / "best.pt").exists()
    assert [row[0] for row in rows(flags())] == ["step", "3"]


def test_a_finished_run_has_nothing_to_resume_and_says_so(flags, capsys):
    run(flags(max_iters=3))
    before = (out_dir(flags()) / "last.pt").read_bytes()
    run(flags(max_iters=3, init_from="resume"))
    assert "raise --max_iters" in capsys.readouterr().err
    assert (out_dir(flags()) / "last.pt").read_bytes() == before


def test_auto_starts_and_then_resumes(flags, tmp_path):
    run(flags(init_from="auto", max_iters=20))
    run(flags(init_from="auto"))
    run(flags(out_dir=tmp_path / "whole"))
    assert_same_run(flags(), flags(out_dir=tmp_path / "whole"))


def test_options_on_resume(flags, tmp_path, capsys):
    """A resumed run has its own options. Those given again override them; a config file does not override a flag."""
    file = tmp_path / "run.py"
    names = [flag.removeprefix("--").partition("=") for flag in flags()]
    file.write_text("".join(f"{key} = {value!r}\n" for key, _, value in names), encoding="utf-8")
    run([str(file), "--weight_decay=0.3", "--max_iters=10"])
    assert "resumed" not in capsys.readouterr().out
    run([f"--out_dir={out_dir(flags())}", "--init_from=resume", "--max_iters=12"])  # without the file
    assert capsys.readouterr().out.startswith("resumed at step 10\n")
    assert last(flags())["config"]["weight_decay"] == 0.3 and last(flags())["config"]["n_embd"] == 16
    run([str(file), "--init_from=resume", "--max_iters=14", "--beta2=0.9"])
    state = last(flags())
    assert state["config"]["weight_decay"] == 0.3 and state["config"]["max_iters"] == 14
    assert state["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.3
    assert state["optimizers"][0]["param_groups"][0]["betas"] == (0.9, 0.9)
    with pytest.raises(UserError, match="n_layer=1: .*last.pt has n_layer=2, which can't change"):
        train.main([str(file), "--init_from=resume", "--n_layer=1"])
    with pytest.raises(UserError, match="optimizer=muon"):
        train.main([str(file), "--init_from=resume", "--optimizer=muon"])
    with pytest.raises(UserError, match="^ema_decay=0.5"):
        train.main([str(file), "--init_from=resume", "--ema_decay=0.5"])
    with pytest.raises(UserError, match="^dataset=words: its vocabulary"):
        train.main([str(file), "--init_from=resume", "--dataset=words", "--max_iters=20"])


def test_another_run_is_not_overwritten(flags):
    run(flags(max_iters=2))
    before = (out_dir(flags()) / "last.pt").read_bytes()
    for again in (flags(max_iters=3), flags(max_iters=3, init_from=out_dir(flags()) / "best.pt")):
        with pytest.raises(UserError, match="--overwrite=True"):
            train.main(again)
    assert (out_dir(flags()) / "last.pt").read_bytes() == before
    run(flags(max_iters=3, overwrite=True))
    assert last(flags())["step"] == 3 and [row[0] for row in rows(flags())] == ["step", "3"]


def test_a_folder_in_use_is_refused(flags):
    code = "import sys; from pathlib import Path; from quill.files import folder_lock\n"
    code += "with folder_lock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(out_dir(flags()))]
    with subprocess.Popen(argv, cwd=train.__file__.rpartition("/")[0], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is writing there"):
            train.main(flags())
        other.kill()
    run(flags(max_iters=1))


def test_fine_tuning_starts_from_the_weights_alone(flags, tmp_path, capsys):
    run(flags(ema_decay=0.5))
    tuned = [flag for flag in flags(out_dir=tmp_path / "tuned") if not flag.startswith(("--n_", "--block"))]
    tuned.append(f"--init_from={out_dir(flags()) / 'last.pt'}")
    capsys.readouterr()
    run([*tuned, "--eval_only"])
    assert f"val loss {float(rows(flags())[-1][3]):.4f}" in capsys.readouterr().out
    assert not (tmp_path / "tuned").exists()
    run([*tuned, "--max_iters=1", "--learning_rate=1e-12", "--min_lr=0"])
    state = checkpoint.load(tmp_path / "tuned" / "last.pt")
    assert state["step"] == 1 and state["config"]["n_embd"] == 16
    source = last(flags())["ema"]
    assert all(torch.allclose(state["model"][key], source[key], atol=1e-6) for key in source)
    with pytest.raises(UserError, match="n_layer=3: .* has n_layer=2"):
        train.main([*tuned, "--n_layer=3", "--overwrite=True"])
    with pytest.raises(UserError, match="no such checkpoint"):
        train.main([*flags(), "--init_from=nowhere.pt", "--overwrite=True"])


def test_only_a_resume_keeps_the_number_of_threads(flags, tmp_path, monkeypatch):
    """A fine-tuned run may be on another machine; the number decides how sums are rounded, so a resume keeps it."""
    run(flags(max_iters=2))
    assert last(flags())["threads"] == torch.get_num_threads()
    kept = []
    monkeypatch.setattr(train, "pick_machine", lambda c, group, saved: kept.append(saved) or pick_machine(c, group))
    run(flags(max_iters=3, init_from="resume"))
    run(flags(max_iters=2, init_from=f"{out_dir(flags())}/last.pt", out_dir=tmp_path / "tuned"))
    run(flags(max_iters=2, out_dir=tmp_path / "new"))
    assert kept == [torch.get_num_threads(), None, None]


def test_eval_only_gives_the_checkpoints_loss(flags, capsys):
    run(flags())
    capsys.readouterr()
    run(flags(init_from="resume", eval_only=True))
    assert f"step 40: val loss {float(rows(flags())[-1][3]):.4f}, perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["prose", "words"])
def test_evaluation_is_the_mean_over_the_whole_split(flags, dataset, device):
    config = TrainConfig(**train.read_args(flags(dataset=dataset, device=device.type), TrainConfig, "")[1])
    machine = pick_machine(config)
    opened = open_splits(config, machine)
    data = opened.dataset
    torch.manual_seed(0)
    model = GPT(config, data.tokenizer.vocab_size)
    tokens = np.array(data.val)
    total, count = 0.0, 0
    if dataset == "prose":
        pieces = [tokens[i : i + 17] for i in range(0, len(tokens) - 1, 16)]
    else:
        pieces = np.split(np.append(tokens, data.tokenizer.bos), np.flatnonzero(tokens == data.tokenizer.bos)[1:])
        pieces = [np.append(piece[piece != 99], data.tokenizer.bos)[: len(piece) + 1] for piece in pieces]
        pieces[-1] = pieces[-1][:-1]
    for piece in pieces:  # one at a time, without padding
        piece = torch.tensor(piece.astype(np.int64))[None]
        logits = model(piece[:, :-1])[0]
        total += torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
        count += piece.size(1) - 1
    assert count == (len(tokens) - 1 if dataset == "prose" else len(tokens))
    error = 1e-6 if device.type == "cpu" else 1e-4  # TF32's
    loss = train.evaluate(model.to(machine.device), opened.val_batches, config, machine)
    assert loss == pytest.approx(total / count, abs=error) and model.training


@pytest.mark.parametrize("dataset", ["prose", "words"])
def test_train_tail_is_the_last_tenth_of_the_training_split(flags, dataset):
    config = TrainConfig(**train.read_args(flags(dataset=dataset, val_split="train_tail"), TrainConfig, "")[1])
    whole, opened = open_dataset(config.data_dir, dataset), open_splits(config, pick_machine(config))
    rest, tail = opened.dataset.train, opened.dataset.val
    assert np.array_equal(np.concatenate([rest, tail]), whole.train)
    assert len(tail) == pytest.approx(len(whole.train) / 10, abs=10)  # as a word has at most 9 letters
    assert (opened.train_batches.n_tokens, opened.val_batches.n_tokens) == (len(rest), len(tail))
    if dataset == "words":
        assert tail[0] == whole.tokenizer.bos


def test_what_train_tail_refuses(flags, tmp_path):
    run(flags(val_split="train_tail", max_iters=10, eval_interval=10))
    run(flags(init_from="resume", max_iters=20, eval_interval=10))
    with pytest.raises(UserError, match="val_split=val: .*last.pt has val_split=train_tail, which can't change"):
        run(flags(init_from="resume", val_split="val"))
    (tmp_path / "long.txt").write_text("short\n" * 20 + "l" + "o" * 800 + "ng\n", encoding="utf-8")
    prepare.main([f"--input={tmp_path / 'long.txt'}", "--dataset=long", "--documents=lines", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match="no document starts in the last tenth of long/train.bin"):
        run(flags(dataset="long", data_dir=tmp_path, val_split="train_tail", out_dir=tmp_path / "other"))


def test_a_step_is_adamw_by_formula(flags):
    """One step from zero moments, written out: w ← w (1 - lr λ) - lr g / (|g| + ε), with g clipped to norm 1."""
    config = TrainConfig(**train.read_args(flags(grad_clip=0.5), TrainConfig, "")[1])
    machine = pick_machine(config)
    data = open_splits(config, machine)
    state, batches = TrainState(config, {}, data.dataset.tokenizer, machine), data.train_batches
    state.add_optimizers()
    model = state.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, [(x, y, _)] = batches.global_batch(0)
    loss = model(x, y)[1]
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    assert norm > 0.5  # so that clipping bites
    tokens = train.train_step(state, batches, config, machine)
    [(got, got_norm)] = state.pending
    assert got.item() == pytest.approx(loss.item(), abs=1e-6) and got_norm.item() == pytest.approx(norm, rel=1e-5)
    assert tokens == 64
    lr = 1e-2 / 5  # the first of four warm-up steps
    for name, parameter in model.named_parameters():
        g = gradients[name] * (0.5 / (norm + 1e-6))
        decayed = before[name] * (1 - lr * 0.1 * (parameter.dim() == 2))
        torch.testing.assert_close(parameter.detach(), decayed - lr * g / (g.abs() + 1e-8), atol=2e-6, rtol=1e-4)


def test_ema_by_formula(flags, monkeypatch, device):
    weights = []
    step = train.train_step

    def recorded(state, *args):
        result = step(state, *args)
        weights.append(state.model.lm_head.weight.detach().clone())
        return result

    monkeypatch.setattr(train, "train_step", recorded)
    run(flags(ema_decay=0.8, max_iters=10, device=device.type, compile=False))
    average = weights[0]
    for weight in weights[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(last(flags())["ema"]["lm_head.weight"], average.cpu())
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in last(flags())["ema"])


def test_a_non_finite_step_stops_and_keeps_the_checkpoint(flags, monkeypatch):
    step = train.train_step

    def spoilt(at, factors):
        def spoil(state, *args):
            tokens = step(state, *args)
            if state.progress.step == at:
                state.pending[-1] = tuple(map(torch.mul, state.pending[-1], factors))
            return tokens

        return spoil

    monkeypatch.setattr(train, "train_step", spoilt(25, (math.nan, 1)))
    with pytest.raises(UserError, match="step 25: loss nan"):
        train.main(flags())
    assert last(flags())["step"] == 20 and [row[0] for row in rows(flags())] == ["step", "20"]
    monkeypatch.setattr(train, "train_step", spoilt(21, (1, math.inf)))
    with pytest.raises(UserError, match="step 21: loss .*gradient norm inf"):
        train.main(flags(init_from="resume"))
    assert last(flags())["step"] == 20


def test_a_non_finite_evaluation_saves_nothing(flags):
    """The step before an evaluation may have broken the weights, with a loss that was still fine."""
    with pytest.raises(UserError, match="validation loss is nan"):
        train.main(flags(learning_rate=1e38, eval_interval=1, schedule="constant", warmup_iters=0))
    assert not list(out_dir(flags()).glob("*.pt"))


@pytest.mark.parametrize("kind, eval_iters", [("char", 0), ("byte", 0), ("char", 1)])
def test_bits_per_byte_are_the_loss_over_the_bytes_of_the_validation_text(flags, tmp_path, kind, eval_iters):
    """The text is split where prepare.py splits it, and its first token is not predicted."""
    text = "Ärger im Büro – naïve Straße 日本語 🙂\n" * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare.main([f"--input={tmp_path / 'text.txt'}", "--dataset=it", f"--tokenizer={kind}", f"--data_dir={tmp_path}"])
    run(flags(dataset="it", data_dir=tmp_path, max_iters=2, eval_interval=2, eval_iters=eval_iters))
    tokens = list(text) if kind == "char" else list(text.encode())
    predicted = tokens[len(tokens) * 9 // 10 :][1:]
    predicted = predicted[: eval_iters * 4 * 16 or None]  # batches of 4 × 16 tokens
    n_bytes = len("".join(predicted).encode()) if kind == "char" else len(bytes(predicted))
    *_, loss, _, bits = map(float, rows(flags())[-1])
    assert bits == pytest.approx(loss * len(predicted) / math.log(2) / n_bytes, rel=1e-12)


def test_a_run_of_an_older_quill_is_resumed_without_losing_rows(flags, tmp_path):
    """Its metrics.csv has no bits_per_byte, and gets none."""
    run(flags(max_iters=20, eval_interval=10))
    path = out_dir(flags()) / "metrics.csv"
    older = [line.rpartition(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join([*older, ""]), encoding="utf-8")
    run(flags(init_from="resume", eval_interval=10))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == older and [line.split(",")[0] for line in lines[3:]] == ["30", "40"]
    assert {line.count(",") for line in lines} == {6}


def test_a_damaged_metrics_file_loses_its_damaged_rows_only(flags, tmp_path):
    run(flags(max_iters=20, eval_interval=10))
    path = out_dir(flags()) / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"\n\0\0\n25\n15,0.1")
    run(flags(init_from="resume", eval_interval=10))
    run(flags(eval_interval=10, out_dir=tmp_path / "whole"))
    assert rows(flags()) == rows(flags(out_dir=tmp_path / "whole"))


def test_a_run_killed_in_its_first_save_resumes_from_best(flags, tmp_path):
    run(flags(max_iters=20))
    (out_dir(flags()) / "last.pt").unlink()
    run(flags(init_from="auto"))
    run(flags(out_dir=tmp_path / "whole"))
    assert_same_run(flags(), flags(out_dir=tmp_path / "whole"))


def test_a_moved_run_goes_on_where_it_is(flags, tmp_path):
    run(flags(max_iters=20))
    out_dir(flags()).rename(tmp_path / "moved")
    run([f"--out_dir={tmp_path / 'moved'}", "--init_from=resume", "--max_iters=30"])
    assert not out_dir(flags()).exists() and checkpoint.load(tmp_path / "moved" / "last.pt")["step"] == 30


def test_overwriting_leaves_nothing_of_the_other_run(flags, monkeypatch):
    run(flags(max_iters=5))

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(overwrite=True))
    assert sorted(path.name for path in out_dir(flags()).iterdir()) == [".run", "metrics.csv"]


def test_options_are_checked_when_they_are_complete(flags):
    """min_lr and n_head come from the checkpoint: against the defaults, these two would be refused."""
    run(flags(max_iters=2, min_lr=1e-6))
    folder = out_dir(flags())
    run([f"--out_dir={folder}", "--init_from=resume", "--max_iters=3", "--learning_rate=3e-5"])
    data = [flag for flag in flags() if flag.startswith("--data")]
    run([*data, f"--init_from={folder / 'last.pt'}", "--n_embd=16", "--eval_only", "--device=cpu"])


def test_float16_skips_a_step_that_overflows_and_gives_up_when_all_do(flags, monkeypatch):
    """The path of older GPUs, on a CPU."""
    config = TrainConfig(**train.read_args(flags(), TrainConfig, "")[1])
    machine = replace(pick_machine(config), dtype=torch.float16)
    data = open_splits(config, machine)
    state = TrainState(config, {}, data.dataset.tokenizer, machine)
    state.add_optimizers()
    state.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    start = state.model.lm_head.weight.detach().clone()
    train.train_step(state, data.train_batches, config, machine)
    assert torch.equal(state.model.lm_head.weight, start) and scaler.get_scale() == 2.0**39
    scaler.update(2.0**10)
    state.pending.clear()
    for _ in range(40):
        train.train_step(state, data.train_batches, config, machine)
    losses, _ = state.read_losses()
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.01  # one step's batch differs from another's by more
    assert scaler.get_scale() == 2.0**10
    scaler.update(1e-5)
    state.pending.append((torch.tensor(1.0), torch.tensor(math.inf)))
    with pytest.raises(UserError, match="float16"):
        state.read_losses()
    monkeypatch.setattr(train, "pick_machine", lambda *args: machine)
    with pytest.raises(UserError, match="--optimizer=muon does not work with float16"):
        train.main(flags(optimizer="muon"))


def test_a_capped_evaluation_says_so(flags, capsys):
    run(flags(eval_iters=1, max_iters=1))
    assert "note: --eval_iters=1 evaluates the first 4 of 25 rows only" in capsys.readouterr().err
    run(flags(eval_iters=1000, max_iters=1, overwrite=True))
    assert capsys.readouterr().err == ""


def test_a_config_file_does_not_undo_a_flag_and_says_so(flags, tmp_path, capsys):
    file = tmp_path / "run.py"
    file.write_text("learning_rate = 0.005\n", encoding="utf-8")
    run([str(file), *flags(max_iters=2)])
    capsys.readouterr()
    run([str(file), f"--out_dir={out_dir(flags())}", "--init_from=resume", "--max_iters=3"])
    assert "note: learning_rate=0.01 was given as a flag earlier" in capsys.readouterr().err


def test_patience_stops_early_and_best_is_never_replaced_by_worse(flags, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    run(flags(eval_interval=5, patience=3))
    assert last(flags())["step"] == 25 and last(flags())["evals_since_best"] == 3
    best = checkpoint.load(out_dir(flags()) / "best.pt")
    assert best["step"] == 10 and best["best_val_loss"] == 2.0
    assert "stopped early" in capsys.readouterr().out


def test_samples_at_evaluations_and_at_the_end(flags, capsys):
    run(flags(dataset="words", eval_samples=2, final_samples=5, sample_tokens=12, log_interval=100))
    out = capsys.readouterr().out.splitlines()
    plain = [line for line in out if not line.startswith(("step", "best", "5 samples")) and "parameters" not in line]
    assert len(plain) == 2 * 2 + 5
    assert all(len(line) <= 12 and line.isalpha() or line == "" for line in plain)


def test_a_compiler_that_fails_is_one_line_and_training_goes_on(flags, monkeypatch, capsys):
    def compiler(model):
        def fails(*batch):
            raise RuntimeError("no compiler here\nand a long story")

        return fails

    run(flags())
    expected = last(flags())["model"]
    monkeypatch.setattr(torch, "compile", compiler)
    run(flags(compile=True, overwrite=True))
    assert "note: torch.compile failed (no compiler here); training continues uncompiled\n" in capsys.readouterr().err
    assert same(last(flags())["model"], expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_a_compiled_run_is_the_uncompiled_run(flags, tmp_path):
    run(flags())
    run(flags(compile=True, out_dir=tmp_path / "compiled"))
    compiled = last(flags(out_dir=tmp_path / "compiled"))["model"]
    assert compiled.keys() == last(flags())["model"].keys()
    for name, weight in last(flags())["model"].items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_older_than_an_option_has_its_default(flags, tmp_path):
    """Resuming may restate it; fine-tuning with another value is refused by name."""
    run(flags(max_iters=2, eval_interval=2))
    path = tmp_path / "run" / "last.pt"
    state = checkpoint.load(path)
    for key in ("norm_embedding", "norm_final", "init_std"):
        del state["config"][key]
    checkpoint.save(path, state)
    assert train.main(flags(max_iters=4, eval_interval=2, init_from="resume", norm_final=True)) == 0
    with pytest.raises(UserError, match="norm_embedding=True: .* has norm_embedding=False"):
        train.main(flags(init_from=path, out_dir=tmp_path / "tuned", norm_embedding=True))
    with pytest.raises(UserError, match="init_std=0.3: .* has init_std=None"):
        train.main(flags(init_from=path, out_dir=tmp_path / "tuned", init_std=0.3))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dry_run": True, "n_embd": 10**10, "n_head": 1, "mlp_ratio": 0}, "is out of memory"),
        ({"dry_run": True, "mlp_ratio": 1e200}, "--mlp_ratio=1e\\+200 × --n_embd=16 makes the MLP too wide"),
        ({"batch_size": 10**12}, "too many sequences in a step"),
        ({"gradient_accumulation_steps": 10**23}, "--gradient_accumulation_steps=1000.*: must be a finite number"),
    ],
)
def test_sizes_beyond_any_memory_are_one_line(flags, options, words):
    with pytest.raises(UserError, match=words):
        train.main(flags(**options))
