"""interop.py: nanoGPT's checkpoints open."""

import pytest
import torch

from model import GPT
from quill import checkpoint
from quill.errors import UserError
from quill.options import ModelConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "dropout": 0.0}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_checkpoint(tmp_path, prefix):
    """As its train.py writes it: model_args, weights (compiled: with a prefix; old: with mask buffers), optimizer."""
    torch.manual_seed(0)
    ours = {"model": GPT(ModelConfig(**SHAPE), 11).state_dict()}
    weights = {prefix + name: tensor for name, tensor in ours["model"].items()}
    weights[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    theirs = {
        "model": weights,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": SHAPE | {"vocab_size": 11},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.25),
        "config": {"dataset": "prose", "out_dir": "out"},
    }
    torch.save(theirs, tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert (loaded["step"], loaded["best_val_loss"], loaded["config"]["dataset"]) == (250, 1.25, "prose")
    model = checkpoint.load_model(loaded)
    assert all(torch.equal(value, ours["model"][key]) for key, value in model.state_dict().items())
    del theirs["model_args"]["n_head"]
    torch.save(theirs, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt: .*n_head"):
        checkpoint.load(tmp_path / "ckpt.pt")
