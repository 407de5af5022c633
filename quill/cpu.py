"""Faster layers for a CPU that replace those of an existing model.

torch's own Linear, Dropout and attention leave much of a CPU unused at the sizes of a small GPT. The classes that
`speed_up` puts in place compute the same functions, with the same parameters under the same names. Those of
`for_sampling` store their weights in fewer bits. docs/records/ has the speed-up of each. OneTokenBlock is for every
device. Shapes are those of model.py.
"""

import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, Block, CausalSelfAttention, rotate
from quill.machine import Machine


def speed_up(model: GPT) -> GPT:
    """Replace the layers of a model by the faster ones below, in place, if it is on a CPU. → `model`"""
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            module.__class__ = FASTER.get(type(module), type(module))
    return model


def for_sampling(model: GPT, machine: Machine) -> GPT:
    """Move `model` to the machine, with weights of machine.dtype and the faster layers. → `model`, changed in place

    On a CPU, float16 and int8 are the type of the Linear layers' weights, which take most of the time to read, and the
    rest is float32: attention is several times slower in 16 bits. A Linear that the type can't hold is float32 too.
    Such a model only computes: it can't be trained or saved.
    """
    if machine.device.type != "cpu" or machine.dtype not in SMALLER:
        for block in speed_up(model.to(machine.device, machine.dtype)).transformer.h:
            block.__class__ = OneTokenBlock
        return model
    smaller, fits = SMALLER[machine.dtype]
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and fits(module)]:
        model.set_submodule(name, smaller(model.get_submodule(name)))  # the float32 weights are freed one by one
    return speed_up(model)


class Float16Linear(nn.Module):
    """Inference with weights in float16. It multiplies and adds in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """Inference with weights in int8 and a scale for each output. Input and output are rounded to bfloat16."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        self.weight = (weight / self.scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16().contiguous(), self.weight, self.scale)
        y = y.view(*x.shape[:-1], len(self.scale)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Dropout(nn.Dropout):
    """nn.Dropout with `p` rounded to 16 bits.

    torch's own takes a third of a training step at 10.7M parameters, because it draws number by number. Here, a word of
    64 random bits decides on four elements.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        p = rounded(self.p) if self.training else 0.0
        if p == 0:
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        drawn, first = words.view(torch.int16)[: x.numel()].view(x.shape), int(p * 2**16) - 2**15
        # 1 from `first` on, else 0: faster than a comparison and the conversion of its bools.
        keep = drawn.clamp_(first - 1, first).sub_(first - 1).to(x.dtype)
        return x * keep.mul_(1 / (1 - p))


def rounded(p: float) -> float:
    """Return the probability below 1 that is nearest to `p` and that 16 bits can express."""
    return min(round(p * 2**16), 2**16 - 1) / 2**16


class Linear(nn.Linear):
    """nn.Linear, faster in float32 for the few rows of generation. (…, in) → (…, out)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        few = 0 < x.numel() <= 32 * self.in_features and not self.training
        if not few or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows, parts = x.reshape(-1, self.in_features), parts_of(self.out_features)
        # With few rows, most of the time is spent reading the weights, which F.linear reads at half the memory's speed.
        # As the left factor of a batched product, in parts that the threads share, they are read at full speed.
        y = torch.bmm(self.weight.view(parts, -1, self.in_features), rows.T.expand(parts, -1, -1))
        y = y.view(self.out_features, -1).T.view(*x.shape[:-1], self.out_features)  # from (parts, out / parts, rows)
        return y if self.bias is None else y + self.bias


@cache
def parts_of(out_features: int) -> int:
    """Return the smallest number of equal parts, from 2 to 31, into which the rows of a weight can be split; else 1."""
    return next((n for n in range(2, 32) if out_features % n == 0), 1)


class Attention(CausalSelfAttention):
    """CausalSelfAttention without torch's fused kernel where that is slow.

    torch has no fused kernel with dropout on a CPU, and the gradient of its kernel for bfloat16 is slow for
    contexts of up to 512 tokens.
    """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # noqa: D102
        T, D = q.shape[-2:]
        dropout = rounded(self.attn_dropout.p) if self.training else 0.0
        if T > 1 and (dropout or (q.dtype == torch.bfloat16 and T <= 512)):
            mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5).softmax(dim=-1)
            return torch.bmm(self.attn_dropout(weights), v).unflatten(0, (-1, self.n_head))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)


class OneTokenBlock(Block):
    """One more token with a cache, in few operations. It does not call the modules attn and mlp, nor their hooks."""

    def forward(self, x: torch.Tensor, rotary=None, cache=None) -> torch.Tensor:  # noqa: D102
        attn, mlp = self.attn, self.mlp
        if cache is None or not cache.length or self.training or not self.residual or mlp is None:
            return super().forward(x, rotary, cache)
        qkv = attn.c_attn(self.ln_1(x)).view(len(x), 3, attn.n_head, 1, -1)  # with one token, no permutation is needed
        if rotary is not None or not isinstance(attn.qk_norm, nn.Identity):
            qk = attn.qk_norm(qkv[:, :2])
            qk = qk if rotary is None else rotate(qk, rotary)
            qkv = torch.cat([qk, qkv[:, 2:]], dim=1)
        keys, values = cache.append_both(qkv[:, 1:])
        y = F.scaled_dot_product_attention(qkv[:, 0], keys, values, attn_mask=cache.mask)
        x = x + attn.c_proj(y.view(x.shape))
        return x + mlp.c_proj(mlp.activation(mlp.c_fc(self.ln_2(x))))


FASTER = {nn.Linear: Linear, nn.Dropout: Dropout, CausalSelfAttention: Attention, Block: OneTokenBlock}
SMALLER = {
    # A weight beyond float16's range, or not finite, stays in float32.
    torch.float16: (Float16Linear, lambda linear: linear.weight.abs().max() <= torch.finfo(torch.float16).max),
    # torch's kernel for int8 reads beyond the end of a row that is not made of whole vectors.
    torch.int8: (Int8Linear, lambda linear: linear.in_features % 32 == 0),
}
