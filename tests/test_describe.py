"""describe.py: what --dry_run says, against figures worked by hand."""

import re

import pytest

import train


def run(flags):
    assert train.main(flags) == 0


def test_dry_run_describes_and_trains_nothing(flags, tmp_path, capsys):
    """By hand: C = 16, block 16, 2 layers without bias, tied; AdamW has two moments, besides weights and gradients."""
    out_dir = tmp_path / "never"
    assert train.main(flags(dry_run=True, out_dir=out_dir, bias=False)) == 0
    text = capsys.readouterr().out
    vocab = int(re.search(r"wte +(\d+) × 16", text)[1])
    block = 12 * 16 * 16 + 2 * 16
    parameters = vocab * 16 + 16 * 16 + 2 * block + 16
    assert f" {parameters:,} parameters" in text and "c_attn     48 × 16" in text and "h.1: the same again" in text
    flops = 6 * (parameters - 16 * 16) + 12 * 2 * 16 * 16
    assert f"{flops:,} to train on" in text and f"{4 * 4 * parameters / 2**20:.1f} MiB of weights" in text
    assert "a step            4 rows, 64 tokens" in text
    epoch = float(re.search(r"an epoch +([\d.]+) steps", text)[1])
    tokens = int(re.search(r"an epoch .* steps, ([\d,]+) tokens", text)[1].replace(",", ""))
    assert f"40 steps, {40 / epoch:.1f}" in text and not out_dir.exists() and tokens == pytest.approx(64 * epoch, abs=4)


def test_dry_run_of_a_model_that_fits_nowhere(flags, capsys):
    """GPT-3's shape, 12 · 96 · 12288² and more parameters, takes no memory to describe."""
    assert train.main(flags(dry_run=True, n_layer=96, n_head=96, n_embd=12288, tensorboard=True)) == 0
    assert int(re.search(r"GPT +([\d,]+) parameters", capsys.readouterr().out)[1].replace(",", "")) > 12 * 96 * 12288**2


def test_dry_run_of_documents_in_a_folder_that_is_in_use(flags, capsys):
    """The run in out_dir stays unchanged, and a step's tokens are those of documents of mean length."""
    run(flags(dataset="words", max_iters=2, eval_interval=2))
    capsys.readouterr()
    assert train.main(flags(dataset="words", dry_run=True)) == 0
    text = capsys.readouterr().out
    rows, tokens = map(int, re.search(r"a step +(\d+) rows, (\d+) tokens", text).groups())
    steps, total = re.search(r"an epoch +([\d.]+) steps, ([\d,]+) tokens", text).groups()
    assert rows == 4 and tokens == pytest.approx(int(total.replace(",", "")) / float(steps), rel=0.05)
