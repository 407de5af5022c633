"""GPT: the decoder-only transformer of GPT-2, its cache of keys and values, and generation. Read it top to bottom.

    logits, loss = GPT(config, vocab_size)(idx, targets)    # config: quill/options.py's ModelConfig

Parameters carry GPT-2's names and shapes, so that weights map by name. Optimizer, files and options live elsewhere.

Shapes: B sequences in a batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size.
References: GPT-2 (Radford et al. 2019) for the architecture and its initialisation; nanoGPT for the exact GELU.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def make_norm(config):
    """Normalisation over the last dimension, (…, C) → (…, C)."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return rms_norm(config.n_embd) if config.norm == "rmsnorm" else nn.Identity()


def rms_norm(width):
    """RMSNorm (Zhang & Sennrich 2019) without weights: the matrix that follows can do the scaling."""
    return nn.RMSNorm(width, eps=1e-5, elementwise_affine=False)


def rotary_table(block_size, head_width):
    """RoPE (Su et al. 2021): position t turns pair i by t / 10000^(2i/D). → its cos and sin (2, block_size, D/2)"""
    frequency = 10000.0 ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x, rotary):
    """Turn each pair (i, i + D/2) of `x` (B, H, T, D) by its position's angle; `rotary` is (2, T, D/2)."""
    (cos, sin), (a, b) = rotary, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Dropout(nn.Module):
    """Zero each element with probability `p`, and scale the others so that the mean stays."""

    def __init__(self, p):
        super().__init__()
        self.p = min(round(p * 2**16), 2**16 - 1) / 2**16  # what 16 bits can express

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        # torch's own takes a third of a training step on a CPU: it draws number by number. Here, a word makes four.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = (drawn >= self.p * 2**16 - 2**15).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.p))


class Linear(nn.Linear):
    """nn.Linear, and in float32 on a CPU quicker with the few rows that generation has. (…, in) → (…, out)"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = next((n for n in range(2, 32) if self.out_features % n == 0), 1)

    def forward(self, x):
        few = 0 < x.numel() <= 32 * self.in_features and not self.training
        if not few or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        # With few rows, a CPU's time goes into reading the weights, and F.linear reads them at half the memory's
        # speed (docs/records.md). On the left of a product, and in parts, so that all threads read, they come at full.
        y = torch.bmm(self.weight.view(self.parts, -1, self.in_features), rows.T.expand(self.parts, -1, -1))
        y = y.view(self.out_features, -1).T.view(*x.shape[:-1], self.out_features)  # from (parts, out / parts, rows)
        return y if self.bias is None else y + self.bias


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value at once
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout if config.attention_dropout is None else config.attention_dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.qk_norm = rms_norm(config.n_embd // config.n_head) if config.qk_norm else nn.Identity()

    def forward(self, x, rotary=None, cache=None, layer=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        q, k = self.qk_norm(q), self.qk_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if q.dtype != v.dtype:  # norm and rotation may have raised the precision under autocast
            q, k = q.type_as(v), k.type_as(v)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, tokens so far, D)
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q, k, v):
        """softmax(q kᵀ / √D + causal mask) v, with dropout on the weights. (B, H, T, D)"""
        T, D = q.shape[-2:]
        dropout = self.attn_dropout.p if self.training else 0.0
        # On a CPU, torch has no fused kernel with dropout, and in bfloat16 one whose gradient is slow.
        if q.device.type == "cpu" and T > 1 and (dropout or (q.dtype == torch.bfloat16 and T <= 512)):
            mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5).softmax(dim=-1)
            return torch.bmm(self.attn_dropout(weights), v).unflatten(0, (-1, self.n_head))
        # A single new token sees everything in the cache, so only a longer q needs the mask.
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them, applied to every token by itself."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        hidden = int(config.mlp_ratio * config.n_embd)
        gates = 2 if config.activation == "swiglu" else 1
        self.c_fc = Linear(config.n_embd, gates * hidden, bias=config.bias)
        self.c_proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        if self.activation == "gelu":
            x = F.gelu(x)
        elif self.activation == "relu":
            x = F.relu(x)
        elif self.activation == "relu2":  # So et al. 2021, "Primer"
            x = F.relu(x).square()
        else:  # swiglu: Shazeer 2020
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each behind a norm and added to what came in (pre-norm)."""

    def __init__(self, config):
        super().__init__()
        self.residual = config.residual
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.has_mlp = config.mlp_ratio > 0
        if self.has_mlp:
            self.ln_2 = make_norm(config)
            self.mlp = MLP(config)

    def forward(self, x, rotary=None, cache=None, layer=None):
        y = self.attn(self.ln_1(x), rotary, cache, layer)
        x = x + y if self.residual else y
        if self.has_mlp:
            y = self.mlp(self.ln_2(x))
            x = x + y if self.residual else y
        return x


class GPT(nn.Module):
    """Token ids in, logits of each next token out."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = Dropout(config.dropout)
        if config.norm_embedding:
            self.transformer["ln_e"] = make_norm(config)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config) if config.norm_final else nn.Identity()
        self.lm_head = Linear(config.n_embd, vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        rotary = rotary_table(config.block_size, config.n_embd // config.n_head) if config.position == "rope" else None
        self.register_buffer("rotary", rotary, persistent=False)
        self.init_weights()

    def init_weights(self):
        """N(0, init_std), or GPT-2's: N(0, 0.02), and smaller by √(2 n_layer) in the matrix that ends a branch."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=self.config.init_std or std)

    def hidden(self, idx, cache=None):
        """`idx` (B, T) → the final norm's output (B, T, C). With a cache, `idx` is what comes after its tokens."""
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        assert end <= self.config.block_size, f"{end} tokens, but block_size is {self.config.block_size}"
        assert start == 0 or idx.size(1) == 1, "a cache that holds tokens takes one more at a time"
        x = self.transformer.wte(idx)
        if self.config.position == "learned":
            x = x + self.transformer.wpe.weight[start:end]
        if self.config.norm_embedding:
            x = self.transformer.ln_e(x)
        x = self.transformer.drop(x)
        rotary = self.rotary[:, start:end] if self.rotary is not None else None
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rotary, cache, layer)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """`idx`, `targets` (B, T) int64 → logits (B, T, V), and the mean loss in nats (None without targets).

        A target of -1 predicts nothing and does not count.
        """
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def num_params(self):
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """FLOPs of a training step, per token: 6 for each weight of a matrix product, 12 L C T for attention.

        PaLM (Chowdhery et al. 2022), appendix B. Looking up an embedding costs nothing.
        """
        lookups = [m for m in self.transformer.values() if isinstance(m, nn.Embedding)]
        free = sum(m.weight.numel() for m in lookups if m.weight is not self.lm_head.weight)
        return 6 * (self.num_params() - free) + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    @torch.inference_mode()
    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        stop_token=None,
        generator=None,
        on_token=None,
        use_cache=True,
    ):
        """Continue each row of `idx` (B, T), T ≥ 1, by up to `max_new_tokens` tokens. → (B, T + new)

        A row that has drawn `stop_token` is filled up with it, and when every row has, generation ends. `on_token` is
        called with each step's tokens (B,). Dropout is off while this runs. Positions are learned for `block_size`
        places only: when the context has outgrown them, the model goes on from its last `block_size // 2` tokens.
        """
        was_training = self.training
        self.eval()
        block_size = self.config.block_size
        start = max(0, idx.size(1) - block_size)  # where the context begins: a longer prompt gives its tail
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        cache = None
        for _ in range(max_new_tokens):
            if idx.size(1) - start > block_size:
                start = idx.size(1) - max(1, block_size // 2)
                cache = None
            if not use_cache:
                hidden = self.hidden(idx[:, start:])
            elif cache is None:
                cache = KVCache(self.config)
                hidden = self.hidden(idx[:, start:], cache)
            else:
                hidden = self.hidden(idx[:, -1:], cache)
            token = sample_token(self.lm_head(hidden[:, -1]), temperature, top_k, top_p, generator)  # (B,)
            if stop_token is not None:
                token = token.masked_fill(done, stop_token)
                done |= token == stop_token
            idx = torch.cat([idx, token[:, None]], dim=1)
            if on_token is not None:
                on_token(token)
            if stop_token is not None and done.all():
                break
        self.train(was_training)
        return idx


class KVCache:
    """Each layer's keys and values of the tokens so far, in buffers as long as a block.

    It only stores: what to do when it is full is `GPT.generate`'s business.
    """

    def __init__(self, config):
        self.capacity = config.block_size
        self.keys = [None] * config.n_layer
        self.values = [None] * config.n_layer
        self.length = 0  # tokens that every layer holds; `GPT.hidden` moves it on

    def append(self, layer, k, v):
        """Store `k`, `v` (B, H, T, D) behind what is there. → all keys, all values (B, H, length + T, D)"""
        if self.keys[layer] is None:
            B, H, _, D = k.shape
            self.keys[layer], self.values[layer] = k.new_empty(2, B, H, self.capacity, D)
        keys, values, T = self.keys[layer], self.values[layer], k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        return keys.narrow(2, 0, self.length + T), values.narrow(2, 0, self.length + T)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token a row from `logits` (B, V). → (B,). Temperature 0, or next to it, takes the likeliest.

    `top_k` keeps the k likeliest tokens; `top_p` the likeliest that together hold that much probability, and at
    least one (nucleus sampling, Holtzman et al. 2019).
    """
    if temperature < 1e-6:  # beyond float32's range in what follows
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the likeliest stays finite, however cold
    if top_k is not None and top_k < logits.size(-1):
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ranked, order = probs.sort(dim=-1, descending=True)
        # A token stays while those before it have not yet reached top_p.
        ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
