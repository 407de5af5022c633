"""GPT: the decoder-only transformer of GPT-2. Read it from top to bottom.

    model = GPT(config, vocab_size)
    logits, loss = model(idx, targets)
    idx = model.generate(idx, max_new_tokens=100)

This file imports torch and nothing from quill, so you can copy it into your own project. `config` is any object with
the fields of `ModelConfig` in quill/options.py: block_size, n_layer, n_head, n_embd, dropout, attention_dropout, bias,
norm, norm_embedding, norm_final, activation, position, ngram, ngram_rows, mlp_ratio, residual, tie_weights, qk_norm,
init_std.

Parameters have GPT-2's names. Linear weights have torch's shape (out, in); GPT-2's checkpoints hold c_attn, c_fc and
c_proj transposed. quill/cpu.py has faster layers for a CPU, and quill/generation.py generates with a cache.

Shapes: B sequences in a batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size.
References: GPT-2 (Radford et al. 2019) for the architecture and the initialisation; nanoGPT for the exact GELU.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

rms_norm = partial(nn.RMSNorm, eps=1e-5, elementwise_affine=False)  # Zhang & Sennrich 2019, without weights


def swiglu(x):
    """SwiGLU (Shazeer 2020). The first half of `x` (…, 2 × hidden) gates the second. → (…, hidden)"""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


def squared_relu(x):
    """ReLU² (So et al. 2021, "Primer")."""
    return F.relu(x).square()


NORMS = {  # of the last dimension, (…, C) → (…, C)
    "layernorm": lambda config: nn.LayerNorm(config.n_embd, bias=config.bias),
    "rmsnorm": lambda config: rms_norm(config.n_embd),
    "none": lambda config: nn.Identity(),
}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # OpenAI's weights of GPT-2 were trained with it
    "relu": F.relu,
    "relu2": squared_relu,
    "swiglu": swiglu,
}


def rotary_table(block_size, head_width):
    """RoPE (Su et al. 2021): position t turns pair i by t / 10000^(2i/D). → its cos and sin (2, block_size, D/2)"""
    frequency = 10000.0 ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x, rotary):
    """Turn each pair (i, i + D/2) of `x` (B, H, T, D) by its position's angle; `rotary` is (2, T, D/2)."""
    (cos, sin), (a, b) = rotary, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def ngram_vectors(idx, n, table, start=0):
    """Concatenate vectors for the last 2, 3, …, n tokens at each place of `idx` (B, T) from start. → (B, T - start, C)

    A hash picks their rows in `table`, (rows, C / (n - 1)), after the Over-Tokenized Transformer (Huang et al. 2025).
    """
    row, vectors = idx, []
    for back in range(1, n):
        earlier = F.pad(idx, (back, 0))[:, :-back]  # token 0 comes before the first
        row = (row * 1_000_003 + earlier) % len(table)
        vectors.append(F.embedding(row[:, start:], table))
    return torch.cat(vectors, dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each token sees itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.qk_norm = rms_norm(config.n_embd // config.n_head) if config.qk_norm else nn.Identity()

    def forward(self, x, rotary=None, cache=None):
        """`x` (B, T, C) → (B, T, C). rotary, cache: see `GPT.final_hidden`."""
        q, k, v = self.qkv(x, rotary)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, tokens so far, D)
        y = self.attend(q, k, v).transpose(1, 2).reshape(x.shape)  # concatenate the heads, (B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def qkv(self, x, rotary=None):
        """`x` (B, T, C) → queries, keys and values, normalised and rotated, (B, H, T, D) each."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q.type_as(v), k.type_as(v), v  # under autocast, the norm and the rotation return float32

    def attend(self, q, k, v):
        """softmax(q kᵀ / √D + causal mask) v, with dropout on the weights. (B, H, T, D)"""
        dropout = self.attn_dropout.p if self.training else 0.0
        # One new token may attend to everything in the cache, so only a longer q needs the mask.
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1)


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them, applied to every token separately."""

    def __init__(self, config):
        super().__init__()
        hidden = int(config.mlp_ratio * config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, hidden * (2 if config.activation == "swiglu" else 1), bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """`x` (B, T, C) → (B, T, C)."""
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then the MLP. Each reads a normalised input and adds its output to the residual stream (pre-norm)."""

    def __init__(self, config):
        super().__init__()
        self.residual = config.residual
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config) if config.mlp_ratio else nn.Identity()
        self.mlp = MLP(config) if config.mlp_ratio else None

    def forward(self, x, rotary=None, cache=None):
        """The residual stream `x` (B, T, C) → (B, T, C)."""
        x = self.attn(self.ln_1(x), rotary, cache) + (x if self.residual else 0)
        return x if self.mlp is None else self.mlp(self.ln_2(x)) + (x if self.residual else 0)


class GPT(nn.Module):
    """Token ids in, logits of each next token out."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        position, width = config.position, config.n_embd // max(1, config.ngram - 1)
        self.transformer: Any = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(vocab_size, config.n_embd)
        self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd) if position == "learned" else None
        self.transformer["ngrams"] = nn.Embedding(config.ngram_rows, width) if config.ngram else None
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["ln_e"] = NORMS[config.norm](config) if config.norm_embedding else nn.Identity()
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = NORMS[config.norm](config) if config.norm_final else nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        rotary = rotary_table(config.block_size, config.n_embd // config.n_head) if position == "rope" else None
        self.rotary: Any  # None unless config.position is "rope"
        self.register_buffer("rotary", rotary, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Draw every matrix from a normal distribution with mean 0 and standard deviation init_std.

        Without init_std, use GPT-2's: 0.02, and 0.02 / √(2 n_layer) for each c_proj. The n-grams start at 0.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "ngrams.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=self.config.init_std or std)

    def forward(self, idx, targets=None):
        """`idx`, `targets` (B, T) int64 → logits (B, T, V), mean loss in nats or None. Targets of -1 are ignored."""
        return self.head(self.final_hidden(idx), targets)

    def head(self, x, targets):
        """The output `x` (B, T, C) of `final_hidden`, and `targets` → what `forward` returns."""
        logits = self.lm_head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def final_hidden(self, idx, cache=None):
        """`idx` (B, T) → the final norm's output (B, T - start, C), where start is the cache's length, or 0.

        cache: a KVCache (quill/generation.py) with the keys and values of the first `length` tokens of `idx`, which are
        not computed again. `take` returns the positions of the other tokens, and `layers[i].append(k, v)` adds theirs
        and returns all, (B, H, T, D).
        """
        start, end = 0 if cache is None else cache.length, idx.size(1)
        assert end <= self.config.block_size, f"{end} tokens, but block_size is {self.config.block_size}"
        assert start == 0 or end - start == 1, "a cache that is not empty takes one token at a time"
        positions = slice(start, end) if cache is None else cache.take(start, end)
        x = self.transformer.wte(idx[:, start:])
        if self.transformer.ngrams is not None:
            x = x + ngram_vectors(idx, self.config.ngram, self.transformer.ngrams.weight, start)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe.weight[positions]
        x = self.transformer.drop(self.transformer.ln_e(x))
        rotary = None if self.rotary is None else self.rotary[:, positions]
        for i, block in enumerate(self.transformer.h):
            x = block(x, rotary, None if cache is None else cache.layers[i])
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue each row of `idx` (B, T), T ≥ 1, by `max_new_tokens` tokens. → (B, T + max_new_tokens)

        Call `eval()` first, so that dropout is off. A longer prompt is cut to its last `block_size` tokens. When the
        context is full, generation continues from its last `block_size // 2` tokens. The whole context is computed
        for every token; quill/generation.py is faster, with a cache.
        """
        start = max(0, idx.size(1) - self.config.block_size)
        for _ in range(max_new_tokens):
            if idx.size(1) - start > self.config.block_size:
                start = idx.size(1) - max(1, self.config.block_size // 2)
            logits = self.lm_head(self.final_hidden(idx[:, start:])[:, -1]) / temperature  # (B, V)
            if top_k is not None:
                kept = logits.topk(min(top_k, self.vocab_size)).values
                logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
            idx = torch.cat([idx, torch.multinomial(logits.softmax(dim=-1), 1)], dim=1)
        return idx

    def num_params(self):
        """Return the number of parameters. A tied matrix is counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Return the FLOPs of a training step per token, as in PaLM (Chowdhery et al. 2022), appendix B.

        6 for each weight, and 12 · n_layer · C · T for attention with T = block_size. Embedding look-ups do not count.
        """
        lookups = [m for m in self.transformer.values() if isinstance(m, nn.Embedding)]
        lookup_weights = sum(m.weight.numel() for m in lookups if m.weight is not self.lm_head.weight)
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * (self.num_params() - lookup_weights) + attention
