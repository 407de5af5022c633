"""state.py: what is saved is restored, losses are read once, and the best evaluation is the lowest."""

import math

import pytest
import torch

import train
from quill import checkpoint
from quill.cli import read_args
from quill.data.splits import open_splits
from quill.errors import UserError
from quill.machine import pick_machine
from quill.options import TrainConfig
from quill.state import TrainState


@pytest.fixture
def make_state(flags):
    """`make_state(saved, key=value, …)` → a TrainState of the tiny run, its batches and its machine."""

    def make(saved=None, **options):
        config = TrainConfig(**read_args(flags(**options), TrainConfig, "")[1])
        machine = pick_machine(config)
        data = open_splits(config, machine)
        state = TrainState(config, {}, data.dataset.tokenizer, machine, saved)
        state.add_optimizers(saved)
        return state, data.train_batches, machine

    return make


def take_steps(state, batches, machine, count):
    for _ in range(count):
        train.train_step(state, batches, state.config, machine)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "muon", "ema_decay": 0.9, "dropout": 0.1}], ids=["adamw", "muon-ema"]
)
def test_a_state_dict_restores_a_run_exactly(make_state, tmp_path, options, device):
    """Through a file: three more steps of the restored state equal three more of the original, on a CPU bit for bit."""
    options, atol = options | {"device": device.type}, 0 if device.type == "cpu" else 1e-3
    state, batches, machine = make_state(**options)
    take_steps(state, batches, machine, 5)
    state.read_losses()
    state.progress.seconds, state.progress.best_val_loss = 1.5, 2.25
    checkpoint.save(tmp_path / "x.pt", state.state_dict())
    other, _, _ = make_state(checkpoint.load(tmp_path / "x.pt"), init_from="resume", **options)
    assert other.progress == state.progress and other.progress.step == 5 and len(other.progress.losses) == 5
    for run in (state, other):
        take_steps(run, batches, machine, 3)
    for name, weight in state.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight, atol=atol, rtol=0)
        average = state.eval_model.state_dict()[name]
        torch.testing.assert_close(other.eval_model.state_dict()[name], average, atol=atol, rtol=0)
    torch.testing.assert_close(other.read_losses(), state.read_losses(), atol=atol, rtol=0)


def test_a_state_dict_has_plain_names(make_state):
    """No wrapper's prefix, and nothing that is not a tensor or a plain value."""
    state, _, _ = make_state(ema_decay=0.5)
    saved = state.state_dict()
    assert saved["model"].keys() == saved["ema"].keys() == dict(state.model.state_dict()).keys()
    assert all(name.startswith(("transformer.", "lm_head.")) for name in saved["model"])
    assert saved["config"]["n_embd"] == 16 and saved["tokenizer"]["kind"] == "char"


def test_fine_tuning_takes_the_weights_and_nothing_else(make_state):
    state, batches, machine = make_state(ema_decay=0.5)
    take_steps(state, batches, machine, 4)
    tuned, _, _ = make_state(state.state_dict(), init_from="somewhere.pt", ema_decay=0.5)
    assert tuned.progress.step == 0 and not tuned.optimizers[0][0].state
    for name, average in state.eval_model.state_dict().items():
        assert torch.equal(tuned.model.state_dict()[name], average)
        assert torch.equal(tuned.eval_model.state_dict()[name], average)


def test_losses_are_read_once_and_kept_in_order(make_state):
    state, batches, machine = make_state()
    take_steps(state, batches, machine, 3)
    losses, norms = state.read_losses()
    assert len(losses) == len(norms) == 3 and state.pending == [] and state.progress.losses == losses
    take_steps(state, batches, machine, 1)
    assert state.read_losses()[0] == state.progress.losses[3:]


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (1.0, math.inf)], ids=["loss", "gradient norm"])
def test_a_non_finite_step_is_named(make_state, pair):
    state, _, _ = make_state()
    state.progress.step = 7
    state.pending = [(torch.tensor(1.0), torch.tensor(1.0)), tuple(map(torch.tensor, pair))]
    with pytest.raises(UserError, match=f"step 7: loss {pair[0]}, gradient norm {pair[1]}: stopped"):
        state.read_losses()
    assert state.progress.losses == []


def test_best_and_patience(make_state):
    state, _, _ = make_state(patience=2)
    losses = [3.0, 2.0, 2.0, 2.5, 1.0]
    assert [state.record(loss) for loss in losses[:2]] == [True, True]
    assert not state.record(2.0) and state.progress.evals_since_best == 1 and not state.out_of_patience
    assert not state.record(2.5) and state.out_of_patience and state.progress.best_val_loss == 2.0
    assert state.record(1.0) and not state.out_of_patience
    assert not make_state()[0].out_of_patience  # patience 0 waits for ever
