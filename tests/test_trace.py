"""quill/trace.py: the numbers are those that the model computes."""

import pytest
import torch

from model import GPT
from quill.options import ModelConfig
from quill.trace import attention_maps


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_maps_times_values_are_what_the_model_computes(position, qk_norm):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "dropout": 0.3, "init_std": 0.5, "bias": True}
    model = GPT(ModelConfig(**shape, position=position, qk_norm=qk_norm), 50)
    idx = torch.randint(50, (1, 17))
    maps = attention_maps(model, idx)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    values, mixed = [], []
    for block in model.eval().transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, y: values.append(y[0, :, 64:]))
        block.attn.c_proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0][0]))
    model(idx)
    assert len(maps) == len(mixed) == 2 and maps[0].shape == (4, 17, 17)
    for weights, v, y in zip(maps, values, mixed, strict=True):
        got = weights @ v.unflatten(1, (4, 8)).transpose(0, 1)
        torch.testing.assert_close(got.transpose(0, 1).flatten(1), y, atol=1e-5, rtol=1e-5)
        assert weights.std() > 0.1  # sharp: a map of another layer, or without the rotation, would not fit
