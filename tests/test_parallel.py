"""parallel.py and sharded.py: two ranks that share a model train it as one process does, from and to one file."""

import csv
import json
import os

import pytest
import torch
from test_processes import command

import train
from quill import checkpoint

SHAPE = {"n_layer": 3, "n_embd": 32, "block_size": 32, "bias": True, "gradient_accumulation_steps": 3}
SHAPE |= {"learning_rate": 1e-3, "eval_interval": 10, "eval_iters": 7, "final_samples": 2, "sample_tokens": 20}
KINDS = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "untied": {"tie_weights": False},
    "documents": {"dataset": "words", "optimizer": "muon", "tie_weights": False, "ema_decay": 0.9},
    "ema": {"ema_decay": 0.9},
    "ngram": {"ngram": 3, "ngram_rows": 64},
    "rope": {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "optimizer": "muon"},
    "uneven": {"n_embd": 34, "optimizer": "muon"},  # 34 rows and 2 ranks or 4, 3 layers
    "recomputed": {"activation_checkpointing": True, "optimizer": "muon"},
}


def on_ranks(world_size, *runs):
    """Run train.py with each list of flags on `world_size` ranks. → the bytes that rank 0 holds in each, stdout"""
    argv = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", "tests/many_runs.py"]
    *lines, held = command(*argv, json.dumps(runs), check=0).stdout.splitlines()
    return json.loads(held), lines


def read_losses(folder):
    """The columns of metrics.csv with losses, in one list."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) for column in ("train_loss", "val_loss")]


def assert_same_run(folder, other, losses=1e-5, weights=1e-4):
    assert read_losses(folder) == pytest.approx(read_losses(other), abs=losses)
    ours, theirs = (checkpoint.load(path / "last.pt") for path in (folder, other))
    assert ours["step"] == theirs["step"] and ours["losses"] == theirs["losses"] == []
    for kind in ("model", "ema"):
        for name, weight in (theirs[kind] or {}).items():
            torch.testing.assert_close(ours[kind][name], weight, atol=weights, rtol=0)
    sizes = [os.path.getsize(path / "last.pt") for path in (folder, other)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)  # a tied matrix is in the file once


def is_sample(line):
    """Whether a line of stdout is a sample: of these datasets, they have letters and spaces only."""
    return line.replace(" ", "").isalpha()


def compare(flags, tmp_path, capsys, world_size, kinds, **more):
    """FSDP runs on `world_size` ranks beside runs of one process: the same losses, weights and samples."""
    options = {kind: SHAPE | KINDS[kind] | more for kind in kinds}
    for kind in kinds:
        assert train.main(flags(**options[kind], out_dir=tmp_path / "one" / kind)) == 0
    samples = [line for line in capsys.readouterr().out.splitlines() if is_sample(line)]
    runs = [flags(**options[kind], shard=True, out_dir=tmp_path / "sharded" / kind) for kind in kinds]
    _, lines = on_ranks(world_size, *runs)
    for kind in kinds:
        assert_same_run(tmp_path / "sharded" / kind, tmp_path / "one" / kind)
    assert [line for line in lines if is_sample(line)] == samples and len(samples) >= 2 * len(kinds)


def test_two_ranks_with_shards_train_as_one_process(flags, tmp_path, capsys):
    compare(flags, tmp_path, capsys, 2, ["documents"], max_iters=12, eval_interval=6)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_with_shards_train_as_one_process(flags, tmp_path, capsys, world_size):
    kinds = list(KINDS) if world_size == 2 else ["adamw", "documents", "untied", "uneven"]
    compare(flags, tmp_path, capsys, world_size, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "documents"])
@pytest.mark.parametrize("walk", [[(1, False), (2, True), (1, True)], [(2, True), (4, True), (2, False)]])
def test_a_checkpoint_continues_on_any_number_of_ranks(flags, tmp_path, kind, walk):
    """(ranks, --shard) for each third of a run. The file has whole tensors, so it does not matter who wrote it."""
    options = SHAPE | KINDS[kind] | {"max_iters": 30, "lr_decay_iters": 30, "final_samples": 0}
    assert train.main(flags(**options, out_dir=tmp_path / "whole")) == 0
    for steps, (ranks, shard) in zip((10, 20, 30), walk, strict=True):
        more = {"max_iters": steps, "shard": shard, "init_from": "auto"}
        on_ranks(ranks, flags(**options | more, out_dir=tmp_path / "walk"))
    assert_same_run(tmp_path / "walk", tmp_path / "whole")


@pytest.mark.slow
def test_a_rank_holds_its_share(flags):
    """Of weights, gradients and moments, once the first step has made the moments."""
    wide = SHAPE | {"n_embd": 96, "max_iters": 2, "eval_interval": 2, "overwrite": True}
    runs = [flags(**wide, optimizer=name, shard=shard) for name in ("adamw", "muon") for shard in (False, True)]
    for ranks in (2, 4):
        held, _ = on_ranks(ranks, *runs)
        assert 1 / ranks <= held[1] / held[0] <= 1.1 / ranks and 1 / ranks <= held[3] / held[2] <= 1.1 / ranks


@pytest.mark.slow
def test_bfloat16_is_as_without_shards(flags, tmp_path):
    """The weights travel in bfloat16, which autocast makes of them anyway; the norms and the embeddings in float32."""
    options = SHAPE | {"dtype": "bfloat16", "optimizer": "muon", "max_iters": 20}
    runs = [flags(**options, shard=shard, out_dir=tmp_path / str(shard)) for shard in (False, True)]
    on_ranks(2, *runs)
    assert_same_run(tmp_path / "True", tmp_path / "False", losses=2e-4, weights=0.02)  # a step of Muon's
