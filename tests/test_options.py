"""quill/options.py: defaults are nanoGPT's, and values out of range are refused."""

import dataclasses

import pytest

from quill.errors import UserError
from quill.options import ModelConfig, SampleConfig, TrainConfig


def test_defaults_that_nanogpt_has_are_nanogpts():
    """They are copied from train.py and sample.py of github.com/karpathy/nanoGPT."""
    config = dataclasses.asdict(TrainConfig())
    theirs = {
        "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_only": False, "init_from": "scratch",
        "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024,
        "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4,
        "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
        "warmup_iters": 2000, "min_lr": 6e-5,
    }  # fmt: skip
    assert {key: config[key] for key in theirs} == theirs
    assert TrainConfig().decay_end == 600000
    assert TrainConfig(max_iters=7).decay_end == 7
    theirs = {
        "num_samples": 10,
        "max_new_tokens": 500,
        "temperature": 0.8,
        "top_k": 200,
        "seed": 1337,
        "out_dir": "out",
    }
    config = dataclasses.asdict(SampleConfig())
    assert {key: config[key] for key in theirs} == theirs


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_embd": 10, "n_head": 3}, ["--n_embd=10", "--n_head=3"]),
        ({"n_embd": 6, "n_head": 2, "position": "rope"}, ["--position=rope", "even"]),
        ({"n_layer": -1}, ["--n_layer=-1", "at least 0"]),
        ({"n_embd": 0}, ["--n_embd=0"]),
        ({"batch_size": 0}, ["--batch_size=0"]),
        ({"max_iters": 0}, ["--max_iters=0"]),
        ({"learning_rate": 0.0}, ["--learning_rate=0.0", "above 0"]),
        ({"learning_rate": float("nan")}, ["--learning_rate=nan", "finite"]),
        ({"warmup_iters": 10**400}, ["--warmup_iters=1000", "must be a finite number below 9.22e+18"]),
        ({"out_dir": ""}, ["--out_dir= is empty"]),
        ({"dropout": 1.0}, ["--dropout=1.0", "below 1"]),
        ({"min_lr": 1.0}, ["--min_lr=1.0", "--learning_rate=0.0006"]),
        ({"wsd_decay": 1.5}, ["--wsd_decay=1.5"]),
        ({"mlp_ratio": 0.001, "n_embd": 12}, ["--mlp_ratio=0.001"]),
        ({"ema_decay": 1.0}, ["--ema_decay=1.0"]),
    ],
)
def test_wrong_values(options, words):
    with pytest.raises(UserError) as error:
        TrainConfig(**options)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_model_config_is_checked_at_construction():
    with pytest.raises(UserError):
        ModelConfig(n_embd=7, n_head=2)
