"""What a model computes on its way to a token, as numbers.

Shapes: B sequences in a batch, T tokens in a sequence, H = n_head, D = C / H.
"""

import math

import torch

from model import GPT
from quill.generation import eval_mode


@torch.no_grad()
def attention_maps(model: GPT, idx: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's attention weights on `idx` (1, T), in float32. → [(H, T, T)], rows are queries"""
    maps = []

    def keep(layer, args):
        x, rotary, _ = args
        q, k, _ = layer.qkv(x, rotary)
        maps.append(attention_weights(q, k)[0])

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.transformer.h]
    try:
        with eval_mode(model):
            model.final_hidden(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Compute softmax(q kᵀ / √D + causal mask), which `attend` uses but does not return.

    `q`, `k` (B, H, T, D) → (B, H, T, T); each row has a query's weights for the keys up to its own position.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)
