"""GPT's forward pass and loss in plain numpy and float64, written from the papers and not from model.py: the reference.

It loops over the positions and uses no optimization, so that it can be checked by eye.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, kind, w, name):
    if kind == "none":
        return x
    if kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    assert kind == "layernorm", kind
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def turn(vector, t):
    """RoPE: pair i of a head's vector at position t."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = t / 10000 ** (2 * i / len(vector))
        out[i] = vector[i] * np.cos(angle) - vector[i + half] * np.sin(angle)
        out[i + half] = vector[i] * np.sin(angle) + vector[i + half] * np.cos(angle)
    return out


def ngrams(ids, table, longest):
    """The rows of a table for the last 2, 3, … ids, one after the other; 0 stands for those that are missing."""
    out = []
    for n in range(2, longest + 1):
        row, *earlier = [*ids.tolist()[::-1], *[0] * n][:n]
        for i in earlier:
            row = (row * 1_000_003 + i) % len(table)
        out += table[row].tolist()
    return out


def attention(x, w, name, config):
    T, C = x.shape
    D = C // config.n_head
    q, k, v = np.split(linear(x, w, f"{name}.c_attn"), 3, axis=-1)
    out = np.zeros_like(x)
    for head in range(config.n_head):
        s = slice(head * D, (head + 1) * D)
        qs, ks, vs = q[:, s].copy(), k[:, s].copy(), v[:, s]
        if config.qk_norm:
            qs, ks = norm(qs, "rmsnorm", w, ""), norm(ks, "rmsnorm", w, "")
        if config.position == "rope":
            qs = np.array([turn(qs[t], t) for t in range(T)])
            ks = np.array([turn(ks[t], t) for t in range(T)])
        for t in range(T):
            weights = softmax(ks[: t + 1] @ qs[t] / math.sqrt(D))
            out[t, s] = weights @ vs[: t + 1]
    return linear(out, w, f"{name}.c_proj")


def mlp(x, w, name, config):
    h = linear(x, w, f"{name}.c_fc")
    if config.activation == "gelu":
        h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
    elif config.activation == "gelu_tanh":
        h = h * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    elif config.activation == "relu":
        h = np.maximum(h, 0)
    elif config.activation == "relu2":
        h = np.maximum(h, 0) ** 2
    else:
        assert config.activation == "swiglu", config.activation
        gate, up = np.split(h, 2, axis=-1)
        h = gate / (1 + np.exp(-gate)) * up
    return linear(h, w, f"{name}.c_proj")


def forward(idx, w, config):
    """One sequence of ids (T,) → logits (T, V). `w`: GPT-2's parameter names → float64 arrays."""
    x = w["transformer.wte.weight"][idx]
    if config.ngram:
        x = x + [ngrams(idx[: t + 1], w["transformer.ngrams.weight"], config.ngram) for t in range(len(idx))]
    if config.position == "learned":
        x = x + w["transformer.wpe.weight"][: len(idx)]
    if config.norm_embedding:
        x = norm(x, config.norm, w, "transformer.ln_e")
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        y = attention(norm(x, config.norm, w, f"{name}.ln_1"), w, f"{name}.attn", config)
        x = x + y if config.residual else y
        if config.mlp_ratio:
            y = mlp(norm(x, config.norm, w, f"{name}.ln_2"), w, f"{name}.mlp", config)
            x = x + y if config.residual else y
    if config.norm_final:
        x = norm(x, config.norm, w, "transformer.ln_f")
    return x @ w["lm_head.weight"].T


def loss(idx, targets, w, config):
    """Mean loss in nats over the targets that are not -1; `idx`, `targets` (B, T)."""
    total, count = 0.0, 0
    for row, row_targets in zip(idx, targets, strict=True):
        for z, target in zip(forward(row, w, config), row_targets, strict=True):
            if target != -1:
                surprise = np.log(np.exp(z - z.max()).sum()) - (z[target] - z.max())
                total, count = total + surprise, count + 1
    return total / count
